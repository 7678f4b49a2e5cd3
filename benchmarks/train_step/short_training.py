"""Whether a trainer learns as it should: 200 steps of the tiny U-Net, and two of them by numbers.

Losses are held to those of the plain step in float32, on the same samples with the same draws. They
hardly tell a wrong average, clipping or decay. So two updates are recomputed in float64 from what
was there before: masters, AdamW's moments, low-precision copies and average, weight by weight.
"""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.train_step.case import Case, build_trainer
from benchmarks.train_step.data import columns_for, write_latents
from benchmarks.train_step.same_function import finite, gradients_of, is_exact
from shards.column import Json
from train.checkpoint import optimizer_tensors
from train.compilation import compile_errors
from train.config import TrainConfig
from train.metrics import read_metrics
from train.transfer import to_device

if TYPE_CHECKING:
    from train.trainer import Trainer

NUM_STEPS = 200
WINDOW = 20  # steps whose mean losses are compared
_RECOMPUTED_STEPS = (7, 150)  # by the first one a whole step has been recorded, where it is to be
_BATCH, _NUM_SAMPLES = 4, 64
# What the tiny U-Net's gradients exceed at most steps, so that they are clipped; and an average
# that moves by far more than float32 rounds.
_MAX_GRAD_NORM, _EMA_DECAY = 0.1, 0.99
# Difference of the mean losses of a window over the plain step's: of the first window, and of every
# later one, when rounding has led elsewhere. Seen on a CPU in bfloat16: 0.1% and 1.3%; in float32
# 0.0001% and 0.004%.
_LOW_LOSS_BANDS, _FLOAT32_LOSS_BANDS = (5e-3, 5e-2), (1e-4, 5e-3)
# A recomputed weight, average or moment: difference over how far it moved. Moments come from
# gradients, which a GPU does not compute twice alike.
_MOVED_BAND, _MOMENT_BAND = 1e-2, 0.2


def short_config(case: Case, scratch: Path, name: str) -> TrainConfig:
    """The case's switches and the preset's objective and optimizer on the tiny U-Net.

    Args:
        case: what to run.
        scratch: folder that exists; the samples are written there on first use.
        name: of the run's folder, a new one.
    """
    data = scratch / f"short-latents-{case.preset}"
    config = replace(
        replace(case, micro_batch=_BATCH, ema="on").train_config(data, scratch / name, NUM_STEPS),
        unet="tiny",
        resolution=64,
        learning_rate=1e-3,
        lr_schedule="constant",
        warmup_steps=0,
        max_grad_norm=_MAX_GRAD_NORM,
        ema_decay=_EMA_DECAY,
        log_every=1,
    )
    if not data.exists():
        write_latents(data, *columns_for(config), _NUM_SAMPLES, num_shards=1)
    return config


@dataclass(frozen=True)
class ShortRun:
    """What a short run came to.

    Args:
        losses: of every step.
        update_fracs: how far the recomputed updates are off, the worst of each kind; see
            `recompute_update`.
        is_exact: all of it was computed in float32.
    """

    losses: list[float]
    update_fracs: dict[str, float]
    is_exact: bool


def train_short(config: TrainConfig, num_steps: int) -> ShortRun:
    """Train, and recompute some of the updates.

    Args:
        config: of `short_config`.
        num_steps: at least `MIN_CHECK_STEPS`, at most its own.

    Raises:
        UserError: it does not run here, or a loss is not finite.
    """
    with contextlib.redirect_stdout(io.StringIO()), compile_errors():
        trainer = build_trainer(config)
        try:
            recomputed = []
            for step in (step for step in _RECOMPUTED_STEPS if step < num_steps):
                trainer.run(step)
                recomputed.append(recompute_update(trainer))
            trainer.run(num_steps)
        finally:
            trainer.close()
    rows = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    return ShortRun(
        losses=[row["train/loss"] for row in rows],
        update_fracs={kind: max(each[kind] for each in recomputed) for kind in recomputed[0]},
        is_exact=is_exact(trainer.model.precision.dtype, trainer.device),
    )


