"""How the plain diffusers loop is timed: our reader, our figures, its own step.

The reader is ours in both, so that what differs is the step and not the wait for data.
"""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState

from benchmarks.result import gpu_state
from benchmarks.train_step.case import GPU_FIELDS, Case, Timing, Visit
from benchmarks.train_step.diffusers_loop import DiffusersLoop, accelerate_in, build_plain_unet
from shards.errors import UserError
from shards.stop import StopOnSignal
from train.attention import apply_attention
from train.config import TrainConfig
from train.flops import matmul_flops_per_sec, unet_flops
from train.interval import Interval, Row
from train.main import open_columns, open_latents
from train.precision import Precision, resolve_precision
from train.transfer import to_device
from train.unet import load_unet_config


def visit_baseline(case: Case, data: Path, run_dir: Path, timing: Timing) -> Visit:
    """The plain loop's `benchmarks.train_step.case.visit`.

    Args:
        case: what to run; its attention and compiling are the loop's own.
        data: latent dataset.
        run_dir: is not written to.
        timing: steps.

    Raises:
        UserError: it does not run here, or its loss is not finite.
        RuntimeError: among others, it does not fit.
    """
    began = time.perf_counter()
    config = case.train_config(data, run_dir, timing.num_steps)
    precision = resolve_precision(config.mixed_precision, PartialState().device)
    with contextlib.ExitStack() as held:
        held.enter_context(contextlib.redirect_stdout(io.StringIO()))
        accelerator = held.enter_context(accelerate_in(precision.name))
        run = _Run(case, config, accelerator, precision)
        held.callback(run.close)
        run.until(timing.warmup)
        setup_sec = time.perf_counter() - began
        ends = range(timing.warmup, timing.num_steps, timing.steps)
        blocks = [run.until(end + timing.steps) for end in ends]
        gpu = gpu_state(*GPU_FIELDS)
    assert (run.loop.average is not None) == (case.ema == "on")
    return Visit(
        device=run.device.type,
        attention=run.attention,
        setup_sec=setup_sec,
        blocks=blocks,
        flops_per_image=run.flops_per_image,
        matmul_flops_per_sec=run.matmul_flops_per_sec,
        gpu=gpu,
    )


class _Run:
    """The loop on its data, its average over all weights at once: that is fastest everywhere."""

    def __init__(
        self, case: Case, config: TrainConfig, accelerator: Accelerator, precision: Precision
    ) -> None:
        signals = StopOnSignal()  # Ctrl-C ends the benchmark
        reader = open_latents(config, open_columns(config), accelerator, signals).batches
        self.device, self._batch_size = accelerator.device, config.global_batch_size
        latent_size, num_tokens = reader.latent_shape[-1], len(reader.null_states)
        self.flops_per_image = unet_flops(load_unet_config(config.unet), latent_size, num_tokens)
        self.matmul_flops_per_sec = matmul_flops_per_sec(self.device, precision.dtype)
        channels_last = case.loop == "diffusers+channels-last"
        unet: Any = build_plain_unet(config, latent_size, channels_last=channels_last)
        unet.to(self.device)
        self.attention = apply_attention(  # either is what diffusers' own switch chooses
            unet,
            "xformers" if case.loop == "diffusers+xformers" else "sdpa",
            device=self.device,
            dtype=precision.dtype,
            latent_shape=reader.latent_shape,
            num_tokens=num_tokens,
        )
        self.loop = DiffusersLoop(
            unet, config, accelerator, reader.scaling_factor, foreach_ema=True
        )
        self._step = 0
        self._batches = reader.iter_batches(0, range(self._batch_size))

    def until(self, step: int) -> Row:
        """Train on; every step of this loop ends with the host waiting for the device.

        Raises:
            UserError: the loss is not finite.
        """
        interval, sum_of_losses = Interval(self._step, self.device), 0.0
        while self._step < step:
            with interval.waiting():
                batch = next(self._batches)
            moments = to_device(batch.moments, self.device)
            sum_of_losses += self.loop.step(moments, to_device(batch.states, self.device))
            self._step += 1
        row = interval.close(step, [sum_of_losses, 0.0, 0.0], self._batch_size)
        del row["train/grad_norm"]  # the example does not look at it
        if not math.isfinite(row["train/loss"]):
            raise UserError("the plain loop", f"the loss is not finite by step {step}")
        achieved = row["perf/images_per_sec"] * self.flops_per_image
        return {**row, "perf/mfu": achieved / self.matmul_flops_per_sec}

    def close(self) -> None:
        """Stop what reads ahead."""
        if isinstance(self._batches, Generator):
            self._batches.close()
