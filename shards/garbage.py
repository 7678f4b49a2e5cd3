"""Delete columns that nobody wants any more, and what killed processes left."""

from __future__ import annotations

from pathlib import Path

from shards.dataset import LEDGER, write_manifest
from shards.errors import UserError
from shards.lock import is_held
from shards.receipt import DATA_SUFFIXES
from shards.storage import (
    TEMPORARY_SUFFIX,
    Location,
    list_files,
    list_folders,
    remove,
    writing_job,
)


def find_garbage(dataset: Location, columns: list[str]) -> dict[Location, int]:
    """Bytes of each file that may go: the named columns, and abandoned files of the others.

    Abandoned are temporary files that no living process holds and data files without a receipt;
    on an object store, where nobody can tell whether they are about to get one, only the former.

    Raises:
        UserError: there is no such column.
    """
    folders = list_folders(dataset)
    for column in columns:
        if column not in folders or column == LEDGER:
            known = ", ".join(name for name in folders if name != LEDGER) or "none"
            raise UserError("--column", f"no column {column} in {dataset}", wanted=known)
    garbage: dict[Location, int] = {}
    for folder in folders:
        sizes = list_files(dataset / folder)
        for name, size in sizes.items():
            if folder in columns or _is_abandoned(dataset / folder / name, sizes):
                garbage[dataset / folder / name] = size
    return garbage


def _is_abandoned(path: Location, sizes: dict[str, int]) -> bool:
    if path.name.endswith(TEMPORARY_SUFFIX):
        return not isinstance(path, Path) or not is_held(path)
    is_data = path.suffix.lstrip(".") in DATA_SUFFIXES
    return is_data and isinstance(path, Path) and f"{path.stem}.json" not in sizes


def delete_garbage(dataset: Location, columns: list[str]) -> dict[Location, int]:
    """Delete what `find_garbage` finds, and bring dataset.json up to date.

    Raises:
        UserError: no such column, or a job is writing to the dataset.
        StorageError: a file cannot be deleted.
    """
    with writing_job(dataset):
        garbage = find_garbage(dataset, columns)
        # Receipts first: a column that is half deleted does not count.
        for path in sorted(garbage, key=lambda path: path.suffix != ".json"):
            remove(path)
        for column in columns:
            folder = dataset / column
            if isinstance(folder, Path):
                folder.rmdir()
        write_manifest(dataset)
    return garbage
