"""Noise schedules: how much of the latents and of the noise is left at each timestep.

Each comes with the diffusers scheduler configuration that describes it, which is written beside the
exported U-Net: sampling must use the schedule of training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shards.errors import UserError
from train.config import TrainConfig

# DDPM as Stable Diffusion trains with it.
SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}
# FlowMatchEulerDiscreteScheduler, flow's own, has no `scale_model_input`, which
# StableDiffusionPipeline calls; this one samples on the same sigmas.
_FLOW_SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": SCHEDULER_CONFIG["num_train_timesteps"],
    "prediction_type": "flow_prediction",
    "steps_offset": 1,
    "use_flow_sigmas": True,
}


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """`noisy_latents = signal * latents + sigma * noise`; T timesteps, from clean to noise.

    Args:
        signal: [T] float32.
        sigma: [T] float32.
        scheduler_config: the same for diffusers, as in a `scheduler_config.json`.
    """

    signal: Tensor
    sigma: Tensor
    scheduler_config: dict[str, Any]


def build_noise_schedule(config: TrainConfig) -> NoiseSchedule:
    """The schedule that a configuration asks for.

    Raises:
        UserError: `snr_shift` leaves nothing but latents or nothing but noise at some timestep.
    """
    if config.prediction_type == "flow":
        schedule = _rectified_flow(config.snr_shift)
    else:
        schedule = _variance_preserving(config)
    mixed = (schedule.signal > 0) & (schedule.sigma > 0)
    if not mixed[:-1].all():  # the last timestep may well be pure noise
        raise UserError(
            "--snr-shift",
            f"{config.snr_shift:g} is beyond what float32 can tell from 0 or infinity",
            remedy="--snr-shift 0.25 for twice the side, 4 for half of it",
        )
    return schedule


def _rectified_flow(snr_shift: float) -> NoiseSchedule:
    """Straight lines from latents to noise (arXiv:2209.03003), sigma from 1/T to 1.

    The signal-to-noise ratio is ((1 - sigma) / sigma)², so multiplying it by `snr_shift` multiplies
    sigma / (1 - sigma) by 1 / sqrt(snr_shift), which is the resolution shift of arXiv:2403.03206,
    section 5.3.2, and diffusers' `flow_shift` (`FlowMatchEulerDiscreteScheduler`: `shift`).
    """
    shift = snr_shift**-0.5
    num_timesteps = _FLOW_SCHEDULER_CONFIG["num_train_timesteps"]
    straight = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps
    sigma = (shift * straight / (1 + (shift - 1) * straight)).float()
    scheduler_config = {**_FLOW_SCHEDULER_CONFIG, "flow_shift": shift}
    return NoiseSchedule(signal=1 - sigma, sigma=sigma, scheduler_config=scheduler_config)


def _variance_preserving(config: TrainConfig) -> NoiseSchedule:
    """Stable Diffusion's betas; rescaled to end in pure noise, then shifted, where asked for.

    Float32 in diffusers' order of operations, so that `DDPMScheduler` comes to the same numbers.
    """
    scheduler_config = {**SCHEDULER_CONFIG, "prediction_type": config.prediction_type}
    first, last = SCHEDULER_CONFIG["beta_start"], SCHEDULER_CONFIG["beta_end"]
    num_timesteps = SCHEDULER_CONFIG["num_train_timesteps"]
    betas = torch.linspace(first**0.5, last**0.5, num_timesteps) ** 2
    if config.zero_terminal_snr:
        betas = _rescale_zero_terminal_snr(betas)
        # With trained_betas as well: rescaling once more changes nothing, and samplers need to know
        # that the last timestep has no signal to divide by.
        scheduler_config["rescale_betas_zero_snr"] = True
    if config.snr_shift != 1:
        betas = _shift_snr(betas, config.snr_shift)
        scheduler_config["trained_betas"] = betas.tolist()
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    return NoiseSchedule(
        signal=alphas_cumprod.sqrt(),
        sigma=(1 - alphas_cumprod).sqrt(),
        scheduler_config=scheduler_config,
    )


def _rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """arXiv:2305.08891, Algorithm 1 (diffusers: `rescale_zero_terminal_snr`)."""
    signal = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = signal[0], signal[-1]
    return _betas_of(((signal - last) * (first / (first - last))) ** 2)


def _shift_snr(betas: Tensor, factor: float) -> Tensor:
    """Multiply the signal-to-noise ratio of every timestep (arXiv:2301.11093)."""
    alphas_cumprod = torch.cumprod(1 - betas.double(), dim=0)
    snr = factor * alphas_cumprod / (1 - alphas_cumprod)
    return _betas_of(snr / (1 + snr)).float()


def _betas_of(alphas_cumprod: Tensor) -> Tensor:
    ratios = alphas_cumprod[1:] / alphas_cumprod[:-1]
    return 1 - torch.cat([alphas_cumprod[:1], ratios])
