"""metrics.jsonl: one JSON object a row, exact across interruptions.

Strict JSON has no word for a figure that is not finite: it is written as null and read as NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from shards.errors import StorageError, UserError
from shards.storage import Location, read_bytes, write_text_whole


class MetricsLog:
    """Appends rows to a run's metrics.jsonl.

    An object store cannot append: there rows are kept in memory and `flush` writes the whole file.
    What was not flushed came after the last checkpoint, so a resumed run writes it again. A full
    disk or a store that is down stops nothing: the whole file is written once that is possible.

    Args:
        where: the file.
        step: rows after this step are removed: the run that wrote them was interrupted before its
            next checkpoint, and they are about to be written again.
        say: is told what went wrong, once.

    Raises:
        StorageError: the file cannot be written at all.
    """

    def __init__(self, where: Location, step: int, say: Callable[[str], object] = print) -> None:
        self._where, self._say = where, say
        self._lines = [_line(row) for row in read_metrics(where) if row["step"] <= step]
        write_text_whole(where, "".join(self._lines))
        self._lacks_rows = self._has_warned = False

    def write(self, row: dict[str, float]) -> None:
        """Append one row."""
        self._lines.append(_line(row))
        if not isinstance(self._where, Path):
            self._lacks_rows = True
        elif self._lacks_rows:
            self.flush()
        else:
            self._append(self._where, self._lines[-1])

    def flush(self) -> None:
        """See to it that all rows are in the file, if that is possible."""
        if not self._lacks_rows:
            return
        try:
            write_text_whole(self._where, "".join(self._lines))
        except StorageError as error:
            self._warn(error)
        else:
            self._lacks_rows = False

    def _append(self, path: Path, line: str) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:  # the line may be there in part: only the whole file mends that
            self._lacks_rows = True
            self._warn(f"{path}: cannot be written ({error.strerror})")

    def _warn(self, failure: object) -> None:
        if not self._has_warned:
            self._say(
                f"warning: {failure}. Training goes on; its rows are written when they can be"
            )
        self._has_warned = True


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
