"""Memory for batches that is used again once nobody holds it.

A fresh array of megabytes costs more than the copy that fills it: the kernel hands out its pages
one by one, zeroed. So a buffer comes back when its last array, and every view of it, is gone.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import Any

import numpy as np


class BufferPool:
    """Called like `np.empty(shape, dtype)`."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)

    def __call__(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of arbitrary content."""
        num_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        free = self._free[num_bytes]
        try:
            memory = free.pop()  # atomic: batches are released in other threads
        except IndexError:
            memory = np.empty(max(num_bytes, 1), np.uint8)
        # Views refer to the array that `frombuffer` makes, not past it to the memory. So when
        # that array goes, all of them have gone.
        array = np.frombuffer(memory.data, np.uint8, num_bytes)
        weakref.finalize(array, free.append, memory)
        return array.view(dtype).reshape(shape)
