"""Decode cached latents and hold them to the images that they came from.

The check that no hash can make: that what was stored is what the VAE makes of the right pixels. A
cache of wrongly normalised images, of other images, or scaled twice decodes to something else.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch

from precompute.image_encoder import encode_pixels, load_autoencoder, to_pixel_values
from precompute.loading import choose_device
from precompute.model_folder import find_model
from precompute.pixels import UnusableImageError
from precompute.transform import cut_crop
from shards.column import ImageColumn, Json
from shards.dataset import LATENT_STD_RANGE, Column, Dataset
from shards.errors import DatasetError, UnreadableShardError
from shards.image_shards import ShardStream
from shards.quantize import latents_of
from shards.receipt import read_receipt, receipt_path
from shards.source_shard import SourceShard

# Of a stored mean against what the VAE makes of the image now: half precision and int8 stay below
# 0.02; wrong pixels, a wrong scale or another image are far above.
MAX_RELATIVE_ERROR = 0.1


def decode_back(dataset: Dataset, num_samples: int, model: str = "") -> list[Json]:
    """Decode samples spread evenly over each image column.

    Args:
        dataset: open dataset.
        num_samples: of each column.
        model: diffusers model folder; default: the one that the column was made with.

    Returns:
        for each image column that has rows: `column`, `samples`, `latent_mean` and `latent_std` of
        the scaled means, `psnr_db` (`median`, `min`) against the source images, or None where
        these cannot be read, then also `relative_error` of the stored means against a new encoding
        of the images, and `problem`, empty when there is none.

    Raises:
        UserError: the model cannot be loaded, or the dataset is damaged.
    """
    images = [c for c in dataset.columns.values() if isinstance(c.spec, ImageColumn)]
    columns = [c for c in images if c.num_rows]  # all images may be too small for one
    if not columns:
        found = f"{len(images)} image columns without a row" if images else "no image column"
        raise DatasetError(dataset.path, found, wanted="one to decode")
    return [_decode_column(column, num_samples, model) for column in columns]


def _decode_column(column: Column, num_samples: int, model: str) -> Json:
    folder = find_model(model or column.model)
    if folder.weights_sha256("vae") != column.spec.weights_sha256:
        raise DatasetError(
            folder.path / "vae",
            f"is not the VAE that {column.column_id} was made with",
            wanted=column.model,
            remedy="--model <its folder or hub id>",
        )
    device = choose_device("auto")
    vae = load_autoencoder(folder, device, torch.float32)
    means: list[np.ndarray] = []  # of buckets they have several shapes
    psnrs: list[float] = []
    errors: list[float] = []
    for shard, rows in _choose(column, num_samples).items():
        arrays = column.map_shard(shard)
        shard_means = _means(column.spec, arrays, rows)
        means.extend(shard_means)
        sources = _source_squares(column, shard, np.asarray(arrays["row"])[rows])
        for mean, square in zip(shard_means, sources, strict=True):
            if square is not None:
                psnrs.append(_psnr_db(_decode(vae, mean, device), square))
                fresh = _encode(vae, square, device)[: column.spec.latent_channels]
                errors.append(float(np.linalg.norm(mean - fresh) / np.linalg.norm(fresh)))
    values = np.concatenate([mean.ravel() for mean in means])
    scaled = values.astype(np.float64) * column.spec.scaling_factor
    result: Json = {
        "column": column.column_id,
        "samples": len(means),
        "latent_mean": round(float(scaled.mean()), 4),
        "latent_std": round(float(scaled.std()), 4),
        "psnr_db": None,
    }
    if psnrs:
        median = float(np.median(psnrs))
        result["psnr_db"] = {"median": round(median, 2), "min": round(min(psnrs), 2)}
        result["relative_error"] = round(float(np.median(errors)), 4)
    return {**result, "problem": _problem(column, result)}


def _choose(column: Column, num_samples: int) -> dict[str, np.ndarray]:
    """Rows by shard, spread evenly over the column."""
    shards = sorted(column.shards)
    ends = np.cumsum([column.shards[shard]["rows"] for shard in shards])
    total = int(ends[-1])
    wanted = np.unique(np.linspace(0, total - 1, min(num_samples, total)).astype(np.int64))
    by_shard = defaultdict(list)
    for number in wanted.tolist():
        index = int(np.searchsorted(ends, number, side="right"))
        by_shard[shards[index]].append(number - (int(ends[index - 1]) if index else 0))
    return {shard: np.array(rows) for shard, rows in by_shard.items()}


def _means(spec: ImageColumn, arrays: dict[str, np.ndarray], rows: np.ndarray) -> list[np.ndarray]:
    """Unscaled means [C, h, w] float32 of some rows."""
    return [_mean(spec, arrays, row) for row in rows.tolist()]


def _mean(spec: ImageColumn, arrays: dict[str, np.ndarray], row: int) -> np.ndarray:
    bucket = 0
    while row >= (length := len(arrays[spec.array_names(bucket)[0]])):
        row, bucket = row - length, bucket + 1
    name, scale = spec.array_names(bucket)
    one = slice(row, row + 1)
    values = np.asarray(arrays[name][one])
    if spec.storage_dtype == "int8":
        values = latents_of(values, np.asarray(arrays[scale][one])).dequantize()
    mean: np.ndarray = values[0, : spec.latent_channels].astype(np.float32)
    return mean


def _source_squares(column: Column, shard: str, rows: np.ndarray) -> list[np.ndarray | None]:
    """The pixels uint8 [H, W, 3] of ledger rows, from the source shard; None where it is gone."""
    source = read_receipt(receipt_path(column.path_of(shard))).source
    wanted = set(rows.tolist())
    found: dict[int, np.ndarray | None] = {}
    try:
        for row, sample in enumerate(ShardStream(SourceShard(source["url"], shard, None))):
            if row in wanted and sample.image is not None:
                try:
                    found[row] = cut_crop(sample.image, column.spec)
                except UnusableImageError:
                    found[row] = None
            if row >= max(wanted):
                break
    except UnreadableShardError:
        return [None] * len(rows)
    return [found.get(row) for row in rows.tolist()]


@torch.inference_mode()
def _encode(vae: Any, square: np.ndarray, device: torch.device) -> np.ndarray:
    """Unscaled moments [2C, h, w], or latents [C, h, w], of pixels uint8 [H, W, 3]."""
    latents = encode_pixels(vae, to_pixel_values([square], device))[0]
    numbers: np.ndarray = latents.float().cpu().numpy()
    return numbers


@torch.inference_mode()
def _decode(vae: Any, mean: np.ndarray, device: torch.device) -> np.ndarray:
    """Pixels float [H, W, 3] in 0 to 255 of one unscaled mean [C, h, w]."""
    pixels = vae.decode(torch.from_numpy(mean)[None].to(device)).sample[0].permute(1, 2, 0)
    numbers: np.ndarray = ((pixels.float().clamp(-1, 1) + 1) * 127.5).cpu().numpy()
    return numbers


def _psnr_db(decoded: np.ndarray, square: np.ndarray) -> float:
    error = np.square(decoded.astype(np.float64) - square).mean()
    return float(10 * np.log10(255.0**2 / max(error, 1e-3)))


def _problem(column: Column, result: Json) -> str:
    where = f"{column.dataset / column.column_id}"
    low, high = LATENT_STD_RANGE
    psnr = result["psnr_db"]
    if not psnr and not low <= result["latent_std"] <= high:
        return f"{where}: latents' deviation {result['latent_std']}; wanted {low} to {high}"
    if psnr and result["relative_error"] > MAX_RELATIVE_ERROR:
        return (
            f"{where}: decoded images are not the source images (PSNR {psnr['median']} dB, latents "
            f"{result['relative_error']:.0%} off what the VAE makes of the images now)"
        )
    return ""
