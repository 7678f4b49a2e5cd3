"""Ending a command politely: a signal asks for a stop at the next good moment."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopOnSignal:
    """While entered, SIGTERM and Ctrl-C only set `requested`; a second Ctrl-C interrupts.

    Args:
        also: further signals that ask for a stop, such as the SIGUSR1 of `sbatch --signal`.
    """

    def __init__(self, *also: signal.Signals) -> None:
        self.requested = False
        self._signals = (signal.SIGTERM, signal.SIGINT, *also)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in self._signals:
            self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
