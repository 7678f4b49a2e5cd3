"""An arm in a process of its own: what libraries keep for the life of a process, it does not share.

cuDNN is why: it keeps the first plan that it ran for a shape and a memory format, whether that was
searched for or guessed (PyTorch, `aten/src/ATen/native/cudnn/Conv_v8.cpp`, `benchmark_cache`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from benchmarks.train_step.arm import Arm
from benchmarks.train_step.case import Case, open_arm
from shards.errors import UserError
from train.interval import Row

_FACTS = ("device", "attention", "plan", "flops_per_image", "matmul_flops_per_sec")


class RemoteArm:
    """As `benchmarks.train_step.arm.Arm` says; the process lives until it is closed.

    Args:
        case: what to run.
        data: latent dataset.
        run_dir: a new folder for metrics.jsonl.
        num_steps: that it will run at most.

    Raises:
        UserError: as `benchmarks.train_step.case.open_arm`, and so with any other error there.
        RuntimeError: also: the process died.
    """

    def __init__(self, case: Case, data: Path, run_dir: Path, num_steps: int) -> None:
        self.case = case
        context = get_context("spawn")  # CUDA does not survive a fork
        self._pool = ProcessPoolExecutor(1, context, initializer=_end_with_parent)
        try:
            facts = self._call(_open, case, data, run_dir, num_steps)
        except BaseException:
            self._pool.shutdown()
            raise
        self.device, self.attention, self.plan, *rates = facts
        self.flops_per_image, self.matmul_flops_per_sec = rates

    def run(self, num_steps: int) -> Row:
        """As `Arm` says; errors of the process are raised here.

        Raises:
            RuntimeError: also: the process died.
        """
        row: Row = self._call(_run, num_steps)
        return row

    def close(self) -> None:
        """End the process, and wait until it is gone."""
        try:
            with suppress(BrokenProcessPool):  # it died: there is nothing left to close
                self._pool.submit(_in_child, _close).result()
        finally:
            self._pool.shutdown()

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return self._pool.submit(_in_child, function, *args).result()
        except BrokenProcessPool as error:
            raise RuntimeError(f"the process of its own died that ran {self.case}") from error


# In the process of its own ------------------------------------------------------------------------

_opened: list[Arm] = []  # the one


def _open(case: Case, data: Path, run_dir: Path, num_steps: int) -> tuple[Any, ...]:
    arm = open_arm(case, data, run_dir, num_steps)
    _opened.append(arm)
    return tuple(getattr(arm, name) for name in _FACTS)


def _run(num_steps: int) -> Row:
    (arm,) = _opened
    return arm.run(num_steps)


def _close() -> None:
    _opened.pop().close()


def _in_child(function: Callable[..., Any], *args: Any) -> Any:
    """Call it; of other libraries' errors only the text travels, they need not survive pickling."""
    try:
        return function(*args)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if type(error).__module__ == "builtins":
            raise
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


def _end_with_parent() -> None:
    """See to it that a parent that is killed leaves no process on the device."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
