"""Ending with the launcher: what stops it stops the training that it started."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_LAUNCHERS = {
    *("accelerate", "accelerate-launch", "accelerate.commands.launch"),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch"),
}


def follow_launcher() -> None:
    """Ask the kernel for SIGTERM when `accelerate launch` or `torchrun` ends.

    For one process Accelerate starts us as a child and passes no signal on, and nobody can pass on
    a SIGKILL: stopping the launcher, as schedulers do, would leave the training running. Linux
    only; elsewhere nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return
    command_line = Path(f"/proc/{os.getppid()}/cmdline")
    words = os.fsdecode(command_line.read_bytes()) if command_line.exists() else ""
    if _LAUNCHERS & {Path(word).name for word in words.split("\0")}:
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
