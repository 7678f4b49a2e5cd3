"""The frozen encoders of an online run: squares to moments, captions to states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from precompute.columns import image_columns, text_columns
from precompute.compilation import even_batch_size
from precompute.image_encoder import ImageEncoder, finite_samples, to_pixel_values
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
        compiled_share: compile them, for a process that takes so many samples a step; None runs
            them as they are.

    Raises:
        UserError: one of them cannot be loaded.
    """

    def __init__(
        self,
        image: Column[ImageColumn],
        text: Column[TextColumn],
        device: torch.device,
        *,
        compiled_share: int | None = None,
    ) -> None:
        self._device = device
        dtype = getattr(torch, image.spec.compute_dtype)
        self._may_overflow = dtype == torch.float16
        size = even_batch_size(compiled_share, _BATCH_SIZE) if compiled_share else None
        self._batch_size = size or _BATCH_SIZE
        self._image_encoder = ImageEncoder(
            find_model(image.model), device, dtype, compiled_batch_size=size
        )
        self._text_encoder = TextEncoder(
            find_model(text.model),
            device,
            getattr(torch, text.spec.compute_dtype),
            text.spec.part,
            hidden_state=text.spec.hidden_state,
            compiled_batch_size=size,
        )

    def encode_images(self, squares: Sequence[np.ndarray]) -> Tensor:
        """Moments [B, 2C, h, w], or latents [B, C, h, w], of uint8 [H, W, 3]; float32, unscaled."""
        launch = self._image_encoder.launch
        # An ordinary tensor, which autograd takes, of inference tensors.
        latents = torch.cat([launch(self._pixel_values(part)) for part in self._batches(squares)])
        if self._may_overflow:
            self._encode_overflowed(squares, latents)
        return latents

    def _encode_overflowed(self, squares: Sequence[np.ndarray], latents: Tensor) -> None:
        """Encode again in float32 what is not finite; to know it, the host waits for the device."""
        overflowed: list[int] = (~finite_samples(latents)).nonzero().flatten().tolist()
        for rows in self._batches(overflowed):
            pixel_values = self._pixel_values([squares[row] for row in rows])
            latents[rows] = self._image_encoder.encode_exactly(pixel_values)

    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        """States [B, T, D] float32."""
        tokenize, encode = self._text_encoder.tokenize, self._text_encoder.encode
        return torch.cat([encode(tokenize(list(part))).states for part in self._batches(captions)])

    def _pixel_values(self, squares: Sequence[np.ndarray]) -> Tensor:
        return to_pixel_values(squares, self._device)

    def _batches(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        for start in range(0, len(items), self._batch_size):
            yield items[start : start + self._batch_size]
