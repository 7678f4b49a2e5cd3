"""The plain text-to-image loop of diffusers, which most people start from: what ours is held to.

A step of diffusers' `examples/text_to_image/train_text_to_image.py` on one process, written against
the public interfaces that the example uses. What its frozen encoders would give comes from the
shards instead, so that steps are compared, not encoders.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from torch import Tensor
from torch.nn import functional as F

from shards.errors import UserError
from train.config import TrainConfig
from train.noise_schedule import build_noise_schedule
from train.unet import build_unet, load_unet_config

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@contextmanager
def accelerate_in(mixed_precision: str) -> Iterator[Accelerator]:
    """Accelerate with a precision of its own, which the example leaves to it and our trainer not.

    A process has one state of Accelerate, and its precision cannot be changed. So it is made anew,
    and put back afterwards. What an accelerator from before has prepared runs inside as well; it
    must prepare nothing there, and this one nothing afterwards.

    Args:
        mixed_precision: `no`, `fp16` or `bf16`.

    Raises:
        UserError: Accelerate does not have it here.
    """
    before = dict(AcceleratorState._shared_state)
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision)
        if mixed_precision != "no" and not accelerator.native_amp:
            where = f"Accelerate on {accelerator.device.type}"
            raise UserError(where, f"leaves {mixed_precision} out without a word")
        yield accelerator
    finally:
        AcceleratorState._reset_state()
        AcceleratorState._shared_state.update(before)


def build_plain_unet(
    config: TrainConfig, latent_size: int, *, channels_last: bool = False
) -> UNet2DConditionModel:
    """The U-Net that our trainer starts from, float32, in the memory layout that diffusers uses.

    Args:
        config: of the run; its U-Net and seed.
        latent_size: h = w.
        channels_last: as our trainer's.
    """
    unet = build_unet(load_unet_config(config.unet), latent_size, config.seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return unet.to(memory_format=layout)


class DiffusersLoop:
    """A run of the example on one process.

    Args:
        unet: float32.
        config: objective, optimizer, clipping and average. Captions are not dropped and the
            learning rate is constant after its warm-up, as the example has it.
        accelerator: with the precision to compute in.
        scaling_factor: of the VAE.
        foreach: AdamW's; True on all weights at once, as torch chooses by itself on a GPU alone.
        foreach_ema: the example's flag of that name, which it leaves off.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        config: TrainConfig,
        accelerator: Accelerator,
        scaling_factor: float,
        *,
        foreach: bool | None = None,
        foreach_ema: bool = False,
    ) -> None:
        assert config.prediction_type in ("epsilon", "v_prediction"), "the example knows no other"
        self._config, self._accelerator = config, accelerator
        self._scaling_factor = scaling_factor
        self._dtype = _DTYPES.get(accelerator.mixed_precision, torch.float32)
        self._noise_scheduler = DDPMScheduler.from_config(
            build_noise_schedule(config).scheduler_config
        )
        unet.to(accelerator.device)
        optimizer = torch.optim.AdamW(
            unet.parameters(),
            lr=config.learning_rate,
            betas=config.adam_betas,
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            foreach=foreach,
        )
        lr_scheduler = get_scheduler(
            "constant_with_warmup", optimizer, num_warmup_steps=config.warmup_steps
        )
        self.average: EMAModel | None = None
        if config.ema_decay:
            self.average = EMAModel(unet.parameters(), decay=config.ema_decay, foreach=foreach_ema)
        self.unet: Any
        self.unet, self._optimizer, self._lr_scheduler = accelerator.prepare(
            unet, optimizer, lr_scheduler
        )

    def step(self, moments: Tensor, encoder_hidden_states: Tensor) -> float:
        """One update, as the example goes on once its encoders have run.

        Args:
            moments: [B, 2C, h, w] of the VAE's posterior, on the device, unscaled.
            encoder_hidden_states: [B, T, D], the same.

        Returns:
            the loss, for which the host waits.
        """
        latents = DiagonalGaussianDistribution(moments.to(self._dtype)).sample()
        states = encoder_hidden_states.to(self._dtype)  # both encoders compute in that precision
        return self.step_on_latents(latents * self._scaling_factor, states)

    def step_on_latents(self, latents: Tensor, encoder_hidden_states: Tensor) -> float:
        """The same from latents [B, C, h, w], scaled."""
        noise = torch.randn_like(latents)
        num_train_timesteps = self._noise_scheduler.config.num_train_timesteps
        timesteps = torch.randint(num_train_timesteps, (len(latents),), device=latents.device)
        return self.update(latents, encoder_hidden_states, noise, timesteps)

    def update(
        self, latents: Tensor, encoder_hidden_states: Tensor, noise: Tensor, timesteps: Tensor
    ) -> float:
        """The same with noise [B, C, h, w] and timesteps [B] that were drawn elsewhere."""
        loss = self._loss(latents, encoder_hidden_states, noise, timesteps)
        # What the example logs in every step: the mean over all processes.
        logged_loss: float = self._accelerator.gather(loss.repeat(len(latents))).mean().item()
        self._accelerator.backward(loss)
        if self._config.max_grad_norm:
            self._accelerator.clip_grad_norm_(self.unet.parameters(), self._config.max_grad_norm)
        self._optimizer.step()
        self._lr_scheduler.step()
        self._optimizer.zero_grad()
        if self.average:
            self.average.step(self.unet.parameters())
        loss.detach().item()  # beside its progress bar
        return logged_loss

    def _loss(
        self, latents: Tensor, encoder_hidden_states: Tensor, noise: Tensor, timesteps: Tensor
    ) -> Tensor:
        noisy_latents = self._noise_scheduler.add_noise(latents, noise, timesteps)
        target = noise
        if self._config.prediction_type == "v_prediction":
            target = self._noise_scheduler.get_velocity(latents, noise, timesteps)
        model_pred = self.unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)
        error = (model_pred[0].float(), target.float())
        if not self._config.min_snr_gamma:
            return F.mse_loss(*error)
        per_sample = F.mse_loss(*error, reduction="none").mean(dim=(1, 2, 3))
        return (per_sample * self._min_snr_weight(timesteps)).mean()

    def _min_snr_weight(self, timesteps: Tensor) -> Tensor:
        """[B], as the example's `--snr_gamma` (arXiv:2303.09556, section 3.4)."""
        snr = compute_snr(self._noise_scheduler, timesteps)
        of_v = self._config.prediction_type == "v_prediction"
        return snr.clamp(max=self._config.min_snr_gamma) / (snr + 1 if of_v else snr)
