"""What a rung of the ladder must pass before its time counts."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.train_step.case import ALL_OFF, Case, is_out_of_memory
from benchmarks.train_step.same_function import (
    Reference,
    build_reference,
    compare,
    full_float32,
)
from benchmarks.train_step.short_training import ShortRun, judge, short_config, train_short
from shards.column import Json
from shards.errors import UserError

if TYPE_CHECKING:
    from train.trainer import Trainer

_SHOWN = 3
_DEVICE_ERROR = getattr(torch, "AcceleratorError", ())  # older releases have no name for it


class NotTheSameError(UserError):
    """A rung computes or learns something else than the plain step in float32."""


class Checks:
    """Both checks, with what they share from rung to rung.

    Args:
        scratch: folder for short runs.
        num_steps: of a short run.
    """

    def __init__(self, scratch: Path, num_steps: int) -> None:
        self._scratch, self._num_steps = scratch, num_steps
        self._seed = random.SystemRandom().getrandbits(32)  # fresh inputs, and found in the result
        self._reference: Reference | None = None
        self._short_runs: dict[Case, ShortRun] = {}

    def short_training(self, case: Case) -> Json:
        """See `benchmarks.train_step.short_training`; rungs of other batches share one run.

        Raises:
            UserError: it does not run here.
        """
        with full_float32():
            plain = self._train(_plain_float32(case))
        return judge(self._train(case), plain)

    def same_function(self, trainer: Trainer) -> list[Json]:
        """See `benchmarks.train_step.same_function`: as it is, and with poisoned memory.

        What is compiled is not poisoned: its buffers are not torch's to fill, and the compiler
        would compile it once more. Its kernels were, in the rungs before.
        """
        batch_size = trainer.micro_batch_size
        if self._reference is None or len(self._reference.moments) != batch_size:
            self._reference = None  # its memory first
            self._reference = build_reference(trainer, self._seed)
        found = [compare(trainer, self._reference, poison=False)]
        if trainer.model.plan.compile == "off" and not found[0]["problems"]:
            found.append(self._compare_poisoned(trainer))
        return found

    def _compare_poisoned(self, trainer: Trainer) -> Json:
        """What has no deterministic algorithm may refuse to run: that is no fault of the rung."""
        assert self._reference
        try:
            return compare(trainer, self._reference, poison=True)
        except RuntimeError as error:
            if is_out_of_memory(error) or isinstance(error, _DEVICE_ERROR):
                raise  # the rung's own fault
            reason = next(iter(str(error).splitlines()), "")
            return {"poisoned": True, "not_run": reason, "problems": []}

    def _train(self, case: Case) -> ShortRun:
        case = replace(case, micro_batch=1)  # the short run has a batch of its own
        if case not in self._short_runs:
            name = f"short-{len(self._short_runs)}"
            config = short_config(case, self._scratch, name)
            self._short_runs[case] = train_short(config, self._num_steps)
        return self._short_runs[case]


def refuse_problems(found: list[Json]) -> None:
    """Raise what checks found.

    Raises:
        NotTheSameError: any of them has problems.
    """
    problems = [problem for each in found for problem in each["problems"]]
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise NotTheSameError(
            "not what diffusers' U-Net computes in float32", "; ".join(problems[:_SHOWN]) + more
        )


def _plain_float32(case: Case) -> Case:
    return replace(
        case,
        attention="sdpa",
        precision="no",
        compile="off",
        **ALL_OFF,
    )
