"""Latent shards of random numbers for the benchmark of the training step, of any U-Net's shapes."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from shards.arrays import save_arrays
from shards.checksum import with_checksums
from shards.column import ColumnSpec, ImageColumn, TextColumn
from shards.layout import column_path, ledger_path
from shards.ledger import OK, LedgerRow, save_ledger
from shards.manifest import write_manifest
from shards.receipt import NULL, Receipt, commit
from train.config import TrainConfig
from train.unet import load_unet_config

_SCALING_FACTOR, _LOGVAR = 0.18215, -10.0  # of Stable Diffusion's VAE; what it says of photos
_NUM_TOKENS = 77
_DOWNSAMPLE_FACTOR = 8


def columns_for(config: TrainConfig) -> tuple[ImageColumn, TextColumn]:
    """The columns that a run of this configuration reads."""
    unet = load_unet_config(config.unet)
    encoder: dict[str, Any] = {
        "encoder_config": {"synthetic": True},
        "compute_dtype": "float32",
        "storage_dtype": "float16",
        "weights_sha256": "0" * 64,
    }
    image = ImageColumn(
        **encoder,
        resolution=config.resolution,
        latent_channels=unet["in_channels"],
        latent_size=config.resolution // _DOWNSAMPLE_FACTOR,
        scaling_factor=_SCALING_FACTOR,
        transform={},
    )
    dim = unet["cross_attention_dim"]
    text = TextColumn(**encoder, num_tokens=_NUM_TOKENS, dim=dim, tokenizer_sha256="1" * 64)
    return image, text


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
    cuts = [num_samples * index // num_shards for index in range(num_shards + 1)]
    for index, (first, end) in enumerate(pairwise(cuts)):
        _write_shard(path, image, text, f"{index:05d}", range(first, end))
    null = _draw_texts(np.random.default_rng(num_samples), text, 1)
    _write(path, text, NULL, 1, {name: array[0] for name, array in null.items()})
    write_manifest(path)
    return path


def _write_shard(
    path: Path, image: ImageColumn, text: TextColumn, shard: str, numbers: range
) -> None:
    rng, num_rows = np.random.default_rng(numbers.start), len(numbers)
    ledger = [_ledger_row(number, image.resolution) for number in numbers]
    commit(
        ledger_path(path, shard),
        partial(save_ledger, rows=ledger),
        lambda written: _receipt(shard, num_rows, column=None, **written),
    )
    index = np.arange(num_rows, dtype=np.int32)
    moments, std = _draw_moments(rng, image, num_rows)
    arrays = with_checksums(image, {"moments": moments}, index)
    stats = {"latent_mean": 0.0, "latent_std": std}
    _write(path, image, shard, num_rows, {**arrays, "row": index}, stats=stats)
    arrays = with_checksums(text, _draw_texts(rng, text, num_rows), index)
    _write(path, text, shard, num_rows, {**arrays, "caption": index})


def _draw_moments(
    rng: np.random.Generator, image: ImageColumn, num_rows: int
) -> tuple[np.ndarray, float]:
    """[N, 2C, h, w] float16, and the deviation of the scaled latents."""
    latents = rng.standard_normal((num_rows, *image.latent_shape), dtype=np.float32)
    logvar = _LOGVAR + rng.standard_normal(latents.shape, dtype=np.float32)
    moments = np.concatenate([latents / image.scaling_factor, logvar], axis=1)
    return moments.astype(np.float16), float(latents.std())


def _draw_texts(rng: np.random.Generator, text: TextColumn, num_rows: int) -> dict[str, np.ndarray]:
    shape = (num_rows, text.num_tokens)
    states = rng.standard_normal((*shape, text.dim), dtype=np.float32)
    return {
        "input_ids": rng.integers(0, 49408, shape, dtype=np.uint16),
        "states": states.astype(np.float16),
    }


def _write(
    path: Path,
    column: ColumnSpec,
    shard: str,
    num_rows: int,
    arrays: dict[str, np.ndarray],
    **facts: Any,
) -> None:
    commit(
        column_path(path, column.column_id, shard),
        partial(save_arrays, arrays=arrays),
        lambda written: _receipt(shard, num_rows, column=column.to_json(), **facts, **written),
    )


def _receipt(shard: str, num_rows: int, **facts: Any) -> Receipt:
    source = {"url": f"/synthetic/{shard}.tar", "bytes": 0, "sha256": "2" * 64}
    return Receipt(shard=shard, source=source, rows_in=num_rows, rows=num_rows, absent={}, **facts)


def _ledger_row(number: int, resolution: int) -> LedgerRow:
    return LedgerRow(
        key=f"{number:08d}",
        status=OK,
        caption=f"caption {number}",
        url=f"https://images.test/{number:08d}",
        width=resolution,
        height=resolution,
        sha256=f"{number:064x}",
        metadata={},
    )
