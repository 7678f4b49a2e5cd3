"""What there is in a latent dataset, as one document."""

from __future__ import annotations

import math

import numpy as np

from shards.column import ImageColumn, Json, TextColumn
from shards.dataset import Column, Dataset


def describe(dataset: Dataset) -> Json:
    """Rows, bytes, reasons and statistics of every column; for `info --json`."""
    return {
        "dataset": str(dataset.path),
        "num_shards": len(dataset.ledger),
        "source_rows": sum(entry["rows_in"] for entry in dataset.ledger.values()),
        "dropped_rows": sum(e["rows_in"] - e["rows"] for e in dataset.ledger.values()),
        "ledger_bytes": sum(entry["bytes"] for entry in dataset.ledger.values()),
        "columns": {c.column_id: _describe_column(c) for c in dataset.columns.values()},
    }


def _describe_column(column: Column) -> Json:
    rows = column.num_rows
    return {
        "kind": column.spec.kind,
        "model": column.model,
        "storage_dtype": column.spec.storage_dtype,
        "rows": rows,
        "absent": column.absent,
        "bytes": column.num_bytes,
        "bytes_per_sample": round(column.num_bytes / rows, 1) if rows else None,
        "bytes_per_sample_by_component": _components(column) if rows else {},
        "stats": column.stats,
    }


def _components(column: Column[ImageColumn] | Column[TextColumn]) -> dict[str, float]:
    """Bytes per sample of each array; identical captions are stored once and shared."""
    spec, rows = column.spec, column.num_rows
    stored, index = [rows], "row"  # how many there are of each group of arrays
    if isinstance(spec, TextColumn):
        stored, index = [column.stats.get("captions", rows)], "caption"
    elif spec.buckets:
        counts = column.stats["buckets"]
        stored = [counts[f"{height}x{width}"] for height, width in spec.buckets]
    total = {
        name: count * _bytes_of(*array)
        for count, group in zip(stored, spec.row_groups, strict=True)
        for name, array in group.items()
    }
    if isinstance(spec, TextColumn):
        total["input_ids"] = stored[0] * _bytes_of("uint16", (spec.num_tokens,))
    total["checksum"] = sum(stored) * 8
    share = {name: round(size / rows, 1) for name, size in total.items() if size}
    entries = rows if index == "row" else sum(e["rows_in"] for e in column.shards.values())
    share[index] = round(4 * entries / rows, 1)
    share["index_checksum"] = round(8 * len(column.shards) / rows, 1)
    headers = column.num_bytes / rows - sum(share.values())
    return {**share, "headers": round(max(headers, 0.0), 1)}


def _bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    return np.dtype(dtype).itemsize * math.prod(shape)


def print_info(info: Json) -> None:
    """The document for people."""
    print(
        f"{info['dataset']}: {info['source_rows']:,} source rows in {info['num_shards']:,} shards, "
        f"{info['dropped_rows']:,} dropped"
    )
    print(f"  {'column':<28}{'rows':>14}{'GiB':>10}{'B/sample':>11}{'latent std':>12}  model")
    for column_id, column in info["columns"].items():
        std = column["stats"].get("latent_std")
        print(
            f"  {column_id:<28}{column['rows']:>14,}{column['bytes'] / 2**30:>10.3f}"
            f"{column['bytes_per_sample'] or 0:>11,.0f}"
            f"{'-' if std is None else f'{std:.3f}':>12}  {column['model']}"
        )
        parts = column["bytes_per_sample_by_component"]
        if parts:
            print("    " + ", ".join(f"{name} {size:,.0f}" for name, size in parts.items()))
        if error := column["stats"].get("relative_error"):
            print(f"    int8: relative error {error:.2%}")
        for reason, count in column["absent"].items():
            print(f"    absent: {count:,} {reason}")
