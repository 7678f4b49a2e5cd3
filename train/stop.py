"""Ending a run politely: SIGTERM, or Ctrl-C, asks for a stop after the step in progress."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any


class StopOnSignal:
    """While entered, either signal only sets `requested`; a second Ctrl-C interrupts."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


def follow_launcher() -> None:
    """Ask the kernel for SIGTERM when `accelerate launch` ends.

    For one process Accelerate starts us as a child and passes no signal on: stopping the launcher,
    as schedulers do, would leave the training running. Linux only; elsewhere nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return
    command_line = Path(f"/proc/{os.getppid()}/cmdline")
    words = command_line.read_bytes() if command_line.exists() else b""
    if b"accelerate" in words and b"launch" in words:
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
