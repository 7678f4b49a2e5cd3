"""metrics.jsonl: one JSON object per log interval, exact across interruptions."""

from __future__ import annotations

import json
from pathlib import Path

from shards.storage import write_text_whole


class MetricsLog:
    """Appends rows to a run's metrics.jsonl.

    Args:
        path: the file.
        step: rows after this step are removed: the run that wrote them was interrupted before its
            next checkpoint, and they are about to be written again.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        write_text_whole(path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: dict[str, float]) -> None:
        """Append one row."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a last line that was cut short does not count."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
