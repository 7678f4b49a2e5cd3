"""Training on a dataset that stage 1 is still writing.

An epoch takes the shards that dataset.json names when it starts, complete in the ledger and in
every column that is read. Its order is `SampleOrder` over exactly these, with the epoch's number in
the seed. It has a whole number of steps and leaves out the remainder, other samples each epoch.
When it ends, dataset.json is read again.

The order thus depends on when a shard was finished; so each epoch is recorded before its first
batch (`shards.epoch_record`). A run that is resumed, or restarted from an earlier checkpoint, takes
the recorded epochs exactly as they were, on any number of processes, and then goes on following.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from shards.batch import LatentBatch
from shards.buffers import BufferPool
from shards.canonical import canonical_json
from shards.column import ImageColumn, Json, TextColumn
from shards.dataset import Column, Dataset
from shards.epoch_plan import EpochPlan, EpochPlanner
from shards.epoch_record import EpochRecord
from shards.errors import UserError
from shards.gather import Allocate
from shards.order import DEFAULT_WINDOW
from shards.reader import LatentReader, expect_null_states
from shards.row_index import sample_keys
from shards.storage import Location

_FOLLOW = 3  # what the random bits are for, beside those of `shards.order` and `shards.flip`
_POLL_SEC = 5.0


@dataclass(frozen=True)
class _OpenEpoch:
    """The epoch that batches are taken from.

    Args:
        number: of the epoch.
        reader: over its shards alone; counts steps and samples from 0.
        first_samples: of its shards, as the whole run numbers them.
    """

    number: int
    reader: LatentReader
    first_samples: np.ndarray

    def number_samples(self, samples: np.ndarray) -> np.ndarray:
        """The run's numbers of samples given by the reader's."""
        shards, rows = self.reader.places_of(samples)
        numbers: np.ndarray = self.first_samples[shards] + rows
        return numbers


class FollowingReader:
    """A `BatchSource` over a dataset that grows.

    Args:
        dataset: open dataset; a few shards are enough.
        image: column of moments or means.
        text: column of captions.
        record: where `epochs.jsonl` is kept, in the run's folder.
        seed: of the order.
        global_batch_size: samples per step over all processes.
        num_partitions: see `shards.order`.
        window: shuffle window in samples.
        allocate: see `LatentReader`.
        processes_sharing_cache: see `LatentReader`.
        num_held_out: samples to hold out; chosen once, from what the first epoch finds.
        flipped: the column of the mirrored images, for `flip_prob`.
        flip_prob: probability that a sample comes mirrored.
        agree: takes something from the main process, None from the others, and gives all of them
            the main process's. Every process calls it at the same places, in the thread that calls
            `begin` or takes batches.
        is_main: whether this is the main process, the one that looks at dataset.json.
        say: is told what there is, and what is waited for, on the main process.
        should_stop: asked on the main process while it waits; iteration ends when it says so.
    """

    def __init__(
        self,
        dataset: Dataset,
        image: Column[ImageColumn],
        text: Column[TextColumn],
        record: Location,
        *,
        seed: int,
        global_batch_size: int,
        num_partitions: int,
        window: int = DEFAULT_WINDOW,
        allocate: Allocate | None = None,
        processes_sharing_cache: int = 1,
        num_held_out: int = 0,
        flipped: Column[ImageColumn] | None = None,
        flip_prob: float = 0.0,
        agree: Callable[[Any], Any] = lambda document: document,
        is_main: bool = True,
        say: Callable[[str], object] = print,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        assert flipped or not flip_prob
        self.latent_shape = image.spec.latent_shape
        self.scaling_factor = image.spec.scaling_factor
        self._dataset, self._image, self._text = dataset, image, text
        self._flipped = flipped if flip_prob else None
        self._null = dataset.read_null(text)
        settings: dict[str, Any] = {
            "global_batch_size": global_batch_size,
            "num_partitions": num_partitions,
            "window": window,
            "flip_prob": flip_prob,
        }
        columns: list[Column[Any]] = [image, text, *([self._flipped] if self._flipped else [])]
        facts = {
            **settings,
            "columns": [column.column_id for column in columns],
            "seed": seed,
            "num_held_out": num_held_out,
        }
        digest = hashlib.sha256(canonical_json(facts).encode()).hexdigest()
        self.identity = f"following-{digest[:16]}"
        self._seed = seed
        self._options = settings | {
            "allocate": allocate or BufferPool(),
            "processes_sharing_cache": processes_sharing_cache,
        }
        self._record_path = record
        self._record = EpochRecord(record, self.identity)
        self._planner = EpochPlanner(
            dataset,
            columns,
            self._record,
            global_batch_size=global_batch_size,
            num_held_out=num_held_out,
            say=say,
        )
        self._agree, self._is_main, self._should_stop = agree, is_main, should_stop
        self._has_read_record = False
        self._epoch: _OpenEpoch | None = None
        self._known: dict[str, Json] = {}  # image shards of all epochs that were opened

    @property
    def null_states(self) -> np.ndarray:
        """States of the empty caption, [T, D] float16.

        Raises:
            DatasetError: the dataset has token ids alone.
        """
        return expect_null_states(self._null, self._text)

    @property
    def null_input_ids(self) -> np.ndarray:
        """Token ids of the empty caption, [T] uint16."""
        return self._null["input_ids"]

    def begin(self, first_step: int | None = None) -> bool:
        """Enter the epoch of a step, and wait for it where it is not there yet.

        Batches do this by themselves; before them it is for those who want held-out samples.

        Args:
            first_step: where the run goes on; default: the last epoch that is recorded, or the
                first of all.

        Returns:
            False: asked to stop while waiting.

        Raises:
            UserError: the record is another run's, or ends before `first_step`.
        """
        if not self._has_read_record:
            for line in self._agree(self._record.read() if self._is_main else None):
                self._record.add(line)
            self._has_read_record = True
        if first_step is None:
            return self._enter(max(len(self._record) - 1, 0))
        if first_step > self._record.end:
            raise UserError(
                self._record_path,
                f"ends at step {self._record.end}",
                wanted=f"the epochs up to step {first_step}, where the run goes on",
                remedy="put the run's own file back, or start another --output-dir with "
                "--init-from this run",
            )
        if first_step == self._record.end:
            return self._enter(len(self._record))
        return self._enter(self._record.epoch_of(first_step))

    def epoch_at(self, step: int) -> float:
        """Epochs completed when `step` steps are done."""
        if not len(self._record):
            return 0.0
        epoch = self._record.epoch_of(step)
        steps = self._record.steps_of(epoch)
        return epoch + (step - steps.start) / len(steps)

    def iter_batches(self, first_step: int, positions: range) -> Iterator[LatentBatch]:
        """Batches of `first_step` and all that follow; ends where a wait is told to stop."""
        step, is_there = first_step, self.begin(first_step)
        while is_there:
            assert self._epoch
            epoch, steps = self._epoch, self._record.steps_of(self._epoch.number)
            batches = epoch.reader.iter_batches(step - steps.start, positions)
            assert isinstance(batches, Generator)
            try:
                for batch in islice(batches, steps.stop - step):
                    samples = epoch.number_samples(batch.samples)
                    yield replace(batch, step=steps.start + batch.step, samples=samples)
            finally:
                batches.close()
            step, is_there = steps.stop, self._enter(epoch.number + 1)

    @property
    def num_held_out(self) -> int:
        """Samples that `iter_held_out` has; 0 before `begin` has entered an epoch."""
        return len(self._record.held_out)

    def iter_held_out(self, first: int, last: int, batch_size: int) -> Iterator[LatentBatch]:
        """See `LatentReader.iter_held_out`; once `begin` was called."""
        assert self._epoch
        for batch in self._epoch.reader.iter_held_out(first, last, batch_size):
            yield replace(batch, samples=self._epoch.number_samples(batch.samples))

    def keys_of(self, samples: np.ndarray) -> list[str]:
        """`<shard>/<key>` of samples given by their numbers, from the ledger."""
        names, first_samples = self._record.number_samples()
        shards = np.searchsorted(first_samples, samples, side="right") - 1
        image = replace(self._image, shards=self._known)
        rows = samples - first_samples[shards]
        return sample_keys(image, [names[shard] for shard in shards.tolist()], rows.tolist())

    def _enter(self, number: int) -> bool:
        """Open an epoch, recorded or new, on every process; False: asked to stop meanwhile."""
        if self._epoch and self._epoch.number == number:
            return True
        plan: EpochPlan | None = None
        while plan is None:
            plan, stop = self._agree(self._propose(number) if self._is_main else None)
            if stop:
                return False
        if plan.line:
            self._record.add(plan.line)
        self._epoch = self._open(number, plan)
        return True

    def _propose(self, number: int) -> tuple[EpochPlan | None, bool]:
        """On the main process: the plan of an epoch, if any, and whether to stop waiting for it.

        It says so at every turn: the others, who wait for it, must not wait for long.
        """
        plan = self._planner.plan(number)
        stop = plan is None and self._should_stop()
        if plan is None and not stop:
            time.sleep(_POLL_SEC)
        return plan, stop

    def _open(self, number: int, plan: EpochPlan) -> _OpenEpoch:
        image = plan.column(self._image)
        (seed,) = np.random.SeedSequence((self._seed, _FOLLOW, number)).generate_state(1, np.uint64)
        reader = LatentReader(
            plan.dataset(self._dataset),
            image,
            plan.column(self._text),
            seed=int(seed),
            held_out=self._record.held_out,
            flipped=plan.column(self._flipped) if self._flipped else None,
            **self._options,
        )
        self._known |= image.shards
        first_samples = dict(zip(*self._record.number_samples(), strict=True))
        in_order = [first_samples[name] for name in sorted(image.shards)]
        return _OpenEpoch(number, reader, np.array(in_order, dtype=np.int64))
