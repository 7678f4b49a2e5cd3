"""Fetch the shards of a remote dataset before they are needed, within the cache's bound."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from shards.dataset import Column
from shards.errors import DatasetError, StorageError

_NUM_THREADS = 4
_WINDOWS_AHEAD = 4  # besides the one that is read; where all fits, there is nothing to run after


class FetchAhead:
    """Downloads the shards of the window that is read, and of those that follow.

    Args:
        columns: image and text column; a shard's files are fetched together.
        shards: their names; a shard is known by its index in this list.
        windows: from `SampleOrder.shards_ahead`.
        max_bytes: of all the shards that are wanted at a time.
    """

    def __init__(
        self,
        columns: list[Column],
        shards: list[str],
        windows: Iterator[tuple[int, np.ndarray]],
        max_bytes: int,
    ) -> None:
        self._columns, self._shards, self._windows = columns, shards, windows
        self._max_bytes = max_bytes
        self._step = 0
        self._first_steps: deque[int] = deque()  # of the windows from the one that is read on
        self._wanted: dict[int, int] = {}  # shard: first step of the last window that wants it
        self._changed = threading.Condition()
        self._stopped = False
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="fetch")
        self._thread = threading.Thread(target=self._run, name="fetch-ahead", daemon=True)
        self._thread.start()

    def reach(self, step: int) -> None:
        """The reader is at a step: what only windows before it wanted is wanted no more."""
        with self._changed:
            self._step = step
            self._changed.notify()

    def stop(self) -> None:
        """End the downloads that have not begun."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()
        self._pool.shutdown(cancel_futures=True)

    def _run(self) -> None:
        for first_step, window in self._windows:
            with self._changed:
                self._first_steps.append(first_step)
            for shard in window.tolist():
                with self._changed:
                    while not (self._stopped or self._fits(shard)):
                        self._changed.wait()
                    if self._stopped:
                        return
                    self._wanted[shard] = first_step
                self._pool.submit(self._fetch, shard)

    def _fits(self, shard: int) -> bool:
        while len(self._first_steps) > 1 and self._first_steps[1] <= self._step:
            self._first_steps.popleft()
        current = self._first_steps[0]
        self._wanted = {s: first for s, first in self._wanted.items() if first >= current}
        if len(self._first_steps) > 1 + _WINDOWS_AHEAD:
            return False
        wanted = self._wanted.keys() | {shard}
        return len(wanted) == 1 or sum(map(self._num_bytes, wanted)) <= self._max_bytes

    def _num_bytes(self, shard: int) -> int:
        return sum(column.shards[self._shards[shard]]["bytes"] for column in self._columns)

    def _fetch(self, shard: int) -> None:
        try:
            for column in self._columns:
                column.fetch_shard(self._shards[shard])
        except (DatasetError, StorageError):
            return  # the reader meets the same error where it matters, and reports it
