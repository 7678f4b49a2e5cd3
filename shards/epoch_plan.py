"""What an epoch of a growing dataset is made of: planned by one process, the same for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from shards.column import Json
from shards.dataset import Column, Dataset, Spec
from shards.epoch_record import EpochRecord
from shards.held_out import HeldOut, choose_held_out


@dataclass(frozen=True)
class EpochPlan:
    """The entries of dataset.json for the shards of one epoch.

    Args:
        ledger: by shard.
        shards: of each column that is read, by its id, by shard.
        stats: of each column.
        line: that records the epoch; None where it is recorded already.
    """

    ledger: dict[str, Json]
    shards: dict[str, dict[str, Json]]
    stats: dict[str, Json]
    line: Json | None = None

    def dataset(self, whole: Dataset) -> Dataset:
        """A dataset as if it had these shards alone."""
        part = copy(whole)
        part.ledger = self.ledger
        return part

    def column(self, whole: Column[Spec]) -> Column[Spec]:
        """A column as if it had these shards alone."""
        shards, stats = self.shards[whole.column_id], self.stats[whole.column_id]
        absent = sum(entry["rows_in"] - entry["rows"] for entry in shards.values())
        return replace(whole, shards=shards, absent={"absent": absent}, stats=stats)


class EpochPlanner:
    """Looks at dataset.json when an epoch is about to start.

    Args:
        dataset: as it was when the run started.
        columns: that are read; the first is the image column.
        record: of the run.
        global_batch_size: samples per step.
        num_held_out: samples to hold out, chosen with the first epoch.
        say: is told what there is, and what is waited for.
    """

    def __init__(
        self,
        dataset: Dataset,
        columns: Sequence[Column[Any]],
        record: EpochRecord,
        *,
        global_batch_size: int,
        num_held_out: int,
        say: Callable[[str], object],
    ) -> None:
        self._dataset, self._columns, self._record = dataset, columns, record
        self._batch_size, self._num_held_out = global_batch_size, num_held_out
        self._say, self._said = say, ""

    def plan(self, number: int) -> EpochPlan | None:
        """The plan of an epoch; a new one is recorded.

        Returns:
            None: not all that it takes is there yet.

        Raises:
            DatasetError: a shard is another than the run was trained on.
        """
        dataset = Dataset(self._dataset.path, self._columns[0].cache)
        complete = self._complete_shards(dataset)
        self._record.expect_rows(complete)
        is_new = number == len(self._record)
        wanted = complete if is_new else self._record.shards_of(number)
        # The held-out samples must be there for as long as the run lasts.
        needed = {*wanted, *self._record.held_out.rows}
        if missing := sorted(needed - complete.keys()):
            self._tell(
                f"waiting for shard {missing[0]} ({len(missing)} in all), which the run took and "
                "the dataset lacks now; the same precompute makes it again"
            )
            return None
        if not complete:
            self._tell("waiting for the first complete shard")
            return None
        columns = [dataset.columns[column.column_id] for column in self._columns]
        plan = EpochPlan(
            {name: dataset.ledger[name] for name in wanted},
            {c.column_id: {name: c.shards[name] for name in wanted} for c in columns},
            {c.column_id: c.stats for c in columns},
        )
        return self._recorded(plan, wanted) if is_new else plan

    def _complete_shards(self, dataset: Dataset) -> dict[str, int]:
        """Image rows of the shards that the ledger and every column have."""
        ids = [column.column_id for column in self._columns]
        if any(column_id not in dataset.columns for column_id in ids):
            return {}
        names = set(dataset.ledger).intersection(*(dataset.columns[i].shards for i in ids))
        image = dataset.columns[ids[0]]
        return {name: image.shards[name]["rows"] for name in sorted(names)}

    def _recorded(self, plan: EpochPlan, shards: dict[str, int]) -> EpochPlan | None:
        """The plan with its line, which is on the disk now; None: too few samples."""
        held_out = self._hold_out(plan)
        num_samples = sum(shards.values()) - len(held_out)
        num_steps = num_samples // self._batch_size
        what = f"{num_samples:,} samples in {len(shards):,} complete shards"
        if not num_steps:
            self._tell(f"{what}; waiting for {self._batch_size:,}, a global batch")
            return None
        line = self._record.next_line(shards, num_steps, held_out)
        self._record.write(line)
        if line["added"] or line["removed"]:
            self._tell(f"epoch {line['epoch']} has {what}")
        return replace(plan, line=line)

    def _hold_out(self, plan: EpochPlan) -> HeldOut:
        if len(self._record):
            return self._record.held_out
        dataset, image = plan.dataset(self._dataset), plan.column(self._columns[0])
        return choose_held_out(dataset, image, self._num_held_out)

    def _tell(self, message: str) -> None:
        """Say it, once."""
        if message != self._said:
            self._say(f"{self._dataset.path}: {message}")
            self._said = message
