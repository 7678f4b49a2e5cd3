"""Bytes of a latent dataset, from the shapes that its format stores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from benchmarks.planner.config import Latents, UNet
from shards.checksum import with_checksums
from shards.column import ColumnSpec, ImageColumn, TextColumn
from train.unet import load_unet_config

TB = 10**12
Text = Literal["fp16", "int8", "ids"]
_NUM_TOKENS = 77
_PIXELS_PER_LATENT = 8


def latent_bytes(latents: Latents, resolution: int, unet: UNet) -> int:
    """Bytes of one image: its latents, their scales, row index and checksum.

    Args:
        latents: what is stored.
        resolution: in pixels.
        unet: whose latents they are.
    """
    kind, _, dtype = latents.partition("-")
    return _row_bytes(
        ImageColumn(
            **_encoder(dtype or "float16"),
            latents=kind,
            resolution=resolution,
            latent_channels=load_unet_config(unet)["in_channels"],
            latent_size=resolution // _PIXELS_PER_LATENT,
            scaling_factor=1.0,
            transform={},
        )
    )


def text_bytes(text: Text, unet: UNet) -> int:
    """Bytes of one caption that no other image shares: ids, states, scales, index and checksum."""
    dtype = {"fp16": "float16", "int8": "int8", "ids": "none"}[text]
    return _row_bytes(
        TextColumn(
            **_encoder(dtype),
            num_tokens=_NUM_TOKENS,
            dim=load_unet_config(unet)["cross_attention_dim"],
            tokenizer_sha256="",
        )
    )


def per_sample(unet: UNet, resolutions: Sequence[int]) -> dict[str, Any]:
    """Bytes per image and per caption for every way of storing them."""
    return {
        "latents": {
            kind: {str(side): latent_bytes(kind, side, unet) for side in resolutions}
            for kind in get_args(Latents)
        },
        "text": {kind: text_bytes(kind, unet) for kind in get_args(Text)},
    }


def _encoder(storage_dtype: str) -> dict[str, Any]:
    encoder = {"weights_sha256": "", "encoder_config": {}, "compute_dtype": "float16"}
    return {**encoder, "storage_dtype": storage_dtype}


def _row_bytes(spec: ColumnSpec) -> int:
    """What a shard of one row weighs more than one of none."""
    return _shard_bytes(spec, 1) - _shard_bytes(spec, 0)


def _shard_bytes(spec: ColumnSpec, num_rows: int) -> int:
    shapes = dict(spec.row_arrays)
    if isinstance(spec, TextColumn):
        shapes["input_ids"] = ("uint16", (spec.num_tokens,))
    arrays = {name: np.zeros((num_rows, *row), dtype) for name, (dtype, row) in shapes.items()}
    index = np.zeros(num_rows, np.int32)
    stored = with_checksums(spec, arrays, index)
    return index.nbytes + sum(array.nbytes for array in stored.values())
