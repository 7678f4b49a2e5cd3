"""Where the time of a shard, and of a job, goes, and which stage it waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from shards.column import ColumnSpec

READ, DECODE, TRANSFORM, WRITE = "read", "decode", "transform", "write"
# Stages that run at the same time, each on resources of its own: what the job waits for is the
# one that was busy for the largest share of its capacity.
_IN_THREADS = (DECODE, TRANSFORM)


class TimeAccount:
    """Busy seconds by stage; stages overlap, so they do not add up to the time that passed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to one stage."""
        start = time.perf_counter()
        yield
        self.add({name: time.perf_counter() - start})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add what was measured elsewhere."""
        with self._lock:
            for name, spent in seconds.items():
                self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def of_column(self, column: ColumnSpec) -> dict[str, float]:
        """What one column cost: its own encoding, and what all columns of the shard share."""
        shared = {name: self.seconds.get(name, 0.0) for name in (READ, *_IN_THREADS)}
        own = {"encode": self.seconds.get(encode_stage(column), 0.0)}
        return {name: round(spent, 3) for name, spent in {**shared, **own}.items()}


def encode_stage(column: ColumnSpec) -> str:
    """`encode moments-256`."""
    return f"encode {column.name}"
