"""dataset.json, derived from the receipts: replaced whole, rebuilt by anyone, may lag."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from shards.arrays import repair_remedy
from shards.canonical import canonical_json
from shards.column import FORMAT_VERSION, Json, column_from_json
from shards.errors import CorruptFileError
from shards.layout import LEDGER, MANIFEST
from shards.receipt import NULL, Receipt, iter_receipt_files, parse_receipt
from shards.storage import (
    Location,
    is_remote,
    list_files,
    list_folders,
    read_bytes,
    size_of,
    write_text_whole,
)


def parse_receipt_in_place(path: Location, data: bytes) -> Receipt:
    """`parse_receipt`, of a receipt that lies where it belongs: in its column, under its name.

    Raises:
        DatasetError: it does not; or see `parse_receipt`.
    """
    receipt = parse_receipt(path, data)
    folder = LEDGER
    if receipt.column is not None:
        folder = column_from_json(receipt.column, path).column_id
    if (folder, receipt.shard) != (path.parent.name, path.stem):
        raise CorruptFileError(
            path, f"is the receipt of {folder}/{receipt.shard}", remedy=repair_remedy(path)
        )
    return receipt


def iter_receipts(folder: Location) -> Iterator[Receipt]:
    """The receipts of a column or of the ledger, in the order of shard names, without `null`."""
    for path, data in iter_receipt_files(folder):
        if path.stem != NULL:
            yield parse_receipt_in_place(path, data)


def build_manifest(dataset: Location) -> Json:
    """Derive dataset.json from the receipts alone; anyone can, at any time."""
    ledger, filters = {}, set()
    dropped: Counter[str] = Counter()
    for receipt in iter_receipts(dataset / LEDGER):
        ledger[receipt.shard] = _shard_entry(receipt)
        filters.add(receipt.stats.get("filter", ""))
        dropped.update(receipt.absent)
    columns = {}
    for name in list_folders(dataset):
        if name != LEDGER and (receipts := list(iter_receipts(dataset / name))):
            columns[name] = _column_entry(receipts)
    return {
        "format_version": FORMAT_VERSION,
        "filter": " | ".join(sorted(filters)),
        "dropped": dict(sorted(dropped.items())),
        "ledger": ledger,
        "columns": columns,
    }


def _shard_entry(receipt: Receipt) -> Json:
    return {
        "rows": receipt.rows,
        "rows_in": receipt.rows_in,
        "bytes": receipt.data_bytes,
        "sha256": receipt.data_sha256,
    }


def _column_entry(receipts: list[Receipt]) -> Json:
    absent: Counter[str] = Counter()
    for receipt in receipts:
        absent.update(receipt.absent)
    return {
        "spec": receipts[0].column,
        "model": receipts[0].model,
        "shards": {r.shard: _shard_entry(r) for r in receipts},
        "absent": dict(sorted(absent.items())),
        "stats": _pooled_stats(receipts),
    }


def _pooled_stats(receipts: list[Receipt]) -> Json:
    """Statistics over all shards from those of each."""
    pooled: Json = {}
    if captions := [r.stats["captions"] for r in receipts if "captions" in r.stats]:
        pooled["captions"] = sum(captions)
    latents = [(r.rows, r.stats) for r in receipts if r.rows and "latent_std" in r.stats]
    if latents:
        mean = _mean([(rows, stats["latent_mean"]) for rows, stats in latents])
        square = _mean(
            [
                (rows, stats["latent_std"] ** 2 + stats["latent_mean"] ** 2)
                for rows, stats in latents
            ]
        )
        pooled["latent_mean"] = round(mean, 6)
        pooled["latent_std"] = round(math.sqrt(max(square - mean**2, 0.0)), 6)
    errors = [
        (r.rows, r.stats["relative_error"] ** 2) for r in receipts if r.stats.get("relative_error")
    ]
    if errors:
        pooled["relative_error"] = round(math.sqrt(_mean(errors)), 6)
    return pooled


def _mean(weighted: list[tuple[int, float]]) -> float:
    return sum(rows * value for rows, value in weighted) / sum(rows for rows, _ in weighted)


def write_manifest(dataset: Location) -> Json:
    """Bring dataset.json up to its receipts; leaves the file alone when it already is."""
    while True:
        manifest = build_manifest(dataset)
        text, path = canonical_json(manifest), dataset / MANIFEST
        if size_of(path) is None or read_bytes(path) != text.encode():
            write_text_whole(path, text)
        # Where nothing can be locked another job may have finished a shard, and written the
        # file, in between: whoever comes last must have seen all receipts.
        if not is_remote(dataset) or _names_all_receipts(dataset, manifest):
            return manifest


def _names_all_receipts(dataset: Location, manifest: Json) -> bool:
    named = {LEDGER: manifest["ledger"].keys()}
    named |= {name: entry["shards"].keys() for name, entry in manifest["columns"].items()}
    for folder in list_folders(dataset):
        there = {
            n.removesuffix(".json") for n in list_files(dataset / folder) if n.endswith(".json")
        }
        if there - {NULL} != set(named.get(folder, ())):
            return False
    return True
