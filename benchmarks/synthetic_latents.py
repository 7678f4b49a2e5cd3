"""A latent dataset of whatever numbers a benchmark draws, with no encoder behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from shards.arrays import save_arrays
from shards.checksum import with_checksums
from shards.column import ColumnSpec, ImageColumn, Json, TextColumn
from shards.layout import column_path, ledger_path
from shards.ledger import OK, LedgerRow, save_ledger
from shards.manifest import write_manifest
from shards.receipt import NULL, Receipt, commit

DOWNSAMPLE_FACTOR = 8
_SCALING_FACTOR = 0.18215  # of Stable Diffusion's VAE
_ENCODER: dict[str, Any] = {
    "encoder_config": {"synthetic": True},
    "compute_dtype": "float32",
    "storage_dtype": "float16",
    "weights_sha256": "0" * 64,
}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Samples with a caption each.

    Args:
        moments: [N, 2C, h, w] float16.
        texts: `input_ids` [N, T] uint16 and `states` [N, T, D] float16.
        latent_std: of the latents, scaled.
    """

    moments: np.ndarray
    texts: dict[str, np.ndarray]
    latent_std: float


def columns_of_shape(
    latent_shape: tuple[int, int, int], text_shape: tuple[int, int]
) -> tuple[ImageColumn, TextColumn]:
    """Columns of a Stable Diffusion VAE and text encoder that never were.

    Args:
        latent_shape: [C, h, w], h = w.
        text_shape: [T, D].
    """
    channels, _, size = latent_shape
    image = ImageColumn(
        **_ENCODER,
        resolution=DOWNSAMPLE_FACTOR * size,
        latent_channels=channels,
        latent_size=size,
        scaling_factor=_SCALING_FACTOR,
        transform={},
    )
    num_tokens, dim = text_shape
    text = TextColumn(**_ENCODER, num_tokens=num_tokens, dim=dim, tokenizer_sha256="1" * 64)
    return image, text


@dataclass(frozen=True)
class SyntheticLatents:
    """Writes shards of drawn rows.

    Args:
        path: a new folder.
        image: column of moments.
        text: column of states.
    """

    path: Path
    image: ImageColumn
    text: TextColumn

    def write(
        self,
        num_samples: int,
        num_shards: int,
        draw: Callable[[range], Rows],
        null: dict[str, np.ndarray],
    ) -> None:
        """Samples 0, 1, … in the order of shards and rows.

        Args:
            num_samples: over all shards.
            num_shards: of about equal length.
            draw: the samples of these numbers.
            null: `input_ids` [T] and `states` [T, D] of the empty caption.
        """
        cuts = [num_samples * index // num_shards for index in range(num_shards + 1)]
        for index, (first, end) in enumerate(pairwise(cuts)):
            numbers = range(first, end)
            self._write_shard(f"{index:05d}", numbers, draw(numbers))
        self._write_column(self.text, NULL, 1, null)
        write_manifest(self.path)

    def _write_shard(self, shard: str, numbers: range, rows: Rows) -> None:
        ledger = [_ledger_row(number, self.image.resolution) for number in numbers]
        commit(
            ledger_path(self.path, shard),
            partial(save_ledger, rows=ledger),
            lambda written: _receipt(shard, len(numbers), column=None, **written),
        )
        index = np.arange(len(numbers), dtype=np.int32)
        moments = with_checksums(self.image, {"moments": rows.moments}, index)
        stats = {"latent_mean": 0.0, "latent_std": rows.latent_std}
        arrays = {**moments, "row": index}
        self._write_column(self.image, shard, len(numbers), arrays, stats=stats)
        texts = with_checksums(self.text, rows.texts, index)
        self._write_column(self.text, shard, len(numbers), {**texts, "caption": index})

    def _write_column(
        self,
        column: ColumnSpec,
        shard: str,
        num_rows: int,
        arrays: dict[str, np.ndarray],
        stats: Json | None = None,
    ) -> None:
        facts: Json = {"column": column.to_json(), "stats": stats or {}}
        commit(
            column_path(self.path, column.column_id, shard),
            partial(save_arrays, arrays=arrays),
            lambda written: _receipt(shard, num_rows, **facts, **written),
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
