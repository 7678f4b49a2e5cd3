"""The diffusion objective on cached latents: pure tensor maths, no host sync.

Shapes: B batch, C latent channels, h = w = resolution / 8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# DDPM as Stable Diffusion trains with it; also written beside the exported U-Net, so that sampling
# uses the schedule of training.
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


def sample_latents(moments: Tensor, posterior_noise: Tensor, scaling_factor: float) -> Tensor:
    """Draw latents from the VAE's posterior and bring them to unit scale.

    As diffusers' `DiagonalGaussianDistribution.sample` with its clamp, times the scaling factor.

    Args:
        moments: [B, 2C, h, w], mean and log-variance, unscaled; or [B, C, h, w], the mean alone,
            which is then taken as it is.
        posterior_noise: [B, C, h, w], standard normal.
        scaling_factor: of the VAE.

    Returns:
        latents [B, C, h, w] float32.
    """
    if moments.shape == posterior_noise.shape:
        return moments.float() * scaling_factor
    mean, logvar = moments.float().chunk(2, dim=1)
    std = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))
    return (mean + std * posterior_noise) * scaling_factor


class Objective:
    """Noise, target and loss of one prediction type.

    Args:
        prediction_type: `epsilon` or `v_prediction` (arXiv:2202.00512).
        min_snr_gamma: see `loss`; 0 weighs all timesteps alike.
        device: where the tables live.
    """

    def __init__(self, prediction_type: str, min_snr_gamma: float, device: torch.device) -> None:
        self.prediction_type = prediction_type
        first, last = SCHEDULER_CONFIG["beta_start"], SCHEDULER_CONFIG["beta_end"]
        self.num_train_timesteps: int = SCHEDULER_CONFIG["num_train_timesteps"]
        betas = torch.linspace(first**0.5, last**0.5, self.num_train_timesteps) ** 2
        alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        snr = alphas_cumprod / (1 - alphas_cumprod)
        self._signal = alphas_cumprod.sqrt().to(device)
        self._sigma = (1 - alphas_cumprod).sqrt().to(device)
        self._weight = _loss_weight(snr, prediction_type, min_snr_gamma).to(device)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`noisy_latents` (diffusers: `DDPMScheduler.add_noise`)."""
        signal, sigma = self._at(timesteps)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the U-Net is to predict (diffusers: `DDPMScheduler.get_velocity` for v)."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self._at(timesteps)
        return signal * noise - sigma * latents

    def model_timesteps(self, timesteps: Tensor) -> Tensor:
        """What the U-Net is told of a timestep."""
        return timesteps

    def loss(self, model_pred: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        """[B], mean squared error in float32, weighted by min-SNR (arXiv:2303.09556)."""
        per_sample = (model_pred.float() - target.float()).square().mean(dim=(1, 2, 3))
        return self._weight[timesteps] * per_sample

    def _at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, 1, 1, 1)
        return self._signal[timesteps].view(shape), self._sigma[timesteps].view(shape)


def _loss_weight(snr: Tensor, prediction_type: str, gamma: float) -> Tensor:
    if not gamma:
        return torch.ones_like(snr)
    divisor = snr if prediction_type == "epsilon" else snr + 1
    return snr.clamp(max=gamma) / divisor
