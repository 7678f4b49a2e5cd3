"""The diffusion objective on cached latents: pure tensor maths, no host sync.

Shapes: B batch, C latent channels, h = w = resolution / 8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.config import TrainConfig
from train.noise_schedule import SCHEDULER_CONFIG, build_noise_schedule


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
    """Noise, target and loss of one prediction type on one noise schedule.

    Args:
        config: `prediction_type` (epsilon, v_prediction of arXiv:2202.00512, sample: the latents
            themselves, or flow: the velocity of arXiv:2209.03003), `min_snr_gamma` (see `loss`),
            `zero_terminal_snr` and `snr_shift` (see `build_noise_schedule`).
        device: where the tables live.

    Raises:
        UserError: see `build_noise_schedule`.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        schedule = build_noise_schedule(config)
        self.prediction_type = config.prediction_type
        self.num_train_timesteps: int = SCHEDULER_CONFIG["num_train_timesteps"]
        self._scheduler_config = schedule.scheduler_config
        self._signal = schedule.signal.to(device)
        self._sigma = schedule.sigma.to(device)
        snr = (schedule.signal / schedule.sigma) ** 2
        self._weight = _loss_weight(snr, config.prediction_type, config.min_snr_gamma).to(device)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`noisy_latents` (diffusers: `DDPMScheduler.add_noise`; flow: `scale_noise`)."""
        signal, sigma = self._at(timesteps)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the U-Net is to predict (diffusers: `DDPMScheduler.get_velocity` for v)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        if self.prediction_type == "flow":
            return noise - latents
        signal, sigma = self._at(timesteps)
        return signal * noise - sigma * latents

    def model_timesteps(self, timesteps: Tensor) -> Tensor:
        """What the U-Net is told of a timestep: flow's samplers say sigma, in thousandths."""
        if self.prediction_type == "flow":
            return self._sigma[timesteps] * self.num_train_timesteps
        return timesteps

    def loss(self, model_pred: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        """[B], mean squared error in float32, weighted by min-SNR (arXiv:2303.09556).

        With both min-SNR and zero terminal SNR, the last timestep has SNR 0 and so weight 0.
        """
        per_sample = (model_pred.float() - target.float()).square().mean(dim=(1, 2, 3))
        return self._weight[timesteps] * per_sample

    def scheduler_config(self) -> dict[str, Any]:
        """The schedule of training as diffusers' `scheduler/scheduler_config.json`."""
        return dict(self._scheduler_config)

    def _at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, 1, 1, 1)
        return self._signal[timesteps].view(shape), self._sigma[timesteps].view(shape)


def _loss_weight(snr: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """min(SNR, gamma) on the error of the latents, carried over to that of what is predicted."""
    if not gamma:
        return torch.ones_like(snr)
    # epsilon's error is SNR times the latents', v's is SNR + 1 times
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    return snr.clamp(max=gamma) / divisor[prediction_type]
