"""Delete columns that nobody wants any more, and what killed processes left."""

from __future__ import annotations

import re
from pathlib import Path

from shards.dataset import expect_dataset
from shards.errors import UserError
from shards.layout import LEDGER
from shards.lock import is_held, remove_abandoned
from shards.manifest import write_manifest
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
        DatasetError: there is no dataset.
        UserError: there is no such column.
    """
    expect_dataset(dataset)
    folders = [name for name in list_folders(dataset) if _is_ours(name)]
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


def _is_ours(folder: str) -> bool:
    """Whether it has the name of a ledger or a column; all else is somebody's own business."""
    return folder == LEDGER or re.search(r"-[0-9a-f]{8}$", folder) is not None


def _is_abandoned(path: Location, sizes: dict[str, int]) -> bool:
    if path.name.endswith(TEMPORARY_SUFFIX):
        try:
            return not isinstance(path, Path) or not is_held(path)
        except FileNotFoundError:  # its writer has just given it its name
            return False
    is_data = path.suffix.lstrip(".") in DATA_SUFFIXES
    return is_data and isinstance(path, Path) and f"{path.stem}.json" not in sizes


def remove_leftovers(dataset: Location) -> None:
    """Delete the temporary files that killed processes left, for a job that is about to write."""
    for folder in filter(_is_ours, list_folders(dataset)):
        for name in list_files(dataset / folder):
            path = dataset / folder / name
            if not name.endswith(TEMPORARY_SUFFIX):
                continue
            if isinstance(path, Path):
                remove_abandoned(path)
            else:
                remove(path)


def delete_garbage(dataset: Location, columns: list[str]) -> dict[Location, int]:
    """Delete what `find_garbage` finds, and bring dataset.json up to date.

    Raises:
        UserError: no such column, or a job is writing to the dataset.
        StorageError: a file cannot be deleted.
    """
    expect_dataset(dataset)
    with writing_job(dataset):
        garbage = find_garbage(dataset, columns)
        # A column whose receipts and entry are gone does not count, whenever we are killed.
        for path in garbage:
            if path.suffix == ".json":
                remove(path)
        write_manifest(dataset)
        for path in garbage:
            remove(path)
        for column in set(columns):
            folder = dataset / column
            if isinstance(folder, Path) and not any(folder.iterdir()):
                folder.rmdir()
    return garbage
