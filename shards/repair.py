"""Set what is damaged aside, so that the next precompute makes it again, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from shards.dataset import expect_dataset
from shards.manifest import write_manifest
from shards.receipt import DATA_SUFFIXES
from shards.storage import Location, list_files, list_folders, move, writing_job
from shards.verify import Problem, iter_problems


@dataclass(frozen=True)
class Repair:
    """What a repair did.

    Args:
        problems: all that was found.
        aside: where the damaged files are now; None when there were none.
        redo: folder and shard of what stage 1 will make again.
        moved: the files that were set aside.
    """

    problems: list[Problem]
    aside: Location | None
    redo: list[tuple[str, str]]
    moved: list[Location]


def repair(dataset: Location, on_bytes: Callable[[int], object] = lambda _: None) -> Repair:
    """Verify in full, set damaged files aside with their receipts, and rebuild dataset.json.

    Files go to `<dataset>.aside/<time>/<folder>/`, beside the dataset: nothing is deleted.

    Args:
        dataset: folder or URL.
        on_bytes: see `iter_problems`.

    Raises:
        DatasetError: there is no dataset, or a job is writing to it.
        StorageError: it cannot be reached.
    """
    expect_dataset(dataset)
    if isinstance(dataset, Path):
        dataset = dataset.resolve()  # "." has no name that the folder beside it could take
    with writing_job(dataset):
        problems = list(iter_problems(dataset, full=True, on_bytes=on_bytes))
        redo = sorted({problem.redo for problem in problems if problem.redo})
        aside = _free_folder(dataset.parent / f"{dataset.name}.aside")
        moved = [
            path for folder, shard in redo for path in _set_aside(dataset, folder, shard, aside)
        ]
        write_manifest(dataset)
    return Repair(problems, aside if moved else None, redo, moved)


def _free_folder(asides: Location) -> Location:
    """A folder named after the time that is not there yet: what was set aside before stays."""
    taken = list_folders(asides)
    time = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    names = itertools.chain([time], (f"{time}-{number}" for number in itertools.count(2)))
    return asides / next(name for name in names if name not in taken)


def _set_aside(dataset: Location, folder: str, shard: str, aside: Location) -> list[Location]:
    names = list_files(dataset / folder).keys()
    # The receipt goes first: without it the data file does not count, whenever we are killed.
    found = [n for n in (f"{shard}.{suffix}" for suffix in ("json", *DATA_SUFFIXES)) if n in names]
    for name in found:
        move(dataset / folder / name, aside / folder / name)
    return [dataset / folder / name for name in found]
