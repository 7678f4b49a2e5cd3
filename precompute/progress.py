"""How far a job is: a bar with img/s and ETA on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm

from shards.source_shard import SourceShard

_LINE_SEC = 10.0


class Progress:
    """A bar with img/s and ETA; the total is estimated from the bytes of the shards.

    Off a terminal it is a line every ten seconds instead.
    """

    def __init__(self, sources: list[SourceShard]) -> None:
        sizes = [source.num_bytes for source in sources]
        # Where a length is unknown (a pipe), every shard counts the same.
        self._by_bytes = None not in sizes
        self._total = sum(self._weight(source) for source in sources)
        self._done = 0
        self._num_shards, self._shards_done = len(sources), 0
        self._start = self._last_line = time.monotonic()
        self.num_samples = 0
        self._bar: Any = tqdm(unit="img", disable=None, dynamic_ncols=True)

    def _weight(self, source: SourceShard) -> int:
        return (source.num_bytes or 0) if self._by_bytes else 1

    def count(self, num_samples: int) -> None:
        """So many more source samples were read."""
        self.num_samples += num_samples
        self._bar.update(num_samples)

    def finish_shard(self, source: SourceShard) -> None:
        """A shard is committed."""
        self._done += self._weight(source)
        self._shards_done += 1
        share = self._done / max(self._total, 1)
        self._bar.total = round(self.num_samples / max(share, 1e-9))
        self._bar.set_postfix_str(f"shard {self._shards_done}/{self._num_shards}")
        now = time.monotonic()
        if self._bar.disable and now - self._last_line > _LINE_SEC:
            self._last_line = now
            elapsed = now - self._start
            print(
                f"shard {self._shards_done}/{self._num_shards} | {self.num_samples:,} img | "
                f"{self.num_samples / elapsed:.1f} img/s | "
                f"ETA {elapsed / max(share, 1e-9) - elapsed:.0f} s",
                flush=True,
            )

    def say(self, text: str) -> None:
        """A line that the bar does not swallow."""
        tqdm.write(text)

    def close(self) -> None:
        """Leave the bar as it ended."""
        self._bar.close()
