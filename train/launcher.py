"""Ending with the launcher: what stops `accelerate launch` stops the training that it started."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path


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
