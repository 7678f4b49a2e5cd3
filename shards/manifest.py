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
    """Derive dataset.json from the receipts alone; anyone can, at any time.

    A shard counts, in every column, once the ledger has it: its ledger is written last. So at any
    moment of a job the manifest names whole shards alone.
    """
    ledger: Json = {}
    filters, caption_fields = set(), set()
    dropped: Counter[str] = Counter()
    for receipt in iter_receipts(dataset / LEDGER):
        ledger[receipt.shard] = _shard_entry(receipt)
        filters.add(receipt.stats.get("filter", ""))
        caption_fields.add(receipt.stats.get("caption_field", ""))
        dropped.update(receipt.absent)
    columns = {}
    for name in list_folders(dataset):
        if name == LEDGER:
            continue
        if receipts := [r for r in iter_receipts(dataset / name) if r.shard in ledger]:
            columns[name] = _column_entry(receipts)
    return {
        "format_version": FORMAT_VERSION,
        "filter": " | ".join(sorted(filters)),
        "caption_field": " | ".join(sorted(caption_fields)),
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
    if buckets := [r.stats["buckets"] for r in receipts if "buckets" in r.stats]:
        pooled["buckets"] = {name: sum(b[name] for b in buckets) for name in buckets[0]}
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
        # Another job may have finished a shard, and written the file, in between: whoever comes
        # last must have seen all receipts.
        if _names_all_receipts(dataset, manifest):
            return manifest


def _names_all_receipts(dataset: Location, manifest: Json) -> bool:
    ledger = manifest["ledger"].keys()
    if _receipt_names(dataset / LEDGER) != ledger:
        return False
    for folder in list_folders(dataset):
        entry = manifest["columns"].get(folder, {"shards": {}})
        if folder != LEDGER and _receipt_names(dataset / folder) & ledger != entry["shards"].keys():
            return False
    return True


def _receipt_names(folder: Location) -> set[str]:
    names = {n.removesuffix(".json") for n in list_files(folder) if n.endswith(".json")}
    return names - {NULL}
