"""Offline against online with the encoding counted: total times by epochs, and the break-even."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from precompute.time_account import DECODE, READ, TRANSFORM, WRITE, loads
from shards.column import ImageColumn, TextColumn
from shards.dataset import Column, Dataset
from shards.manifest import iter_receipts

_EPOCHS = (1, 2, 3, 10)


@dataclass(frozen=True)
class Total:
    """Of so many epochs, for each image of the dataset.

    Args:
        offline_sec_per_image: stage 1, once, and the epochs.
        online_sec_per_image: the epochs.
        speedup: the one over the other.
    """

    offline_sec_per_image: float
    online_sec_per_image: float
    speedup: float


@dataclass(frozen=True)
class Totals:
    """Both ways of training, with all that they take.

    Args:
        epochs: by their number.
        break_even_epochs: from here on offline is ahead; None: never.
    """

    epochs: dict[str, Total]
    break_even_epochs: float | None


def totals(online: float, offline: float, encode: float) -> Totals:
    """Total times, stage 1 included.

    Args:
        online: images per second.
        offline: images per second, from latents.
        encode: images per second of stage 1.
    """
    by_epochs = {}
    for epochs in _EPOCHS:
        offline_sec, online_sec = epochs / offline + 1 / encode, epochs / online
        by_epochs[str(epochs)] = Total(offline_sec, online_sec, online_sec / offline_sec)
    gain = 1 / online - 1 / offline
    return Totals(by_epochs, (1 / encode) / gain if gain > 0 else None)


def encode_images_per_sec(components: dict[str, Any], batch: int, device: str) -> float:
    """Speed of stage 1 from its parts, as they were timed beside the arms.

    On a GPU decoding is hidden behind the encoders, or they behind it; a CPU does both.

    Args:
        components: of `measure_components`.
        batch: images that each part was timed with.
        device: cuda or cpu.
    """
    decode, vae, text = (
        components[name]["sec_per_step"]["median"] for name in ("decode", "vae", "text")
    )
    sec = max(decode, vae + text) if device == "cuda" else decode + vae + text
    return float(batch / sec)


def receipts_images_per_sec(
    dataset: Dataset, image: Column[ImageColumn], text: Column[TextColumn]
) -> float:
    """Speed of stage 1 for these two columns when they were made, from the times in their receipts.

    Its stages overlap, so a shard takes as long as the slowest of them.
    """
    texts = {receipt.shard: receipt for receipt in iter_receipts(dataset.path / text.column_id)}
    num_rows, seconds = 0, 0.0
    for receipt in iter_receipts(dataset.path / image.column_id):
        timings, of_text = receipt.timings, texts[receipt.shard].timings
        stages = {
            **{name: timings[name] for name in (READ, DECODE, TRANSFORM)},
            "encode both": timings["encode"] + of_text["encode"],
            WRITE: timings[WRITE] + of_text[WRITE],
        }
        seconds += max(loads(stages, timings["decode_workers"]).values())
        num_rows += receipt.rows_in
    return num_rows / seconds
