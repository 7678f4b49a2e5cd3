"""The samples of the loader benchmark as a latent dataset."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.samples import SHAPES, draw_sample
from shards.arrays import save_arrays
from shards.checksum import with_checksums
from shards.column import ImageColumn, TextColumn
from shards.dataset import Dataset
from shards.layout import column_path, ledger_path
from shards.ledger import OK, LedgerRow, save_ledger
from shards.manifest import write_manifest
from shards.receipt import NULL, Receipt, commit

_ENCODER: dict[str, Any] = {
    "encoder_config": {"synthetic": True},
    "compute_dtype": "float32",
    "storage_dtype": "float16",
    "weights_sha256": "0" * 64,
}


IMAGE = ImageColumn(
    **_ENCODER,
    resolution=8 * SHAPES["moments"][-1],
    latent_channels=SHAPES["moments"][0] // 2,
    latent_size=SHAPES["moments"][-1],
    scaling_factor=0.18215,
    transform={},
)
TEXT = TextColumn(
    **_ENCODER, num_tokens=SHAPES["states"][0], dim=SHAPES["states"][1], tokenizer_sha256="1" * 64
)


def write_latent_dataset(path: Path, num_samples: int, num_shards: int) -> Dataset:
    """Samples 0, 1, … in the order of shards and rows; every caption is another one."""

    def write(column: ImageColumn | TextColumn, shard: str, rows: int, **arrays: Any) -> None:
        facts: dict[str, Any] = {"column": column.to_json(), "stats": {}}
        if isinstance(column, ImageColumn):
            facts["stats"] = {"latent_mean": 0.0, "latent_std": 1.0}  # never trained on
        commit(
            column_path(path, column.column_id, shard),
            partial(save_arrays, arrays=arrays),
            lambda written: receipt(shard, rows, **facts, **written),
        )

    def receipt(shard: str, rows: int, **facts: Any) -> Receipt:
        source = {"url": f"/synthetic/{shard}.tar", "bytes": 0, "sha256": "2" * 64}
        counts: dict[str, Any] = {"rows_in": rows, "rows": rows, "absent": {}}
        return Receipt(shard=shard, source=source, **counts, **facts)

    cuts = [num_samples * index // num_shards for index in range(num_shards + 1)]
    for index, (first, end) in enumerate(pairwise(cuts)):
        shard, rows = f"{index:05d}", end - first
        samples = [draw_sample(number) for number in range(first, end)]
        ledger = [_ledger_row(number) for number in range(first, end)]
        receipt_of = partial(receipt, shard, rows, column=None)
        commit(
            ledger_path(path, shard),
            partial(save_ledger, rows=ledger),
            lambda written, receipt_of=receipt_of: receipt_of(**written),  # type: ignore[misc]
        )
        moments, states = (np.stack([sample[name] for sample in samples]) for name in SHAPES)
        row = np.arange(rows, dtype=np.int32)
        ids = np.zeros((rows, SHAPES["states"][0]), np.uint16)
        write(IMAGE, shard, rows, **with_checksums(IMAGE, {"moments": moments}, row), row=row)
        texts = with_checksums(TEXT, {"input_ids": ids, "states": states}, row)
        write(TEXT, shard, rows, **texts, caption=row)
    null = np.zeros(SHAPES["states"], np.float16)
    write(TEXT, NULL, 1, input_ids=np.zeros(SHAPES["states"][0], np.uint16), states=null)
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
