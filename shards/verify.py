"""Hold a latent dataset to its receipts.

Always: every receipt is intact, every data file is there and as long as stated, the sums of rows
hold, dataset.json is what the receipts say. `full` also reads every byte: hashes, indices that
point where they may, finite numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shards.arrays import map_arrays
from shards.column import ImageColumn, TextColumn
from shards.dataset import (
    LEDGER,
    MANIFEST,
    NULL,
    Dataset,
    build_manifest,
    column_path,
    ledger_path,
    read_receipt_in_place,
    unfinished_files,
)
from shards.errors import DatasetError
from shards.ledger import OK, count_reasons, read_ledger
from shards.ledger import LedgerRow as Row
from shards.receipt import Receipt, receipt_path
from shards.storage import canonical_json, sha256_of


def iter_problems(dataset: Path, *, full: bool) -> Iterator[str]:
    """Everything that is wrong, one line each, naming the file.

    Raises:
        DatasetError: there is no dataset to verify.
    """
    if not (dataset / MANIFEST).exists() and not (dataset / LEDGER).is_dir():
        Dataset(dataset)  # says what is missing and how to get it
    ledgers: dict[str, Receipt] = {}
    folders = sorted(path for path in dataset.iterdir() if path.is_dir())
    broken = False
    for folder in sorted(folders, key=lambda path: path.name != LEDGER):
        for path in unfinished_files(folder):
            yield f"{path}: no receipt: not finished; the next precompute overwrites it"
        for path in sorted(folder.glob("*.json")):
            try:
                receipt = read_receipt_in_place(path)
            except DatasetError as error:
                yield str(error)
                broken = True
                continue
            if folder.name == LEDGER:
                ledgers[receipt.shard] = receipt
            yield from _problems_of(dataset, folder.name, receipt, ledgers, full=full)
    if not broken:
        yield from _manifest_problems(dataset)


def _problems_of(
    dataset: Path, column_id: str, receipt: Receipt, ledgers: dict[str, Receipt], *, full: bool
) -> Iterator[str]:
    in_ledger = column_id == LEDGER
    shard = receipt.shard
    path = ledger_path(dataset, shard) if in_ledger else column_path(dataset, column_id, shard)
    if not path.exists():
        yield f"{path}: is missing, its receipt is there"
        return
    if path.stat().st_size != receipt.data_bytes:
        yield f"{path}: {path.stat().st_size} bytes; wanted {receipt.data_bytes}"
        return
    if full and sha256_of(path) != receipt.data_sha256:
        yield f"{path}: its bytes are not those that were written (sha256 differs)"
        return
    if shard == NULL:
        return
    if shard not in ledgers:
        yield f"{path}: the ledger has no intact receipt for shard {shard}"
        return
    if ledgers[shard].rows_in != receipt.rows_in:
        yield f"{path}: accounts for {receipt.rows_in} rows; ledger has {ledgers[shard].rows_in}"
    if full:
        check = _ledger_problem if in_ledger else _column_problem
        try:
            if problem := check(path, receipt):
                yield f"{path}: {problem}"
        except DatasetError as error:
            yield str(error)


def _ledger_problem(path: Path, receipt: Receipt) -> str:
    rows = [Row(key=row["key"], status=row["status"]) for row in read_ledger(path)]
    if len(rows) != receipt.rows_in or count_reasons(rows) != receipt.absent:
        return f"{len(rows)} rows, dropped {count_reasons(rows)}; its receipt says otherwise"
    if sum(row.status == OK for row in rows) != receipt.rows:
        return "its count of good rows is not that of its receipt"
    return ""


def _column_problem(path: Path, receipt: Receipt) -> str:
    assert receipt.column is not None
    arrays = map_arrays(path)
    if receipt.column["kind"] == ImageColumn.kind:
        values, written, size = arrays["moments"], arrays["row"], receipt.rows_in
    else:
        values, caption = arrays["states"], arrays["caption"]
        written, size = caption[caption >= 0], len(values)
    if len(written) != receipt.rows:
        return f"{len(written)} rows; its receipt says {receipt.rows}"
    if len(written) and not (written.min() >= 0 and written.max() < size):
        return "an index points outside"
    if not all(np.isfinite(part).all() for part in values):
        return "holds a number that is not finite"
    return ""


def _manifest_problems(dataset: Path) -> Iterator[str]:
    path = dataset / MANIFEST
    remedy = f"python -m shards index {dataset}"
    if not path.exists():
        yield f"{path}: is missing ({remedy} rebuilds it)"
        return
    found = path.read_bytes()
    if found != canonical_json(build_manifest(dataset)).encode():
        yield f"{path}: differs from what the receipts say ({remedy} rebuilds it)"
        return
    try:
        opened = Dataset(dataset)
    except DatasetError as error:
        yield str(error)
        return
    for column in opened.columns.values():
        null = receipt_path(column_path(dataset, column.column_id, NULL))
        if isinstance(column.spec, TextColumn) and not null.exists():
            yield f"{null}: is missing, and the states of the empty caption with it"
        for shard in sorted(opened.ledger.keys() - column.shards.keys()):
            yield f"{dataset / column.column_id}: shard {shard} is in the ledger, not here"
