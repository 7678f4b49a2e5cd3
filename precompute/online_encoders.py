"""The frozen encoders of an online run: squares to moments, captions to states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from precompute.columns import image_columns, text_columns
from precompute.image_encoder import ImageEncoder, to_pixel_values
from precompute.model_folder import find_model
from precompute.text_encoder import TextEncoder
from shards.cache import ShardCache
from shards.column import ImageColumn, TextColumn
from shards.dataset import Column
from shards.errors import UserError

T = TypeVar("T")

_BATCH_SIZE = 32  # stage 1's; a process's whole share of a large batch would not fit


def online_columns(
    model: str, resolution: int, device: torch.device
) -> tuple[Column[ImageColumn], Column[TextColumn]]:
    """The columns that stage 1 would write at its own settings, without a row in them.

    What a U-Net is held against; they say how `Encoders` encode. Their place is the encoders'.

    Args:
        model: diffusers model folder or hub id.
        resolution: side of the squares in pixels.
        device: where the encoders will run; on a GPU in float16, as in stage 1.

    Raises:
        UserError: no model, or one that cannot be used.
    """
    if not model:
        raise UserError(
            "--online", "no encoders", wanted="--model <folder or hub id>, as stage 1 takes it"
        )
    folder = find_model(model)
    dtype = "float16" if device.type == "cuda" else "float32"
    (image,) = image_columns(folder, [resolution], dtype)
    text, *_ = text_columns(folder, dtype)
    return (
        Column(folder.path, "vae", image, folder.name, {}, {}, {}, ShardCache()),
        Column(folder.path, text.part, text, folder.name, {}, {}, {}, ShardCache()),
    )


class Encoders:
    """Stage 1's encoders, in the precision that the columns name.

    Args:
        image: column that says which autoencoder, and what of.
        text: column that says which text encoder.
        device: where they run.

    Raises:
        UserError: one of them cannot be loaded.
    """

    def __init__(
        self, image: Column[ImageColumn], text: Column[TextColumn], device: torch.device
    ) -> None:
        self._device = device
        dtype = getattr(torch, image.spec.compute_dtype)
        self._may_overflow = dtype == torch.float16
        self._image_encoder = ImageEncoder(find_model(image.model), device, dtype)
        self._text_encoder = TextEncoder(
            find_model(text.model),
            device,
            getattr(torch, text.spec.compute_dtype),
            text.spec.part,
            hidden_state=text.spec.hidden_state,
        )

    def encode_images(self, squares: Sequence[np.ndarray]) -> Tensor:
        """Moments [B, 2C, h, w], or latents [B, C, h, w], of uint8 [H, W, 3]; float32, unscaled."""
        encoded = []
        for part in _batches(squares):
            pixel_values = to_pixel_values(part, self._device)
            if self._may_overflow:  # to know whether it did, the host waits for the device
                encoded.append(self._image_encoder.encode(pixel_values)[0])
            else:
                encoded.append(self._image_encoder.launch(pixel_values))
        return torch.cat(encoded)  # an ordinary tensor, which autograd takes, of inference tensors

    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        """States [B, T, D] float32."""
        tokenize, encode = self._text_encoder.tokenize, self._text_encoder.encode
        return torch.cat([encode(tokenize(list(part))).states for part in _batches(captions)])


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), _BATCH_SIZE):
        yield items[start : start + _BATCH_SIZE]
