"""Samples that are never trained on: a function of the ledger alone, so every run holds out these.

The rule, for `num_samples` of a dataset:

1. At most one good ledger row in 20 is held out: `limit = min(num_samples, good rows // 20)`.
2. The shards are ranked by the sha256 of their names and taken in that order until they have
   20 x `limit` good rows: one or two of 40,000, all of a small dataset. No other ledger is read.
3. Their distinct keys are ranked by the sha256 of the key, and each is held out with all the rows
   that have it, in whichever of these shards, unless that would make more than `limit` rows.
4. Of an image column, those that are large enough for it are held out.

Resolution, seed, batch and number of processes play no part: a phase at 512 px holds out the same
images as the phase at 256 px before it. More shards may rank before the others and so make another
choice; a run's identity has them in it, and `shards.follow` chooses once and records it.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shards.canonical import canonical_json
from shards.column import ImageColumn
from shards.dataset import Column, Dataset
from shards.ledger import OK
from shards.row_index import ledger_rows, read_whole_ledger

_ONE_IN = 20


@dataclass(frozen=True)
class HeldOut:
    """Held-out samples of one image column.

    Args:
        rows: ascending, by shard; rows of the column.
    """

    rows: dict[str, list[int]]

    def __len__(self) -> int:
        return sum(map(len, self.rows.values()))

    @property
    def identity(self) -> str:
        """Hash of what is held out."""
        return hashlib.sha256(canonical_json(self.rows).encode()).hexdigest()[:16]


def choose_held_out(dataset: Dataset, image: Column[ImageColumn], num_samples: int) -> HeldOut:
    """The samples that are held out; fewer where the dataset is small or the column lacks some.

    Args:
        dataset: open dataset.
        image: the column that is trained on.
        num_samples: how many are wanted.

    Raises:
        CorruptFileError: a ledger or a shard is missing, or not what its receipt says.
    """
    limit = min(num_samples, sum(entry["rows"] for entry in dataset.ledger.values()) // _ONE_IN)
    places = defaultdict(list)
    for shard in _shards_to_choose_from(dataset, _ONE_IN * limit):
        num_rows = dataset.ledger[shard]["rows_in"]
        ledger = read_whole_ledger(dataset.path, shard, ["key", "status"], num_rows)
        for number, row in enumerate(ledger):
            if row["status"] == OK:
                places[row["key"]].append((shard, number))
    chosen = defaultdict(list)
    num_chosen = 0
    for key in sorted(places, key=_rank):
        if num_chosen + len(places[key]) <= limit:
            num_chosen += len(places[key])
            for shard, number in places[key]:
                chosen[shard].append(number)
    rows = {
        shard: np.flatnonzero(np.isin(ledger_rows(image, shard), numbers)).tolist()
        for shard, numbers in sorted(chosen.items())
        if shard in image.shards  # a column that lacks shards is refused by the reader, in words
    }
    return HeldOut({shard: found for shard, found in rows.items() if found})


def _shards_to_choose_from(dataset: Dataset, num_rows: int) -> Iterator[str]:
    """Shards by rank, until they have so many good rows."""
    for shard in sorted(dataset.ledger, key=_rank):
        if num_rows <= 0:
            return
        yield shard
        num_rows -= dataset.ledger[shard]["rows"]


def _rank(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
