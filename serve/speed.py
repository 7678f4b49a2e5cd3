"""How fast a device has been of late, and so when there will be room."""

from __future__ import annotations

import threading
from collections import deque
from statistics import median


class Speed:
    """Seconds per unit of work of the last batches of all devices."""

    def __init__(self, num_batches: int = 20) -> None:
        self._sec_per_work: deque[float] = deque(maxlen=num_batches)
        self._lock = threading.Lock()

    def record(self, work: float, duration_sec: float) -> None:
        """A batch of so much work took so long."""
        with self._lock:
            self._sec_per_work.append(duration_sec / work)

    def sec_for(self, work: float) -> float:
        """What one device is likely to need; 0 before anything was measured."""
        with self._lock:
            return work * median(self._sec_per_work) if self._sec_per_work else 0.0
