"""Fetch the shards of a remote dataset before they are needed, within the cache's bound."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from shards.dataset import Column
from shards.errors import DatasetError, StorageError

_NUM_THREADS = 4


class FetchAhead:
    """Downloads what the order says will be read, up to `max_bytes` that were not read yet.

    Args:
        columns: image and text column; a shard's files are fetched together.
        shards: their names; a shard is known by its index in this list.
        windows: shards of each window in the order of need, from `SampleOrder.shards_ahead`.
        max_bytes: how far to run ahead.
    """

    def __init__(
        self,
        columns: list[Column],
        shards: list[str],
        windows: Iterator[np.ndarray],
        max_bytes: int,
    ) -> None:
        self._columns, self._shards, self._windows = columns, shards, windows
        self._max_bytes = max_bytes
        # Shards that are fetched and not read yet: number of their window, bytes.
        self._ahead: dict[int, tuple[int, int]] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="fetch")
        self._thread = threading.Thread(target=self._run, name="fetch-ahead", daemon=True)
        self._thread.start()

    def mark_read(self, shards: set[int]) -> None:
        """Some shards are being read: what they took of the bound is free again."""
        with self._changed:
            reached = max((self._ahead.pop(s)[0] for s in shards & self._ahead.keys()), default=0)
            # A run that began within a window does not need all of that window's shards.
            passed = [s for s, (window, _) in self._ahead.items() if window < reached]
            for shard in passed:
                del self._ahead[shard]
            self._changed.notify()

    def stop(self) -> None:
        """End the downloads that have not begun."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()
        self._pool.shutdown(cancel_futures=True)

    def _run(self) -> None:
        for number, window in enumerate(self._windows):
            for shard in window.tolist():
                if not self._wait_for_room(shard, number):
                    return
                self._pool.submit(self._fetch, shard)

    def _wait_for_room(self, shard: int, window: int) -> bool:
        size = sum(column.shards[self._shards[shard]]["bytes"] for column in self._columns)
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._stopped
                    or not self._ahead
                    or sum(held for _, held in self._ahead.values()) + size <= self._max_bytes
                )
            )
            self._ahead[shard] = (window, size)
            return not self._stopped

    def _fetch(self, shard: int) -> None:
        try:
            for column in self._columns:
                column.fetch_shard(self._shards[shard])
        except (DatasetError, StorageError):
            return  # the reader meets the same error where it matters, and reports it
