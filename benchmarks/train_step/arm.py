"""A training loop that is built and runs on when it is told to: ours, or the plain diffusers loop.

Several can be held at once and run in turns; what they set for the whole process, each sets anew.
"""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.train_step.case import Case, build_trainer
from shards.column import Json
from train.compilation import compile_errors
from train.interval import Row
from train.metrics import read_metrics


class Arm(Protocol):
    """A loop on its data.

    Attributes:
        case: what it runs.
        device: where.
        attention: the kernels that run.
        plan: what the trainer's switches came to; empty for the plain loop.
        flops_per_image: of the U-Net's forward and backward pass.
        matmul_flops_per_sec: of the device, in the precision of the case.
    """

    case: Case
    device: torch.device
    attention: str
    plan: Json
    flops_per_image: int
    matmul_flops_per_sec: float

    def run(self, num_steps: int) -> Row:
        """Train on; at the end the host waits for the device.

        Returns:
            the figures of these steps, as the trainer's metrics have them.

        Raises:
            UserError: the loss is not finite, or the step cannot be compiled.
        """
        ...

    def close(self) -> None:
        """Stop what reads ahead."""
        ...


class TrainerArm:
    """Our trainer; see `benchmarks.train_step.case.open_arm`.

    Attributes:
        trainer: in its own right, for checks.
    """

    def __init__(self, case: Case, data: Path, run_dir: Path, num_steps: int) -> None:
        self.case, self._run_dir = case, run_dir
        with _quiet():
            self.trainer = build_trainer(case.train_config(data, run_dir, num_steps))
        self.device = self.trainer.device
        self.attention = self.trainer.model.attention
        self.plan: Json = asdict(self.trainer.model.plan)
        facts = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        self.flops_per_image: int = facts["flops_per_image"]
        self.matmul_flops_per_sec: float = facts["matmul_flops_per_sec"]

    def run(self, num_steps: int) -> Row:
        """As `Arm` says."""
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = self.trainer.model.plan.conv_search
        with _quiet(), compile_errors():
            self.trainer.run(self.trainer.step + num_steps)
        assert (self.trainer.model.average is not None) == (self.case.ema == "on")
        return read_metrics(self._run_dir / "metrics.jsonl")[-1]

    def close(self) -> None:
        """As `Arm` says."""
        with _quiet():
            self.trainer.close()


def _quiet() -> contextlib.AbstractContextManager[object]:
    """Without the trainer's own lines."""
    return contextlib.redirect_stdout(io.StringIO())
