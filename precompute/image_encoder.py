"""The autoencoder's encoder, as stage 1 and the online arm of the benchmark use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from precompute.compilation import compile_encode, filled_up
from precompute.loading import load_frozen
from precompute.model_folder import ModelFolder


def to_pixel_values(crops: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """B crops, uint8 [H, W, 3], to `pixel_values`: float32 [B, 3, H, W] in [-1, 1].

    They stay in the order in which they lie in memory, channels last. A copy to a GPU does not
    wait for it.
    """
    shape = (len(crops), *crops[0].shape)
    batch = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.stack(crops, out=batch.numpy())
    on_device = batch.to(device, non_blocking=True).permute(0, 3, 1, 2)
    return on_device.float().div_(127.5).sub_(1.0)


def load_autoencoder(model: ModelFolder, device: torch.device, dtype: torch.dtype) -> Any:
    """The frozen autoencoder of a model folder, of the class that its configuration names.

    Raises:
        UserError: it cannot be loaded, lacks weights, or is of a class that is not supported.
    """
    import diffusers

    loader = getattr(diffusers, model.vae_class)
    autoencoder = load_frozen(model, "vae", loader, torch_dtype=dtype)
    return autoencoder.to(device, memory_format=torch.channels_last)


def encode_pixels(autoencoder: Any, pixel_values: Tensor) -> Tensor:
    """Moments [B, 2C, h, w] where there is a posterior, else latents [B, C, h, w]; unscaled."""
    encoded = autoencoder.encode(pixel_values)[0]
    latents: Tensor = encoded if isinstance(encoded, Tensor) else encoded.parameters
    return latents


def finite_samples(latents: Tensor) -> Tensor:
    """Which samples [B] have finite numbers alone."""
    return torch.isfinite(latents).flatten(1).all(dim=1)


class ImageEncoder:
    """The autoencoder's encoder: `pixel_values` to moments, or to latents.

    Args:
        model: folder with `vae/`.
        device: where it runs.
        dtype: precision that it runs in.
        compiled_batch_size: compile it for batches of this size, and fill up smaller ones; None
            runs it as it is.

    Attributes:
        has_posterior: it gives moments [B, 2C, h, w]; else latents [B, C, h, w].
    """

    def __init__(
        self,
        model: ModelFolder,
        device: torch.device,
        dtype: torch.dtype,
        *,
        compiled_batch_size: int | None = None,
    ) -> None:
        self.device = device
        self.has_posterior = model.has_posterior
        self._model, self._dtype = model, dtype
        self._autoencoder = load_autoencoder(model, device, dtype)
        self._float32_autoencoder: Any = None
        self._compiled_batch_size = compiled_batch_size
        self._encode_pixels = (
            compile_encode(encode_pixels) if compiled_batch_size else encode_pixels
        )

    @torch.inference_mode()
    def encode(self, pixel_values: Tensor) -> tuple[Tensor, int]:
        """What diffusers' `encode` emits, unscaled: a posterior's `parameters`, or latents.

        Args:
            pixel_values: [B, 3, H, W] in [-1, 1].

        Returns:
            float32 [B, 2C, h, w] or [B, C, h, w], and how many samples overflowed in half
            precision and were encoded again in float32. What is not finite even then is left so.
        """
        latents = self.launch(pixel_values)
        overflowed = (~finite_samples(latents)).nonzero().flatten()
        if self.is_exact or not len(overflowed):
            return latents, 0
        latents[overflowed] = self.encode_exactly(pixel_values[overflowed])
        return latents, len(overflowed)

    @property
    def is_exact(self) -> bool:
        """Whether it runs in float32 anyway."""
        return self._dtype == torch.float32

    @torch.inference_mode()
    def launch(self, pixel_values: Tensor) -> Tensor:
        """What `encode` gives without its second attempt; does not wait for a GPU."""
        latents = self._encode_pixels(self._autoencoder, self._encoder_input(pixel_values))
        return latents[: len(pixel_values)].float().contiguous()

    def record_event(self) -> Any:
        """Something to `synchronize()` with what was launched so far; None where nothing waits."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    @torch.inference_mode()
    def encode_exactly(self, pixel_values: Tensor) -> Tensor:
        """The same in float32, for what overflowed in half precision."""
        self._float32_autoencoder = self._float32_autoencoder or load_autoencoder(
            self._model, self.device, torch.float32
        )
        return encode_pixels(
            self._float32_autoencoder, _channels_last(pixel_values.float())
        ).contiguous()

    def _encoder_input(self, pixel_values: Tensor) -> Tensor:
        """Pixels in the encoder's precision; compiled, always as many, in one order in memory."""
        if not self._compiled_batch_size:
            return _channels_last(pixel_values.to(self._dtype))
        full = torch.empty(
            (self._compiled_batch_size, *pixel_values.shape[1:]),
            dtype=self._dtype,
            device=pixel_values.device,
            memory_format=torch.channels_last,
        )
        return filled_up(pixel_values, like=full)


def _channels_last(pixel_values: Tensor) -> Tensor:
    return pixel_values.contiguous(memory_format=torch.channels_last)
