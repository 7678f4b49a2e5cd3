"""Starts the processes of the scaling benchmark with torchrun, and says why they died if they do.

None of them outlives the command that started them, however that ends: the kernel tells the
launcher, the launcher its processes (`train.launcher`).
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from shards.errors import UserError

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_GRACE_SEC = 60.0  # torchrun gives its processes 30 s
_SUMMARY = re.compile(
    r"Root Cause.*?rank +: (?P<rank>\d+).*?exitcode +: (?P<status>-?\d+)"
    r".*?traceback : (?P<said>.*?)\n=+",
    re.DOTALL,
)
_END_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAID_NOTHING = "To enable traceback"  # torch's advice, where a process left no error


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """While entered, SIGTERM and Ctrl-C end the command as an error would: what it began is undone.

    Raises:
        SystemExit: with 128 and the signal's number, after one line on stderr.
    """

    def end(number: int, frame: FrameType | None) -> None:
        for one in _END_SIGNALS:  # whoever asks again waits for what is being undone
            signal.signal(one, signal.SIG_IGN)
        name = signal.Signals(number).name
        print(f"bench: ended by {name}; there is no result", file=sys.stderr)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in _END_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def launch(
    script: Sequence[str], num_processes: int, num_threads: int, *, on_gpu: bool, log: Path
) -> None:
    """Run a script in so many processes, to its end; one process runs without torchrun.

    Args:
        script: path or `-m module`, and arguments.
        num_processes: of this machine.
        num_threads: of each process.
        on_gpu: else every process computes on the CPU.
        log: file that gets what they print.

    Raises:
        UserError: a process died; the others were ended.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    command = [sys.executable, *(launcher if num_processes > 1 else []), *script]
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    if not on_gpu:
        environment["ACCELERATE_USE_CPU"] = "1"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=_ending_with(os.getpid()),
        )
        try:
            status = process.wait()
        finally:
            _end(process)
    if status:
        said = log.read_text(encoding="utf-8", errors="replace")
        raise _error_of(said, status, num_processes)


def _ending_with(parent: int) -> Callable[[], None] | None:
    """What the launcher does first: ask the kernel for SIGTERM when this process ends."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # loaded here: after a fork as little as possible is done

    def ask() -> None:
        prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before we could ask
            os._exit(1)

    return ask


def _end(process: subprocess.Popen[bytes]) -> None:
    """Nothing to do when it has ended; torchrun that is told to end ends its processes."""
    process.terminate()
    try:
        process.wait(_GRACE_SEC)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _error_of(log: str, status: int, num_processes: int) -> UserError:
    """What torchrun's summary says of the first process that died; else the last line there is."""
    which, lines = "the process", log.strip().splitlines()
    if found := _SUMMARY.search(log):
        which, status = f"process {found['rank']}", int(found["status"])
        lines = found["said"].strip().splitlines()
    said = lines[-1].strip() if lines else ""
    remedy = ""
    if status < 0:
        how = f"was ended by {signal.Signals(-status).name}"
        if -status == signal.SIGKILL:
            remedy = "if the machine ran out of memory, a smaller --micro-batch-size"
    elif not said or said.startswith(_SAID_NOTHING):
        how = f"ended with status {status}"
    else:
        how = f"died: {said}"
    return UserError(f"scaling --processes {num_processes}", f"{which} {how}", remedy=remedy)
