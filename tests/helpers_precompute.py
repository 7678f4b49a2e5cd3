"""Jobs of stage 1 in processes that can be killed: forked, with the libraries loaded already.

Their workers are forked too, so a worker begins in a tenth of a second and a kill at a random
moment hits the work and not the imports.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from conftest import image_bytes, sample_members, smooth_image, write_tar

import precompute.local_engine
from precompute.__main__ import main
from precompute.config import PrecomputeConfig
from precompute.job import precompute as precompute_job

NUM_SHARDS, SHARD_LENGTH = 24, 6
GONE_SEC = 5.0  # the processes of a killed job, at the latest

Patch = Callable[[], None]


def build_small_shards(folder: Path, num_shards: int = NUM_SHARDS) -> Path:
    """Tars of a few pictures; the third of each is broken."""
    rng = np.random.default_rng(0)
    for shard in range(num_shards):
        members: list[tuple[str, bytes]] = []
        for number in range(SHARD_LENGTH):
            data = image_bytes(smooth_image(rng, 40, 36), "JPEG") if number != 2 else b"broken"
            members += sample_members(f"{shard:05d}{number:03d}", data, f"a lion {number // 2}")
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


def arguments(images: Path | str, model: Path, out: Path, *more: str) -> list[str]:
    """Of a quick job on a CPU."""
    shards = images if isinstance(images, str) else f"{images}/*.tar"
    fixed = ["--resolutions=32", "--device=cpu", "--batch-size=4", "--max-drop-frac=0.5"]
    return [f"--shards={shards}", f"--model={model}", f"--out={out}", *fixed, *more]


def run_here(images: Path, model: Path, out: Path, **options: Any) -> None:
    """The same job in this process, undisturbed."""
    fixed: dict[str, Any] = {"resolutions": "32", "device": "cpu", "batch_size": 4}
    places = {"shards": f"{images}/*.tar", "model": str(model), "out": str(out)}
    precompute_job(PrecomputeConfig(**fixed | places | options))


@dataclass
class ForkedJob:
    """A job in a process group of its own."""

    process: BaseProcess
    output: Path

    @property
    def group(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def processes(self) -> list[psutil.Process]:
        """All that live of its group."""
        return [p for p in psutil.process_iter() if _is_alive_in(p, self.group)]

    def workers(self) -> list[psutil.Process]:
        return [process for process in self.processes() if process.pid != self.group]

    def send(self, number: int) -> None:
        os.kill(self.group, number)

    def send_to_group(self, number: int) -> None:
        os.killpg(self.group, number)

    def end(self, timeout_sec: float = 60.0) -> tuple[int, str]:
        """Exit status and output; nothing of it may be left soon after."""
        self.process.join(timeout_sec)
        status = self.process.exitcode
        if status is None:
            self.send_to_group(signal.SIGKILL)
            raise AssertionError(f"it never ended:\n{self.output.read_text()}")
        deadline = time.monotonic() + GONE_SEC
        while left := self.processes():
            assert time.monotonic() < deadline, left
            time.sleep(0.02)
        return status, self.output.read_text()


def _is_alive_in(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def start_job(argv: list[str], output: Path, patch: Patch = lambda: None) -> ForkedJob:
    """`python -m precompute <argv>` in a forked process, after `patch` has changed its code."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(argv, output, patch))
    process.start()
    assert process.pid is not None
    while True:  # until it leads a group
        try:
            if os.getpgid(process.pid) == process.pid:
                return ForkedJob(process, output)
        except ProcessLookupError:
            return ForkedJob(process, output)


def _run(argv: list[str], output: Path, patch: Patch) -> None:
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    file = output.open("w", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    fork = multiprocessing.get_context("fork")
    precompute.local_engine.multiprocessing.get_context = lambda _: fork  # type: ignore
    patch()
    main(argv)


def wait_until(condition: Callable[[], object], timeout_sec: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_sec
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.01)


def num_finished(out: Path) -> int:
    """Shards that count."""
    return len(list(out.glob("ledger/*.json")))