def judge(run: ShortRun, plain: ShortRun) -> Json:
    """Hold a run to the plain one in float32.

    Returns:
        the figures, the bounds and `problems`, a text for each bound that does not hold.
    """
    ours, theirs = _windows(run.losses), _windows(plain.losses)
    loss_fracs = [float(frac) for frac in np.abs(ours / theirs - 1)]
    first_band, later_band = _FLOAT32_LOSS_BANDS if run.is_exact else _LOW_LOSS_BANDS
    problems = []
    for number, frac in enumerate(loss_fracs):
        if not frac <= (later_band if number else first_band):
            steps = f"{number * WINDOW} to {(number + 1) * WINDOW}"
            problems.append(f"mean loss of steps {steps} differs by {frac:.2%}")
    for kind, frac in run.update_fracs.items():
        if not frac <= (_MOMENT_BAND if kind.startswith("exp_avg") else _MOVED_BAND):
            problems.append(f"{kind} of an update off by {frac:.2%} of how far it moved")
    return {
        "num_steps": len(run.losses),
        "loss_frac": finite(max(loss_fracs)),
        "loss_fracs": [finite(frac) for frac in loss_fracs],
        "loss_bands": {"first": first_band, "later": later_band},
        "update_fracs": {kind: finite(frac) for kind, frac in run.update_fracs.items()},
        "update_bands": {"moments": _MOMENT_BAND, "others": _MOVED_BAND},
        "losses": [finite(loss) for loss in ours.tolist()],
        "plain_losses": [finite(loss) for loss in theirs.tolist()],
        "problems": problems,
    }


def _windows(losses: list[float]) -> np.ndarray:
    values = np.asarray(losses)
    whole = len(values) // WINDOW * WINDOW
    return np.asarray(values[:whole].reshape(-1, WINDOW).mean(axis=1))


# One update, recomputed ---------------------------------------------------------------------------


def recompute_update(trainer: Trainer) -> dict[str, float]:
    """Let a trainer take a step and compute in float64 what it should have done.

    Args:
        trainer: past its first step, with an average, in one micro-batch.

    Returns:
        `exp_avg`, `exp_avg_sq`, `weight`, `copy`, `average`: of the worst weight the size of the
        difference, over how far it was to move; infinite if that is not finite.
    """
    config, model = trainer.config, trainer.model
    batch: Any = trainer.batches
    batch = batch.gather(trainer.step, trainer.positions)
    moments, states = (to_device(each, trainer.device) for each in (batch.moments, batch.states))
    _, gradients = gradients_of(trainer, moments, states, trainer.draw())
    gradients = {name: gradient.detach().clone() for name, gradient in gradients.items()}
    before = _state_of(trainer)
    trainer.run(trainer.step + 1)
    norm = math.hypot(*(gradient.double().norm().item() for gradient in gradients.values()))
    divisor = max(1.0, norm / config.max_grad_norm) if config.max_grad_norm else 1.0
    worst = dict.fromkeys(("exp_avg", "exp_avg_sq", "weight", "copy", "average"), 0.0)
    for name, after in _state_of(trainer).items():
        gradient = gradients[name].double() / divisor
        expected = _expected(before[name], after, gradient, config, trainer.step)
        for kind, (origin, wanted) in expected.items():
            worst[kind] = max(worst[kind], _off_by(after[kind], origin, wanted))
        rounded = after["weight"].to(model.weights.in_module[name].dtype)
        if not torch.equal(rounded, model.weights.in_module[name]):
            worst["copy"] = math.inf
    return worst


def _state_of(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """Copies in float64 of all that an update changes, weight by weight."""
    model = trainer.model
    assert model.average is not None
    moments = optimizer_tensors(model.update.optimizer, list(model.weights.tensors))
    return {
        name: {
            "weight": weight.double(),
            "exp_avg": moments[f"{name}.exp_avg"].double(),
            "exp_avg_sq": moments[f"{name}.exp_avg_sq"].double(),
            "average": model.average.weights[name].double(),
        }
        for name, weight in model.weights.tensors.items()
    }


def _expected(
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    gradient: Tensor,
    config: TrainConfig,
    num_updates: int,
) -> dict[str, tuple[Tensor, Tensor]]:
    """From where to where each part of one weight's state was to move.

    AdamW as torch's (arXiv:1711.05101). The weight is computed from the moments that were found,
    the average from the weight, so that each is judged by itself.
    """
    beta1, beta2 = config.adam_betas
    rate = config.learning_rate_at(num_updates - 1)
    first = after["exp_avg"] / (1 - beta1**num_updates)
    second = after["exp_avg_sq"] / (1 - beta2**num_updates)
    weight, average = before["weight"], before["average"]
    decayed = weight * (1 - rate * config.weight_decay)
    decay = config.ema_decay**config.ema_every
    moved = {
        "exp_avg": (beta1 * before["exp_avg"], (1 - beta1) * gradient),
        "exp_avg_sq": (beta2 * before["exp_avg_sq"], (1 - beta2) * gradient.square()),
        "weight": (weight, decayed - rate * first / (second.sqrt() + config.adam_eps) - weight),
        "average": (average, (1 - decay) * (after["weight"] - average)),
    }
    return {kind: (origin, origin + by) for kind, (origin, by) in moved.items()}


def _off_by(found: Tensor, origin: Tensor, wanted: Tensor) -> float:
    frac = ((found - wanted).norm() / (wanted - origin).norm()).item()
    return frac if math.isfinite(frac) else math.inf
