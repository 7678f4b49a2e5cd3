"""One trial's trainer as a child process, that never outlives the sweep."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from train.sweep.devices import Slot

TRAINER = (str(Path(__file__).parent.parent / "main.py"),)
LOG = "log.txt"
# For a checkpoint of the largest model on slow storage; then it hangs.
_STOP_SEC = 600.0
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_TAIL_BYTES = 16_384


class Child:
    """A running trainer. Its output is appended to log.txt in the run's folder.

    It has a process group of its own, so that Ctrl-C reaches the sweep alone, and is sent SIGTERM
    when the sweep dies, by whatever: the trainer then writes a checkpoint and ends.

    Args:
        script: the trainer, and what comes before the arguments.
        arguments: of the trainer.
        run_dir: of the run; is made when missing.
        slot: where it runs.
    """

    def __init__(
        self, script: Sequence[str], arguments: Sequence[str], run_dir: Path, slot: Slot
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.slot = slot
        self._log = run_dir / LOG
        self._stop_asked_at = 0.0
        with self._log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [*_launcher(slot), *script, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=slot.environment,
                process_group=0,
                preexec_fn=_die_with_parent(),  # the sweep has one thread, so this is safe
            )

    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs.

        One that was told to stop and does not is killed.
        """
        status = self._process.poll()
        asked_at = self._stop_asked_at
        if status is None and asked_at and time.monotonic() - asked_at > _STOP_SEC:
            self.kill()
        return status

    def stop(self) -> None:
        """Ask for a checkpoint and the end, once."""
        if not self._stop_asked_at:
            self._stop_asked_at = time.monotonic()
            self._process.terminate()

    def kill(self) -> None:
        """End it and all that it started, now."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def last_words(self) -> str:
        """Why it ended, as far as its output says: its error, or its last line."""
        with self._log.open("rb") as log:
            log.seek(max(self._log_start, self._log.stat().st_size - _TAIL_BYTES))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
        errors = [line for line in lines if line.startswith("train: error: ")]
        return next(iter([*errors[-1:], *[line for line in lines if line][-1:]]), "no output")


def _launcher(slot: Slot) -> list[str]:
    if slot.num_processes == 1:
        return [sys.executable]
    torchrun = ("-m", "torch.distributed.run", "--standalone")
    return [sys.executable, *torchrun, f"--nproc_per_node={slot.num_processes}"]


def _die_with_parent() -> Callable[[], None] | None:
    """What a child does first, on Linux; elsewhere a killed sweep leaves its trials running."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask_for_sigterm() -> None:
        prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before we could ask
            os._exit(1)

    return ask_for_sigterm
