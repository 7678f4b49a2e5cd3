"""epochs.jsonl: which shards each epoch of a run took from a dataset that was still growing.

A line per epoch with the change against the epoch before, so that the file grows with the dataset
and hardly with the epochs:

    {"epoch": 1, "first_step": 40, "num_steps": 55, "added": {"00007": 9950}, "removed": []}

The first line also has `held_out` (`shards.held_out`, chosen once) and `identity`, the settings
that the lines hold for. A line is written before its epoch's first batch, and stays.
"""

from __future__ import annotations

import json
from bisect import bisect_right

import numpy as np

from shards.column import Json
from shards.errors import DatasetError, UserError
from shards.held_out import HeldOut
from shards.storage import Location, read_bytes, write_text_whole

_REMEDY = "put the run's own file back, or start again with another --output-dir"


class EpochRecord:
    """The epochs of a run, from the first; every process has it, the main process writes it.

    Args:
        where: the file.
        identity: the settings that it must hold for.
    """

    def __init__(self, where: Location, identity: str) -> None:
        self._where, self._identity = where, identity
        self._lines: list[Json] = []
        self._rows: dict[str, int] = {}  # of every shard that was ever there, oldest first

    def __len__(self) -> int:
        return len(self._lines)

    def read(self) -> list[Json]:
        """The lines of the file, to be added by every process; none where there is no file.

        Raises:
            UserError: they are not JSON.
        """
        try:
            text = read_bytes(self._where).decode()
            return [json.loads(line) for line in text.splitlines()]
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise UserError(self._where, f"not JSON lines ({error})", remedy=_REMEDY) from None

    def write(self, line: Json) -> None:
        """Put the file in place with one line more, which is still to be added."""
        lines = [json.dumps(each, sort_keys=True) + "\n" for each in (*self._lines, line)]
        write_text_whole(self._where, "".join(lines))

    def next_line(self, shards: dict[str, int], num_steps: int, held_out: HeldOut) -> Json:
        """The line of the epoch that follows.

        Args:
            shards: their rows.
            num_steps: of the epoch.
            held_out: of the run.
        """
        before = self.shards_of(len(self) - 1)
        line: Json = {"epoch": len(self), "first_step": self.end, "num_steps": num_steps}
        line["added"] = {name: rows for name, rows in shards.items() if name not in before}
        line["removed"] = sorted(before.keys() - shards.keys())
        if not self._lines:
            line |= {"identity": self._identity, "held_out": held_out.rows}
        return line

    def add(self, line: Json) -> None:
        """Take in the line of the epoch that follows.

        Raises:
            UserError: it is another, or of a run with other settings.
        """
        try:
            wanted = [len(self), self.end]
            found = [line["epoch"], line["first_step"]]
            first_line = line if not self._lines else self._lines[0]
            is_ours = first_line["identity"] == self._identity
            HeldOut(first_line["held_out"])
            rows = {**self._rows, **line["added"]}
            fits = found == wanted and line["num_steps"] > 0 and isinstance(line["removed"], list)
        except (KeyError, TypeError, AttributeError) as error:
            raise self._broken(f"no epoch ({error!r})") from None
        if not is_ours:
            raise UserError(
                self._where, "belongs to a run with other settings", remedy="another --output-dir"
            )
        if not fits or any(rows[name] != count for name, count in self._rows.items()):
            raise self._broken(f"epoch and first step {found}, wanted {wanted}")
        self._lines.append(line)
        self._rows = rows

    def _broken(self, found: str) -> UserError:
        return UserError(self._where, f"line {len(self) + 1}: {found}", remedy=_REMEDY)

    @property
    def end(self) -> int:
        """The step behind the last epoch's last one."""
        return self._lines[-1]["first_step"] + self._lines[-1]["num_steps"] if self._lines else 0

    @property
    def held_out(self) -> HeldOut:
        """What the run holds out; nothing before its first epoch."""
        return HeldOut(self._lines[0]["held_out"] if self._lines else {})

    def epoch_of(self, step: int) -> int:
        """Number of the epoch that has a step; the last one for all behind it."""
        return max(bisect_right(self._lines, step, key=lambda line: line["first_step"]) - 1, 0)

    def steps_of(self, epoch: int) -> range:
        """The steps of an epoch."""
        first: int = self._lines[epoch]["first_step"]
        return range(first, first + self._lines[epoch]["num_steps"])

    def shards_of(self, epoch: int) -> dict[str, int]:
        """Rows of the shards of an epoch; none of epoch -1."""
        shards: dict[str, int] = {}
        for line in self._lines[: epoch + 1]:
            shards |= line["added"]
            for name in line["removed"]:
                del shards[name]
        return shards

    def expect_rows(self, shards: dict[str, int]) -> None:
        """Hold shards to what they were when they were first recorded.

        Raises:
            DatasetError: one has more rows now, or less.
        """
        for name in sorted(shards.keys() & self._rows.keys()):
            if shards[name] != self._rows[name]:
                raise DatasetError(
                    f"shard {name}",
                    f"{shards[name]} rows",
                    wanted=f"{self._rows[name]}, as {self._where} has it",
                    remedy="train on the dataset that was made anew in another --output-dir",
                )

    def number_samples(self) -> tuple[list[str], np.ndarray]:
        """Shards in the order in which they came, and the number of each one's first sample.

        So a sample keeps its number in all epochs.
        """
        rows = np.array(list(self._rows.values()), dtype=np.int64)
        return list(self._rows), np.cumsum(rows) - rows
