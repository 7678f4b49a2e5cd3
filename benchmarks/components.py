"""What the parts of a training step take, each alone, one after another, all of a batch.

In the loop they overlap: decoding with everything on CPU threads, on a GPU also the host's part of
the encoders with what the device still has to do. So the parts of an arm may sum up to more than
its step takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.result import spread

if TYPE_CHECKING:
    import torch

    from benchmarks.arms import Arms
    from precompute.online import OnlineBatches
    from shards.batch import LatentBatch
    from train.trainer import Trainer


def measure_components(arms: Arms, repeats: int) -> dict[str, Any]:
    """Time each part, in turns.

    Args:
        arms: after their blocks: everything is warm, and compiled.
        repeats: rounds over all parts.

    Returns:
        for each part `samples` in seconds a step and their spread as `sec_per_step`.
    """
    trainer = next(iter(arms.trainers.values()))
    parts = _update_parts(trainer, _a_batch(arms))
    if watched := arms.sources.get("online"):
        parts |= _encoder_parts(watched.source, trainer)  # type: ignore[arg-type]
    for run in parts.values():
        run()
    samples: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats):
        for name, run in parts.items():
            _synchronize(trainer.device)
            began = time.perf_counter()
            run()
            _synchronize(trainer.device)
            samples[name].append(time.perf_counter() - began)
    return {
        name: {"sec_per_step": spread(found), "samples": found} for name, found in samples.items()
    }


def _a_batch(arms: Arms) -> LatentBatch:
    """Of any arm: they differ by rounding alone."""
    name, trainer = next(iter(arms.trainers.items()))
    return next(arms.sources[name].iter_batches(0, trainer.positions))


def _update_parts(trainer: Trainer, batch: LatentBatch) -> dict[str, Callable[[], object]]:
    """Forward and backward, the optimizer, the average: of the trainer's own model."""
    from train.transfer import to_device

    model, update = trainer.model, trainer.model.update
    moments, states = (to_device(x, trainer.device).clone() for x in (batch.moments, batch.states))
    draws = trainer.draw()
    losses, accumulated = moments.new_zeros(len(moments)), False

    def unet() -> None:
        nonlocal losses, accumulated
        losses, accumulated = model.backward(moments, states, draws)

    def optimizer() -> None:
        update.begin(trainer.step)
        update.advance(losses.mean(), accumulated=accumulated, moves_average=averages_at_once)

    averages_at_once = update.is_fused and model.average is not None
    parts: dict[str, Callable[[], object]] = {"unet": unet, "optimizer": optimizer}
    if model.average and not averages_at_once:
        parts["ema"] = model.average.update
    return parts


def _encoder_parts(online: OnlineBatches, trainer: Trainer) -> dict[str, Callable[[], object]]:
    """Reading and decoding on all threads; the two encoders."""
    images = online.decode(0, trainer.positions)
    squares, captions = [i.square for i in images], [i.caption for i in images]
    return {
        "decode": lambda: online.decode(0, trainer.positions),
        "vae": lambda: online.encoders.encode_images(squares),
        "text": lambda: online.encoders.encode_texts(captions),
    }


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
