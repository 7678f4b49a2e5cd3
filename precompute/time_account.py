"""Where the time of a shard, and of a job, goes, and which stage it waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from shards.column import ColumnSpec

READ, DECODE, TRANSFORM, WRITE = "read", "decode", "transform", "write"
_ENCODE = "encode"


def loads(seconds: Mapping[str, float], decode_workers: int) -> dict[str, float]:
    """Seconds that each of the four kinds of stages needs, with all that it has to itself.

    Reading, decoding with its transforms, encoding and writing run at the same time, so the
    largest of these is the one that all wait for.

    Args:
        seconds: busy, by stage.
        decode_workers: threads that share the decoding.
    """
    encode = sum(spent for name, spent in seconds.items() if name.startswith(f"{_ENCODE} "))
    decode = seconds.get(DECODE, 0.0) + seconds.get(TRANSFORM, 0.0)
    return {
        READ: seconds.get(READ, 0.0),
        DECODE: decode / decode_workers,
        _ENCODE: encode,
        WRITE: seconds.get(WRITE, 0.0),
    }


def bottleneck(seconds: Mapping[str, float], decode_workers: int) -> str:
    """The stage that the others wait for."""
    found = loads(seconds, decode_workers)
    return max(found, key=lambda name: found[name])


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
        shared = {name: self.seconds.get(name, 0.0) for name in (READ, DECODE, TRANSFORM)}
        own = {_ENCODE: self.seconds.get(encode_stage(column), 0.0)}
        return {name: round(spent, 3) for name, spent in {**shared, **own}.items()}


def encode_stage(column: ColumnSpec) -> str:
    """`encode moments-256`."""
    return f"{_ENCODE} {column.name}"
