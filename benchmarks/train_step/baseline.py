"""How the plain diffusers loop is timed: our reader, our figures, its own step.

The reader is ours in both, so that what differs is the step and not the wait for data.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from benchmarks.train_step.case import Case
from benchmarks.train_step.diffusers_loop import DiffusersLoop, accelerate_in, build_plain_unet
from shards.column import Json
from shards.errors import UserError
from shards.stop import StopOnSignal
from train.attention import apply_attention
from train.config import TrainConfig
from train.flops import matmul_flops_per_sec, unet_flops
from train.interval import Interval, Row
from train.main import open_columns, open_latents
from train.precision import resolve_precision
from train.transfer import to_device
from train.unet import load_unet_config


class PlainArm:
    """The plain loop, its average over all weights at once: that is fastest everywhere.

    See `benchmarks.train_step.arm.Arm`. The case's compiling and switches are not its.

    Args:
        case: what to run.
        data: latent dataset.
        run_dir: is not written to.
        num_steps: are not limited.

    Raises:
        UserError: it does not run here.
        RuntimeError: among others, it does not fit.
    """

    def __init__(self, case: Case, data: Path, run_dir: Path, num_steps: int) -> None:
        self.case, self.plan = case, Json()
        config = case.train_config(data, run_dir, num_steps)
        precision = resolve_precision(config.mixed_precision, PartialState().device)
        with contextlib.ExitStack() as held:
            with contextlib.redirect_stdout(io.StringIO()):
                accelerator = held.enter_context(accelerate_in(precision.name))
                self._build(config, accelerator, precision.dtype)
            self._held = held.pop_all()

    def _build(self, config: TrainConfig, accelerator: Accelerator, dtype: torch.dtype) -> None:
        signals = StopOnSignal()  # Ctrl-C ends the benchmark
        reader = open_latents(config, open_columns(config), accelerator, signals).batches
        self.device, self._batch_size = accelerator.device, config.global_batch_size
        latent_size, num_tokens = reader.latent_shape[-1], len(reader.null_states)
        self.flops_per_image = unet_flops(load_unet_config(config.unet), latent_size, num_tokens)
        self.matmul_flops_per_sec = matmul_flops_per_sec(self.device, dtype)
        channels_last = self.case.loop == "diffusers+channels-last"
        unet: Any = build_plain_unet(config, latent_size, channels_last=channels_last)
        unet.to(self.device)
        self.attention = apply_attention(  # either is what diffusers' own switch chooses
            unet,
            "xformers" if self.case.loop == "diffusers+xformers" else "sdpa",
            device=self.device,
            dtype=dtype,
            latent_shape=reader.latent_shape,
            num_tokens=num_tokens,
        )
        self.loop = DiffusersLoop(
            unet, config, accelerator, reader.scaling_factor, foreach_ema=True
        )
        assert (self.loop.average is not None) == (self.case.ema == "on")
        self._step = 0
        self._batches = reader.iter_batches(0, range(self._batch_size))

    def run(self, num_steps: int) -> Row:
        """Train on; every step of this loop ends with the host waiting for the device.

        Raises:
            UserError: the loss is not finite.
        """
        torch.backends.cudnn.benchmark = False  # the example does not ask for a search
        interval, sum_of_losses = Interval(self._step, self.device), 0.0
        for _ in range(num_steps):
            with interval.waiting():
                batch = next(self._batches)
            moments = to_device(batch.moments, self.device)
            sum_of_losses += self.loop.step(moments, to_device(batch.states, self.device))
            self._step += 1
        row = interval.close(self._step, [sum_of_losses, 0.0, 0.0], self._batch_size)
        del row["train/grad_norm"]  # the example does not look at it
        if not math.isfinite(row["train/loss"]):
            raise UserError("the plain loop", f"the loss is not finite by step {self._step}")
        achieved = row["perf/images_per_sec"] * self.flops_per_image
        return {**row, "perf/mfu": achieved / self.matmul_flops_per_sec}

    def close(self) -> None:
        """Stop what reads ahead; Accelerate is what it was."""
        if isinstance(self._batches, Generator):
            self._batches.close()
        self._held.close()
