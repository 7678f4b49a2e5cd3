"""The samples of the loader benchmark as a latent dataset."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.samples import SHAPES, draw_sample
from shards.arrays import write_arrays
from shards.column import ImageColumn, TextColumn
from shards.dataset import NULL, Dataset, column_path, ledger_path, write_manifest
from shards.ledger import OK, LedgerRow, write_ledger
from shards.receipt import Receipt, file_facts, write_receipt

_ENCODER: dict[str, Any] = {
    "encoder_config": {"synthetic": True},
    "compute_dtype": "float32",
    "storage_dtype": "float16",
    "weights_sha256": "0" * 64,
}


def image_spec(size: int) -> ImageColumn:
    """A column of moments of the benchmark's number of channels, `size` on a side."""
    return ImageColumn(
        **_ENCODER,
        resolution=8 * size,
        latent_channels=SHAPES["moments"][0] // 2,
        latent_size=size,
        scaling_factor=0.18215,
        transform={},
    )


def text_spec(num_tokens: int, dim: int) -> TextColumn:
    """A column of states."""
    return TextColumn(**_ENCODER, num_tokens=num_tokens, dim=dim, tokenizer_sha256="1" * 64)


# The reader wants one column of each kind. To read one alone it is given a partner without weight.
IMAGE, LIGHT_IMAGE = image_spec(SHAPES["moments"][-1]), image_spec(1)
TEXT, LIGHT_TEXT = text_spec(*SHAPES["states"]), text_spec(1, 1)


def write_latent_dataset(path: Path, num_samples: int, num_shards: int) -> Dataset:
    """Samples 0, 1, … in the order of shards and rows; every caption is another one."""

    def write(column: ImageColumn | TextColumn, shard: str, rows: int, **arrays: Any) -> None:
        data_path = column_path(path, column.column_id, shard)
        write_arrays(data_path, arrays)
        facts: dict[str, Any] = {"column": column.to_json(), "stats": {}}
        if isinstance(column, ImageColumn):
            facts["stats"] = {"latent_mean": 0.0, "latent_std": 1.0}  # never trained on
        write_receipt(data_path, receipt(shard, rows, data_path, **facts))

    def receipt(shard: str, rows: int, data_path: Path, **facts: Any) -> Receipt:
        source = {"url": f"/synthetic/{shard}.tar", "bytes": 0, "sha256": "2" * 64}
        counts: dict[str, Any] = {"rows_in": rows, "rows": rows, "absent": {}}
        return Receipt(shard=shard, source=source, **counts, **facts, **file_facts(data_path))

    cuts = [num_samples * index // num_shards for index in range(num_shards + 1)]
    for index, (first, end) in enumerate(pairwise(cuts)):
        shard, rows = f"{index:05d}", end - first
        samples = [draw_sample(number) for number in range(first, end)]
        ledger = [_ledger_row(number) for number in range(first, end)]
        write_ledger(ledger_path(path, shard), ledger)
        data_path = ledger_path(path, shard)
        write_receipt(data_path, receipt(shard, rows, data_path, column=None))
        moments, states = (np.stack([sample[name] for sample in samples]) for name in SHAPES)
        row = np.arange(rows, dtype=np.int32)
        for image, values in ((IMAGE, moments), (LIGHT_IMAGE, moments[:, :, :1, :1])):
            write(image, shard, rows, moments=values, row=row)
        ids = np.zeros((rows, SHAPES["states"][0]), np.uint16)
        for text, values in ((TEXT, states), (LIGHT_TEXT, states[:, :1, :1])):
            tokens = ids[:, : text.num_tokens]
            write(text, shard, rows, input_ids=tokens, states=values, caption=row)
    for text in (TEXT, LIGHT_TEXT):
        null = np.zeros((text.num_tokens, text.dim), np.float16)
        write(text, NULL, 1, input_ids=np.zeros(text.num_tokens, np.uint16), states=null)
    write_manifest(path)
    return Dataset(path)


def _ledger_row(number: int) -> LedgerRow:
    return LedgerRow(
        key=f"{number:08d}",
        status=OK,
        caption=f"caption {number}",
        url=f"https://images.test/{number:08d}",
        width=512,
        height=512,
        sha256=f"{number:064x}",
        metadata={},
    )
