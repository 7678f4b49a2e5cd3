"""Samplers by name: each, given a perfect U-Net, arrives at what that U-Net knows."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from evaluate.schedulers import SCHEDULERS, build_scheduler
from shards.errors import UserError
from train.config import TrainConfig
from train.noise_schedule import NoiseSchedule, build_noise_schedule

TRAININGS: dict[str, dict[str, Any]] = {
    "epsilon": {"prediction_type": "epsilon"},
    "v": {"prediction_type": "v_prediction"},
    "v zero-snr": {"prediction_type": "v_prediction", "zero_terminal_snr": True},
    "v zero-snr shifted": {
        "prediction_type": "v_prediction",
        "zero_terminal_snr": True,
        "snr_shift": 0.25,
    },
    "sample": {"prediction_type": "sample"},
    "sample zero-snr": {"prediction_type": "sample", "zero_terminal_snr": True},
    "epsilon shifted": {"prediction_type": "epsilon", "snr_shift": 0.25},
    "flow": {"prediction_type": "flow"},
    "flow shifted": {"prediction_type": "flow", "snr_shift": 0.25},
}
REFUSED = {
    *((name, "flow") for name in SCHEDULERS if name not in ("dpm++", "unipc")),
    *((name, "flow shifted") for name in SCHEDULERS if name not in ("dpm++", "unipc")),
    *((name, kind) for name in ("euler-a", "pndm") for kind in ("sample", "sample zero-snr")),
    *((name, kind) for name in ("heun", "pndm") for kind in TRAININGS if "zero-snr" in kind),
}
# SD's own PNDM ends at the first timestep, whose noise it leaves in; flow steps meet timesteps that
# are rounded to whole numbers.
TOLERANCES = {"pndm": 0.08, "flow": 5e-3}


def signal_at(schedule: NoiseSchedule, timestep: float) -> float:
    """Of training, between its whole timesteps on a straight line."""
    low = int(timestep)
    high = min(low + 1, len(schedule.signal) - 1)
    share = timestep - low
    return float(schedule.signal[low]) * (1 - share) + float(schedule.signal[high]) * share


def prediction(
    config: TrainConfig, schedule: NoiseSchedule, noisy: torch.Tensor, t: float, x0: torch.Tensor
) -> torch.Tensor:
    """What a U-Net that knows `x0` by heart was trained to say."""
    if config.prediction_type == "flow":
        signal, sigma = 1 - t / 1000, t / 1000
    else:
        signal = signal_at(schedule, t)
        sigma = (1 - signal**2) ** 0.5
    noise = (noisy - signal * x0) / sigma
    return {
        "epsilon": noise,
        "v_prediction": signal * noise - sigma * x0,
        "sample": x0,
        "flow": noise - x0,
    }[config.prediction_type]


@pytest.mark.parametrize("num_steps", [1, 25])
@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_perfect_unet_is_sampled_to_what_it_knows_or_the_sampler_is_refused(
    name, training, num_steps
):
    config = TrainConfig(**TRAININGS[training])
    schedule = build_noise_schedule(config)
    if (name, training) in REFUSED:
        with pytest.raises(UserError, match=rf"{name} cannot sample .*wanted one of dpm\+\+"):
            build_scheduler(name, schedule.scheduler_config)
        return
    scheduler = build_scheduler(name, schedule.scheduler_config)
    scheduler.set_timesteps(num_steps)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1, 4, 8, 8, generator=generator, dtype=torch.float64)
    latents = noise * float(scheduler.init_noise_sigma)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if takes_generator else {}
    for timestep in scheduler.timesteps:
        noisy = scheduler.scale_model_input(latents, timestep)
        said = prediction(config, schedule, noisy, float(timestep), x0)
        latents = scheduler.step(said, timestep, latents, **options).prev_sample
    error = float((latents - x0).norm() / x0.norm())
    assert error < TOLERANCES.get(name, TOLERANCES.get(config.prediction_type, 1e-3))


def test_a_name_that_is_none_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"'k-diffusion'; wanted one of dpm\+\+, ddim"):
        build_scheduler("k-diffusion", {})


def test_each_scheduler_is_a_new_one():
    one, other = (build_scheduler("euler", {}) for _ in range(2))
    one.set_timesteps(3)
    assert one is not other
    assert len(other.timesteps) != 3
