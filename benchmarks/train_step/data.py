"""Latent shards of random numbers for the benchmark of the training step, of any U-Net's shapes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.synthetic_latents import (
    DOWNSAMPLE_FACTOR,
    Rows,
    SyntheticLatents,
    columns_of_shape,
)
from shards.column import ImageColumn, TextColumn
from train.config import TrainConfig
from train.unet import load_unet_config

_LOGVAR = -10.0  # what Stable Diffusion's VAE says of photos
_NUM_TOKENS, _VOCABULARY = 77, 49408


def columns_for(config: TrainConfig) -> tuple[ImageColumn, TextColumn]:
    """The columns that a run of this configuration reads."""
    unet = load_unet_config(config.unet)
    size = config.resolution // DOWNSAMPLE_FACTOR
    latent_shape = (unet["in_channels"], size, size)
    return columns_of_shape(latent_shape, (_NUM_TOKENS, unet["cross_attention_dim"]))


def write_latents(
    path: Path, image: ImageColumn, text: TextColumn, num_samples: int, num_shards: int
) -> Path:
    """Write a dataset that trains: moments and states of realistic scale, no two rows alike.

    Scaled latents and states have deviation 1; every sample has a caption of its own. Numbers that
    repeat or vanish would cost a GPU less power, and so train faster, than pictures do.

    Args:
        path: a new folder.
        image: column of moments.
        text: column of states.
        num_samples: over all shards.
        num_shards: of about equal length.
    """
    null = _draw_texts(np.random.default_rng(num_samples), text, 1)
    SyntheticLatents(path, image, text).write(
        num_samples,
        num_shards,
        partial(_draw, image, text),
        {name: array[0] for name, array in null.items()},
    )
    return path


def _draw(image: ImageColumn, text: TextColumn, numbers: range) -> Rows:
    rng = np.random.default_rng(numbers.start)
    latents = rng.standard_normal((len(numbers), *image.latent_shape), dtype=np.float32)
    logvar = _LOGVAR + rng.standard_normal(latents.shape, dtype=np.float32)
    moments = np.concatenate([latents / image.scaling_factor, logvar], axis=1)
    return Rows(
        moments=moments.astype(np.float16),
        texts=_draw_texts(rng, text, len(numbers)),
        latent_std=float(latents.std()),
    )


def _draw_texts(rng: np.random.Generator, text: TextColumn, num_rows: int) -> dict[str, np.ndarray]:
    shape = (num_rows, text.num_tokens)
    states = rng.standard_normal((*shape, text.dim), dtype=np.float32)
    return {
        "input_ids": rng.integers(0, _VOCABULARY, shape, dtype=np.uint16),
        "states": states.astype(np.float16),
    }
