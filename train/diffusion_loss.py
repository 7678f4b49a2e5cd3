"""From stored moments to the loss of each sample: what is compiled, and what DDP wraps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from train.objective import Objective, sample_latents


class DiffusionLoss(nn.Module):
    """The U-Net with the objective around it; one graph from moments to loss.

    Args:
        unet: diffusers `UNet2DConditionModel`.
        objective: noise, target and loss.
        null_states: [T, D], what takes a dropped caption's place.
        scaling_factor: of the VAE.
        dtype: what the U-Net computes in; float32 leaves its weights as they are.
        autocast: cast operator by operator; else the weights are of `dtype` themselves.
        channels_last: whether the U-Net is given its input in NHWC.
    """

    def __init__(
        self,
        unet: Any,
        objective: Objective,
        null_states: Tensor,
        scaling_factor: float,
        *,
        dtype: torch.dtype = torch.float32,
        autocast: bool = False,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.objective = objective
        self.scaling_factor = scaling_factor
        self.dtype, self.autocast = dtype, autocast
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.null_states = null_states.float()  # no buffer: DDP would send it round every step

    def forward(
        self,
        moments: Tensor,
        states: Tensor,
        posterior_noise: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        drop_caption: Tensor,
    ) -> Tensor:
        """The weighted loss of each sample.

        Args:
            moments: [B, 2C, h, w] or [B, C, h, w], unscaled.
            states: [B, T, D].
            posterior_noise: [B, C, h, w], see `sample_latents`.
            noise: [B, C, h, w], what is added.
            timesteps: [B] int64.
            drop_caption: [B] bool.

        Returns:
            [B] float32.
        """
        latents = sample_latents(moments, posterior_noise, self.scaling_factor)
        noisy_latents = self.objective.add_noise(latents, noise, timesteps)
        dropped = drop_caption.view(-1, 1, 1)
        encoder_hidden_states = torch.where(dropped, self.null_states, states.float())
        model_pred = self._predict(noisy_latents, timesteps, encoder_hidden_states)
        target = self.objective.target(latents, noise, timesteps)
        return self.objective.loss(model_pred, target, timesteps)

    def _predict(
        self, noisy_latents: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor
    ) -> Tensor:
        noisy_latents = noisy_latents.contiguous(memory_format=self.memory_format)
        model_timesteps = self.objective.model_timesteps(timesteps)
        if not self.autocast:
            noisy_latents = noisy_latents.to(self.dtype)
            encoder_hidden_states = encoder_hidden_states.to(self.dtype)
        with torch.autocast(noisy_latents.device.type, self.dtype, enabled=self.autocast):
            model_pred: Tensor = self.unet(
                noisy_latents, model_timesteps, encoder_hidden_states, return_dict=False
            )[0]
        return model_pred
