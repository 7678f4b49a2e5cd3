"""Where the time of a shard goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from shards.column import ColumnSpec

READ_AND_DECODE = "read_and_decode"


@dataclass
class TimeAccount:
    """Seconds of the encoding thread by stage; what it waits for is counted where it waits."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to one stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def of_column(self, column: ColumnSpec) -> dict[str, float]:
        """What one column cost: its encoding, and the reading and decoding that all share."""
        return {
            READ_AND_DECODE: round(self.seconds[READ_AND_DECODE], 3),
            "encode": round(self.seconds.get(f"encode {column.name}", 0.0), 3),  # no rows, no time
        }
