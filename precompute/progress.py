"""How far a job is: a bar with img/s and ETA on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm

from shards.image_shards import SourceShard


class Progress:
    """A bar with img/s and ETA; the total is estimated from the bytes of the shards.

    Off a terminal it is a line every ten seconds instead.
    """

    def __init__(self, sources: list[SourceShard]) -> None:
        self._bytes_total = sum(source.num_bytes for source in sources)
        self._bytes_done = 0
        self._num_shards, self._shards_done = len(sources), 0
        self._start = self._last_line = time.monotonic()
        self.num_samples = 0
        self._bar: Any = tqdm(unit="img", disable=None, dynamic_ncols=True)

    def count_sample(self) -> None:
        """One more source sample was read."""
        self.num_samples += 1
        self._bar.update()

    def finish_shard(self, source: SourceShard) -> None:
        """A shard is committed."""
        self._bytes_done += source.num_bytes
        self._shards_done += 1
        share = self._bytes_done / max(self._bytes_total, 1)
        self._bar.total = round(self.num_samples / max(share, 1e-9))
        self._bar.set_postfix_str(f"shard {self._shards_done}/{self._num_shards}")
        now = time.monotonic()
        if self._bar.disable and now - self._last_line > 10:
            self._last_line = now
            elapsed = now - self._start
            print(
                f"shard {self._shards_done}/{self._num_shards} | {self.num_samples:,} img | "
                f"{self.num_samples / elapsed:.1f} img/s | "
                f"ETA {elapsed / share - elapsed:.0f} s",
                flush=True,
            )

    def close(self) -> None:
        """Leave the bar as it ended."""
        self._bar.close()
