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
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def follow_launcher() -> None:
    """Ask the kernel for SIGTERM when `accelerate launch` or `torchrun` ends.

    For one process Accelerate starts us as a child and passes no signal on, and nobody can pass on
    a SIGKILL: stopping the launcher, as schedulers do, would leave the training running. Linux
    only; elsewhere nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    if not _is_launcher(parent):
        return
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before we could ask
        os.kill(os.getpid(), signal.SIGTERM)


def _is_launcher(process: int) -> bool:
    command_line = Path(f"/proc/{process}/cmdline")
    words = command_line.read_bytes() if command_line.exists() else b""
    return bool(_LAUNCHERS & {Path(os.fsdecode(word)).name for word in words.split(b"\0")})
