"""Where the time of a job went, and which stage the others waited for."""

from __future__ import annotations

import time
from collections.abc import Mapping

from precompute.time_account import DECODE, READ, WRITE, bottleneck, loads

_REMEDIES = {
    READ: "a faster source, or more --workers",
    DECODE: "more CPUs, or more --decode-workers",
    WRITE: "a faster destination, or more --workers",
    "encode": "a faster device, or more of them",
}


class JobAccount:
    """Busy seconds by stage over all workers, against what each stage could have been busy.

    Args:
        num_workers: over all machines.
        decode_workers: threads of each.
    """

    def __init__(self, num_workers: int, decode_workers: int) -> None:
        self._start = time.perf_counter()
        self._end = self._start
        self.seconds: dict[str, float] = {}
        self._num_workers, self._decode_workers = num_workers, decode_workers

    def add(self, seconds: Mapping[str, float]) -> None:
        """Take a shard's busy seconds by stage."""
        for name, spent in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def finish(self) -> None:
        """Stop the clock."""
        self._end = time.perf_counter()

    @property
    def wall_sec(self) -> float:
        """Seconds that passed."""
        return self._end - self._start

    def busy(self) -> dict[str, float]:
        """Share of its capacity that each of the four kinds of stages was busy."""
        capacity_sec = max(self.wall_sec, 1e-9) * self._num_workers
        spent = loads(self.seconds, self._decode_workers)
        return {name: sec / capacity_sec for name, sec in spent.items()}

    def bottleneck(self) -> str:
        """The stage that was busy for the largest share."""
        return bottleneck(self.seconds, self._decode_workers)

    def summary(self, num_samples: int) -> str:
        """Two lines for people."""
        ranked = sorted(self.seconds.items(), key=lambda stage: -stage[1])
        stages = ", ".join(f"{name} {sec:.1f} s" for name, sec in ranked)
        busy = ", ".join(f"{name} {share:.0%}" for name, share in self.busy().items())
        slowest = self.bottleneck()
        return (
            f"encoded {num_samples:,} samples in {self.wall_sec:.1f} s, "
            f"{num_samples / max(self.wall_sec, 1e-9):.1f} img/s; busy: {stages}\n"
            f"  of capacity: {busy}; the bottleneck is {slowest} ({_REMEDIES[slowest]})"
        )
