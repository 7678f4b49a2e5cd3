"""Whether our trainer and the plain diffusers loop train alike: before their times are compared."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.train_step.case import Case, build_trainer
from benchmarks.train_step.data import columns_for, write_latents
from shards.errors import UserError
from train.config import TrainConfig
from train.metrics import read_metrics

NUM_STEPS = 4
_BATCH, _NUM_SAMPLES = 8, 64
# Float32 in two memory layouts, with TF32 on a GPU; a loop that leaves out anything of the
# objective or the update is off by more.
_TOLERANCE = 1e-3


def check_parity(preset: str, scratch: Path) -> float:
    """Train both from the same weights on the same samples and draws, and compare their losses.

    The preset's objective and optimizer in float32, but the tiny U-Net, so that it takes seconds;
    without what the example does not do: captions are not dropped. The learning rate is constant.

    Args:
        preset: name.
        scratch: folder that exists.

    Returns:
        the largest difference as a share of the loss.

    Raises:
        UserError: they differ.
    """
    config = parity_config(preset, scratch)
    ours, theirs = losses_of_both(config)
    difference = max(abs(a - b) / a for a, b in zip(ours, theirs, strict=True))
    if not difference <= _TOLERANCE:
        raise UserError(
            f"{preset}: the losses of the two loops",
            f"differ by up to {difference:.2%}: {ours} and {theirs}",
            wanted=f"at most {_TOLERANCE:.1%}: times of loops that train differently say nothing",
        )
    return difference


def parity_config(preset: str, scratch: Path) -> TrainConfig:
    """See `check_parity`; writes the samples."""
    case = Case(
        preset=preset,
        loop="latentmill",
        micro_batch=_BATCH,
        attention="sdpa",
        precision="no",
        compile="off",
        ema="on",
    )
    data, run_dir = scratch / f"parity-latents-{preset}", scratch / f"parity-run-{preset}"
    config = replace(
        case.train_config(data, run_dir, NUM_STEPS),
        unet="tiny",
        resolution=64,
        learning_rate=1e-3,  # enough for the losses to tell whether the updates are alike
        lr_schedule="constant",
        warmup_steps=0,
        caption_drop_prob=0.0,
        log_every=1,
    )
    write_latents(data, *columns_for(config), _NUM_SAMPLES, num_shards=1)
    return config


def losses_of_both(config: TrainConfig) -> tuple[list[float], list[float]]:
    """Of every step: our trainer's and the plain loop's."""
    from benchmarks.train_step.diffusers_loop import DiffusersLoop, build_plain_unet
    from train.objective import sample_latents
    from train.transfer import to_device

    theirs = []
    with contextlib.ExitStack() as held:
        held.enter_context(contextlib.redirect_stdout(io.StringIO()))
        trainer = build_trainer(config)
        held.callback(trainer.close)
        reader: Any = trainer.batches
        unet = build_plain_unet(config, reader.latent_shape[-1])
        loop = DiffusersLoop(unet, config, trainer.accelerator, reader.scaling_factor)
        for step in range(config.max_steps):
            batch, draws = reader.gather(step, trainer.positions), trainer.draw()
            moments = to_device(batch.moments, trainer.device)
            latents = sample_latents(moments, draws.posterior_noise, reader.scaling_factor)
            states = to_device(batch.states, trainer.device).float()
            theirs.append(loop.update(latents, states, draws.noise, draws.timesteps))
            trainer.run(step + 1)
    rows = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    return [row["train/loss"] for row in rows], theirs
