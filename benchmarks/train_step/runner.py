"""Arms that are warm and take turns: a block of this, a block of that."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.train_step.arm import Arm
from benchmarks.train_step.case import Case, open_arm, release_memory
from benchmarks.train_step.remote_arm import RemoteArm
from train.interval import Row
from train.step_graph import WARM_UP_STEPS

Check = Callable[[Any], None]  # of an `Arm`; those of checks are our trainer's

_BLOCK_SEC = 1.2  # of a timed block; many short ones tell more of the spread than few long ones
_TRIAL_STEPS = 2  # that say how many steps a block has
_MAX_STEPS = 1_000_000  # of an arm's run
# Before a whole step is recorded: one without an average, then those that `StepGraph` runs first.
_MIN_WARM_UP = 1 + WARM_UP_STEPS + 1


@dataclass
class Runner:
    """An arm that has warmed up.

    Args:
        arm: the loop.
        setup_sec: building, checking, choosing kernels, compiling, warming up.
        peak_mem_gib: of its warm-up and of all that it holds, beside other arms; on a CPU of the
            whole process so far.
        block_steps: steps of a timed block.
    """

    arm: Arm
    setup_sec: float
    peak_mem_gib: float
    block_steps: int


def open_runner(
    case: Case,
    data: Path,
    run_dir: Path,
    check: Check | None,
    *,
    is_apart: bool,
    warmup: int,
    max_block_steps: int,
) -> Runner:
    """Build an arm, have it checked, and warm it up.

    Args:
        case: what to run.
        data: latent dataset.
        run_dir: a new folder.
        check: is called before the warm-up, and compiles what is to be compiled.
        is_apart: in a process of its own, where there is nothing to check; its start is setup.
        warmup: steps at least.
        max_block_steps: see `Runner`.

    Raises:
        Exception: whatever building, checking or running it raises; then it is closed.
    """
    began, held_bytes = time.perf_counter(), 0 if is_apart else _allocated_bytes()
    arm = (RemoteArm if is_apart else open_arm)(case, data, run_dir, _MAX_STEPS)
    try:
        if check:
            check(arm)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        arm.run(max(warmup, _MIN_WARM_UP))
        setup_sec = time.perf_counter() - began
        row = arm.run(_TRIAL_STEPS)
        steps = int(_BLOCK_SEC * row["perf/iters_per_sec"])
        peak_mem_gib = row["perf/peak_mem_gib"] - held_bytes / 2**30
    except BaseException:
        arm.close()
        raise
    return Runner(arm, setup_sec, peak_mem_gib, min(max(steps, 1), max_block_steps))


def take_turns(runners: Sequence[Runner], blocks: int) -> list[list[Row]]:
    """A block of each, again and again.

    Args:
        runners: one, or several that differ in what they run alone.
        blocks: of each.

    Returns:
        the rows of each runner's blocks.
    """
    rows: list[list[Row]] = [[] for _ in runners]
    for _ in range(blocks):
        for runner, found in zip(runners, rows, strict=True):
            found.append(runner.arm.run(runner.block_steps))
    return rows


class Runners:
    """Those that are alive, by name.

    Args:
        data: latent dataset.
        scratch: folder for their runs.
        warmup: see `open_runner`.
        max_block_steps: the same.
    """

    def __init__(self, data: Path, scratch: Path, *, warmup: int, max_block_steps: int) -> None:
        self._data, self._scratch = data, scratch
        self._steps = {"warmup": warmup, "max_block_steps": max_block_steps}
        self._alive: dict[str, Runner] = {}
        self._num_opened = 0

    def open(
        self, name: str, case: Case, check: Check | None = None, *, is_apart: bool = False
    ) -> Runner:
        """The runner of this name, made if it is not alive; see `open_runner`."""
        if runner := self._alive.get(name):
            runner.arm.run(
                1
            )  # closing another gave back what it works in: to allocate is not timed
        else:
            self._num_opened += 1
            run_dir = self._scratch / f"run-{self._num_opened}"
            self._alive[name] = open_runner(
                case, self._data, run_dir, check, is_apart=is_apart, **self._steps
            )
        return self._alive[name]

    def rename(self, name: str, new: str) -> None:
        """Go on with a runner under another name, if it is alive."""
        if runner := self._alive.pop(name, None):
            self._alive[new] = runner

    def close(self, *names: str) -> None:
        """Close those of these names that are alive, and give their memory back."""
        self._drop(*names)  # apart: a variable that still holds one would keep its memory
        # Whoever is alive and compiled would be compiled once more.
        compiled = any(runner.arm.case.compile != "off" for runner in self._alive.values())
        release_memory(forget_graphs=not compiled)

    def _drop(self, *names: str) -> None:
        for name in names:
            if runner := self._alive.pop(name, None):
                runner.arm.close()

    def close_all(self) -> None:
        """The same with all of them."""
        self.close(*self._alive)


def _allocated_bytes() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
