"""Hold a latent dataset to its receipts.

Always: every receipt is intact, every data file is there and as long as stated, the sums of rows
hold, dataset.json is what the receipts say. `full` also reads every byte: hashes, indices that
point where they may, finite numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from shards.arrays import Arrays, map_arrays
from shards.canonical import canonical_json, sha256_of
from shards.checksum import column_checksums, index_checksum
from shards.column import ColumnSpec, TextColumn, column_from_json
from shards.dataset import Dataset, expect_dataset
from shards.errors import CorruptFileError, DatasetError
from shards.layout import LEDGER, MANIFEST
from shards.ledger import OK, LedgerRow, count_reasons, read_ledger
from shards.manifest import build_manifest, parse_receipt_in_place
from shards.receipt import DATA_SUFFIXES, NULL, Receipt, iter_receipt_files
from shards.storage import (
    TEMPORARY_SUFFIX,
    Location,
    list_files,
    list_folders,
    local_copy,
    read_bytes,
    size_of,
)


@dataclass(frozen=True)
class Problem:
    """Something that is wrong.

    Args:
        where: the file.
        text: what is wrong with it.
        redo: folder and shard that must be made again; None where that is not the remedy.
    """

    where: Location
    text: str
    redo: tuple[str, str] | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


@dataclass(frozen=True)
class _File:
    """A data file that has a receipt."""

    path: Location
    num_bytes: int | None
    receipt: Receipt

    def problem(self, text: str) -> Problem:
        return Problem(self.path, text, (self.path.parent.name, self.path.stem))


def iter_problems(
    dataset: Location, *, full: bool, on_bytes: Callable[[int], object] = lambda _: None
) -> Iterator[Problem]:
    """Everything that is wrong, one by one, naming the file.

    Args:
        dataset: folder or URL.
        full: also read every byte, in as many threads as there are CPUs.
        on_bytes: called with the length of each data file that was checked, for a progress bar.

    Raises:
        DatasetError: there is no dataset to verify.
        StorageError: it cannot be reached.
    """
    folders = list_folders(dataset)
    expect_dataset(dataset)
    ledgers: dict[str, Receipt] = {}
    broken = False
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for folder in sorted(folders, key=lambda name: name != LEDGER):
            sizes = list_files(dataset / folder)
            yield from _stray_files(dataset / folder, sizes)
            files = []
            for found in _receipts(dataset / folder, sizes):
                if isinstance(found, Problem):
                    broken = True
                    yield found
                    continue
                files.append(found)
                if folder == LEDGER:
                    ledgers[found.receipt.shard] = found.receipt
            for file, problems in zip(
                files,
                pool.map(lambda f: list(_problems_of(f, ledgers, full=full)), files),
                strict=True,
            ):
                yield from problems
                on_bytes(file.num_bytes or 0)
    if not broken:
        yield from _manifest_problems(dataset)


def count_bytes(dataset: Location) -> int:
    """Bytes of the data files, for a progress bar."""
    return sum(
        size
        for folder in list_folders(dataset)
        for name, size in list_files(dataset / folder).items()
        if name.rpartition(".")[2] in DATA_SUFFIXES
    )


def _stray_files(folder: Location, sizes: dict[str, int]) -> Iterator[Problem]:
    """Files without a receipt: what a killed process leaves, and what does not belong here."""
    for name in sizes:
        stem, _, suffix = name.rpartition(".")
        if suffix in DATA_SUFFIXES and f"{stem}.json" not in sizes:
            text = "no receipt: not finished; the next precompute overwrites it"
            yield Problem(folder / name, text)
        elif name.endswith(TEMPORARY_SUFFIX):
            text = "a temporary file; the next precompute deletes it, or python -m shards gc --yes"
            yield Problem(folder / name, text)
        elif suffix not in (*DATA_SUFFIXES, "json"):
            yield Problem(folder / name, "does not belong here")


def _receipts(folder: Location, sizes: dict[str, int]) -> Iterator[_File | Problem]:
    suffix = "parquet" if folder.name == LEDGER else "safetensors"
    for path, data in iter_receipt_files(folder):
        try:
            receipt = parse_receipt_in_place(path, data)
        except CorruptFileError as error:
            text = str(error).removeprefix(f"{path}: ")
            yield Problem(path, text, (folder.name, path.stem))
            continue
        except DatasetError as error:  # of another release: nothing that could be made again
            yield Problem(path, str(error).removeprefix(f"{path}: "))
            continue
        name = f"{path.stem}.{suffix}"
        yield _File(folder / name, sizes.get(name), receipt)


def _problems_of(file: _File, ledgers: dict[str, Receipt], *, full: bool) -> Iterator[Problem]:
    receipt, shard = file.receipt, file.receipt.shard
    if file.num_bytes is None:
        yield file.problem("is missing, its receipt is there")
        return
    if file.num_bytes != receipt.data_bytes:
        yield file.problem(f"{file.num_bytes} bytes; wanted {receipt.data_bytes}")
        return
    if shard != NULL:
        if shard not in ledgers:
            text = f"the ledger has no intact receipt for shard {shard}"
            yield Problem(file.path, f"{text}: not finished; the same precompute makes it whole")
        elif ledgers[shard].rows_in != receipt.rows_in:
            found = f"accounts for {receipt.rows_in} rows; ledger has {ledgers[shard].rows_in}"
            yield file.problem(found)
    if full and (text := _content_problem(file)):
        yield file.problem(text)


def _content_problem(file: _File) -> str:
    """What is wrong with the bytes of a data file; empty when nothing is."""
    try:
        with local_copy(file.path) as path:
            if sha256_of(path) != file.receipt.data_sha256:
                damaged = _damaged_rows(path, file.receipt)
                return f"its bytes are not those that were written (sha256 differs){damaged}"
            if file.receipt.column is None:
                return _ledger_problem(path, file.receipt)
            if file.receipt.shard == NULL:
                return ""
            return _column_problem(map_arrays(path, file.path), file.receipt)
    except FileNotFoundError:
        return "is missing"
    except DatasetError as error:
        return str(error).removeprefix(f"{file.path}: ")


def _damaged_rows(path: Location, receipt: Receipt) -> str:
    """Which rows a change of bytes has hit, where that can be told."""
    if receipt.column is None or receipt.shard == NULL:
        return ""
    spec = column_from_json(receipt.column, path)
    try:
        arrays = map_arrays(path)  # type: ignore[arg-type]
        wrong = column_checksums(spec, arrays) != arrays["checksum"]
    except (DatasetError, KeyError, ValueError):
        return ", its structure is damaged"
    rows = np.flatnonzero(wrong).tolist()
    shown = ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
    return f", {len(rows)} rows damaged: {shown}" if rows else ""


def _ledger_problem(path: Location, receipt: Receipt) -> str:
    rows = [LedgerRow(key=row["key"], status=row["status"]) for row in read_ledger(path)]
    if len(rows) != receipt.rows_in or count_reasons(rows) != receipt.absent:
        return f"{len(rows)} rows, dropped {count_reasons(rows)}; its receipt says otherwise"
    if sum(row.status == OK for row in rows) != receipt.rows:
        return "its count of good rows is not that of its receipt"
    return ""


def _column_problem(arrays: Arrays, receipt: Receipt) -> str:
    spec = column_from_json(receipt.column or {}, receipt.shard)
    if problem := _shape_problem(arrays, spec):
        return problem
    num_rows = len(arrays["checksum"])
    if isinstance(spec, TextColumn):
        caption = arrays["caption"]
        written, size = caption[caption >= 0], num_rows
    else:
        written, size = arrays["row"], receipt.rows_in
    if len(written) != receipt.rows:
        return f"{len(written)} rows; its receipt says {receipt.rows}"
    if len(written) and not (written.min() >= 0 and written.max() < size):
        return "an index points outside"
    for name in spec.row_arrays:
        if not all(np.isfinite(row).all() for row in arrays[name]):
            return f"{name}: a number is not finite"
    if not np.array_equal(index_checksum(arrays[spec.index_array]), arrays["index_checksum"]):
        return "its index does not match its checksum"
    wrong = np.flatnonzero(column_checksums(spec, arrays) != arrays["checksum"])
    return f"row {wrong[0]} does not match its checksum" if len(wrong) else ""


def _shape_problem(arrays: Arrays, spec: ColumnSpec) -> str:
    wanted = {*spec.row_arrays, "checksum", spec.index_array, "index_checksum"}
    if missing := wanted - arrays.keys():
        return f"lacks {', '.join(sorted(missing))}"
    num_rows = 0
    for group in spec.row_groups:
        length = next((len(arrays[name]) for name in group if arrays[name].ndim), 0)
        num_rows += length
        for name, (dtype, shape) in group.items():
            found = arrays[name]
            if found.dtype != np.dtype(dtype) or found.shape != (length, *shape):
                shown = f"{found.dtype} {found.shape}"
                return f"{name} is {shown}; its column says {dtype} {shape} a row"
    if num_rows != len(arrays["checksum"]):
        return f"{num_rows} rows with {len(arrays['checksum'])} checksums"
    return ""


def _manifest_problems(dataset: Location) -> Iterator[Problem]:
    path = dataset / MANIFEST
    remedy = f"python -m shards index {dataset}"
    try:
        found = read_bytes(path)
    except FileNotFoundError:
        yield Problem(path, f"is missing ({remedy} rebuilds it)")
        return
    if found != canonical_json(build_manifest(dataset)).encode():
        yield Problem(path, f"differs from what the receipts say ({remedy} rebuilds it)")
        return
    try:
        opened = Dataset(dataset)
    except DatasetError as error:
        yield Problem(path, str(error).removeprefix(f"{path}: "))
        return
    for column in opened.columns.values():
        folder = dataset / column.column_id
        if isinstance(column.spec, TextColumn) and size_of(folder / f"{NULL}.json") is None:
            yield Problem(folder / f"{NULL}.json", "is missing, and the empty caption with it")
        for shard in sorted(opened.ledger.keys() - column.shards.keys()):
            yield Problem(folder, f"shard {shard} is in the ledger, not here")
