"""metrics.jsonl: one JSON object a row, exact across interruptions.

Strict JSON has no word for a figure that is not finite: it is written as null and read as NaN.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from shards.errors import UserError
from shards.storage import Location, read_bytes, write_text_whole


class MetricsLog:
    """Appends rows to a run's metrics.jsonl.

    An object store cannot append: there rows are kept in memory and `flush` writes the whole file.
    What was not flushed came after the last checkpoint, so a resumed run writes it again.

    Args:
        where: the file.
        step: rows after this step are removed: the run that wrote them was interrupted before its
            next checkpoint, and they are about to be written again.
    """

    def __init__(self, where: Location, step: int) -> None:
        self._where = where
        self._lines = [_line(row) for row in read_metrics(where) if row["step"] <= step]
        write_text_whole(where, "".join(self._lines))

    def write(self, row: dict[str, float]) -> None:
        """Append one row."""
        if isinstance(self._where, Path):
            with self._where.open("a", encoding="utf-8") as file:
                file.write(_line(row))
        else:
            self._lines.append(_line(row))

    def flush(self) -> None:
        """See to it that all rows are in the file."""
        if not isinstance(self._where, Path):
            write_text_whole(self._where, "".join(self._lines))


def read_metrics(where: Location) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a last line that was cut short does not count.

    Raises:
        UserError: another line is not a row.
    """
    try:
        lines = read_bytes(where).splitlines(keepends=True)
    except FileNotFoundError:
        return []
    whole = [line for line in lines if line.endswith(b"\n")]
    return [_row(line, where, number) for number, line in enumerate(whole, start=1)]


def _row(line: bytes, where: Location, number: int) -> dict[str, float]:
    try:
        row = json.loads(line)
        if "step" in row.keys():  # noqa: SIM118 - a text or a list has none
            return {name: math.nan if value is None else value for name, value in row.items()}
        found = "has no step"
    except (ValueError, AttributeError):
        found = "is not a row of figures"
    raise UserError(
        where, f"line {number} {found}", wanted="a JSON object", remedy="remove that line"
    )


def _line(row: dict[str, float]) -> str:
    figures = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(figures, allow_nan=False) + "\n"
