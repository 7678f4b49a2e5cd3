"""The reader of latent shards: rows gathered from memory maps into batches, ahead of need."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from shards.arrays import Arrays
from shards.batch import LatentBatch
from shards.buffers import BufferPool
from shards.canonical import canonical_json
from shards.column import ImageColumn, TextColumn
from shards.dataset import Column, Dataset
from shards.errors import DatasetError, UserError
from shards.fetch_ahead import FetchAhead
from shards.flip import draw_flips, expect_mirror, no_mirror
from shards.gather import Allocate, RowGatherer, max_open_shards
from shards.held_out import HeldOut
from shards.order import DEFAULT_WINDOW, SampleOrder
from shards.prefetch import prefetch
from shards.quantize import latents_of, states_of
from shards.row_index import caption_rows, ledger_rows, sample_keys
from shards.storage import is_remote

PREFETCH_DEPTH = 4
STEPS_AT_A_TIME = 32  # located together; a batch alone would cost more to locate than to copy


class LatentReader:
    """A `BatchSource` over one image column and one text column of a latent dataset.

    Args:
        dataset: open dataset.
        image: column of moments or means; its rows are the samples.
        text: column of captions.
        seed: of the order.
        global_batch_size: samples per step over all processes.
        num_partitions: see `shards.order`.
        window: shuffle window in samples.
        allocate: makes a batch's buffers from shape and dtype; pass one that makes pinned memory
            to let the copy to the device overlap. Default: memory that is used again.
        processes_sharing_cache: readers on this machine, where the dataset is remote.
        held_out: samples that are never served but by `iter_held_out`.
        flipped: the column of the mirrored images, for `flip_prob`.
        flip_prob: probability that a sample comes mirrored; drawn anew every step.

    Raises:
        DatasetError: the dataset is not whole, or `flipped` is not the mirror of `image`.
        UserError: fewer samples than partitions.
    """

    def __init__(
        self,
        dataset: Dataset,
        image: Column[ImageColumn],
        text: Column[TextColumn],
        *,
        seed: int,
        global_batch_size: int,
        num_partitions: int,
        window: int = DEFAULT_WINDOW,
        allocate: Allocate | None = None,
        processes_sharing_cache: int = 1,
        held_out: HeldOut | None = None,
        flipped: Column[ImageColumn] | None = None,
        flip_prob: float = 0.0,
    ) -> None:
        assert flipped or not flip_prob
        dataset.check_trainable(image, text)
        if flipped and flip_prob:
            expect_mirror(image, flipped)
        self.latent_shape = image.spec.latent_shape
        self.scaling_factor = image.spec.scaling_factor
        self._null = dataset.read_null(text)
        self._image, self._text = image, text
        self._flipped, self._flip_prob = (flipped if flip_prob else None), flip_prob
        self._held_out = held_out or HeldOut({})
        self._shards = sorted(image.shards)
        lengths = np.array([image.shards[shard]["rows"] for shard in self._shards], dtype=np.int64)
        self._first_sample = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        self.order = SampleOrder(
            lengths,
            seed=seed,
            global_batch_size=global_batch_size,
            num_partitions=num_partitions,
            window=window,
            held_out=self._held_out_by_index(),
        )
        self.identity = self._identity(lengths)
        images = [image] if self._flipped is None else [image, self._flipped]
        self._columns: list[Column] = [*images, text]
        self._cache_share = image.cache.max_bytes // processes_sharing_cache
        max_open = max_open_shards()
        if is_remote(dataset.path):
            max_open = min(max_open, self._num_shards_in_cache())
        allocate = allocate or BufferPool()
        self.image_rows = RowGatherer(images, self._shards, allocate, max_open * len(images))
        self.text_rows = RowGatherer([text], self._shards, allocate, max_open)
        self._captions_of = lru_cache(maxsize=max_open)(self._read_captions)
        self._ahead: FetchAhead | None = None

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

    def _identity(self, lengths: np.ndarray) -> str:
        """Hash of all that the sequence of samples, and what they hold, depends on."""
        facts = {
            "image": self._image.column_id,
            "text": self._text.column_id,
            "shards": self._shards,
            "lengths": lengths.tolist(),
            "seed": self.order.seed,
            "global_batch_size": self.order.global_batch_size,
            "num_partitions": self.order.num_partitions,
            "window": self.order.window,
        }
        if len(self._held_out):
            facts["held_out"] = self._held_out.identity
        if self._flipped:
            facts |= {"flipped": self._flipped.column_id, "flip_prob": self._flip_prob}
        return hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:16]

    def epoch_at(self, step: int) -> float:
        """Epochs completed when `step` steps are done."""
        return self.order.epoch_at(step)

    def iter_batches(self, first_step: int, positions: range) -> Iterator[LatentBatch]:
        """Batches of `first_step` and all that follow, gathered ahead of need."""
        return prefetch(self._gather_all(first_step, positions), PREFETCH_DEPTH)

    def _gather_all(self, first_step: int, positions: range) -> Iterator[LatentBatch]:
        if is_remote(self._image.dataset):
            self._ahead = self._start_fetching(first_step, positions)
        try:
            for first in itertools.count(first_step, STEPS_AT_A_TIME):
                located = self.order.locate_steps(first, STEPS_AT_A_TIME, positions)
                for number, (shards, rows) in enumerate(zip(*located, strict=True)):
                    yield self._gather(first + number, positions, shards, rows)
        finally:
            if self._ahead:
                self._ahead.stop()

    def gather(self, step: int, positions: range) -> LatentBatch:
        """One batch.

        Raises:
            CorruptFileError: a shard is missing, cut short, or damaged in a row that is read.
            StorageError: a remote shard cannot be fetched.
        """
        return self._gather(step, positions, *self.order.locate(step, positions))

    @property
    def num_held_out(self) -> int:
        """Samples that `iter_held_out` has."""
        return len(self._held_out)

    def iter_held_out(self, first: int, last: int, batch_size: int) -> Iterator[LatentBatch]:
        """The held-out samples from `first` up to `last`, in a fixed order, never mirrored.

        Args:
            first: index among the held-out samples.
            last: index behind the last one, at most `num_held_out`.
            batch_size: rows of each batch but the last one. Their `step` is -1.
        """
        assert 0 <= first <= last <= self.num_held_out
        by_index = self._held_out_by_index()
        shards = np.repeat(list(by_index), [len(rows) for rows in by_index.values()])
        rows = np.concatenate([*by_index.values(), np.empty(0, np.int64)])
        for start in range(first, last, batch_size):
            chosen = slice(start, min(start + batch_size, last))
            yield self._gather_rows(-1, shards[chosen], rows[chosen], shards[chosen])

    def _held_out_by_index(self) -> dict[int, np.ndarray]:
        index = {name: number for number, name in enumerate(self._shards)}
        return {index[name]: np.array(rows) for name, rows in self._held_out.rows.items()}

    def _gather(
        self, step: int, positions: range, shards: np.ndarray, rows: np.ndarray
    ) -> LatentBatch:
        if self._ahead:
            self._ahead.reach(step)
        image_shards = shards
        if self._flipped:
            order = self.order
            flips = draw_flips(
                order.seed, step, positions, order.global_batch_size, self._flip_prob
            )
            image_shards = shards + len(self._shards) * flips
        return self._gather_rows(step, shards, rows, image_shards)

    def _gather_rows(
        self, step: int, shards: np.ndarray, rows: np.ndarray, image_shards: np.ndarray
    ) -> LatentBatch:
        latents = self.image_rows.gather(image_shards, rows)
        text = self.text_rows.gather(shards, self._caption_rows(shards, rows))
        states: Any = None
        if self._text.spec.storage_dtype == "int8":
            values, scale = text
            states = states_of(values, scale, self._null["channel_scale"])
        elif self._text.spec.has_states:
            (states,) = text
        return LatentBatch(
            step=step,
            samples=self.sample_numbers(shards, rows),
            moments=latents[0] if len(latents) == 1 else latents_of(*latents),
            states=states,
            input_ids=None if self._text.spec.has_states else text[0],
        )

    def sample_numbers(self, shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Number in the whole dataset of samples given by shard index and row."""
        numbers: np.ndarray = self._first_sample[shards] + rows
        return numbers

    def places_of(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard index and row of samples given by their numbers, int64 [B] each."""
        shards = np.searchsorted(self._first_sample, samples, side="right") - 1
        return shards, samples - self._first_sample[shards]

    def keys_of(self, samples: np.ndarray) -> list[str]:
        """`<shard>/<key>` of samples given by their numbers, from the ledger."""
        shards, rows = self.places_of(samples)
        names = [self._shards[shard] for shard in shards.tolist()]
        return sample_keys(self._image, names, rows.tolist())

    def _caption_rows(self, shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Rows of the text column that belong to rows of the image column."""
        found = np.empty_like(rows)
        for shard in set(shards.tolist()):
            members = shards == shard
            found[members] = self._captions_of(shard)[rows[members]]
        return found

    def _read_captions(self, index: int) -> np.ndarray:
        """For each image row of a shard its row in the text column; checked once."""
        name = self._shards[index]
        if self._flipped:
            row, mirrored = (ledger_rows(column, name) for column in (self._image, self._flipped))
            if not np.array_equal(row, mirrored):
                raise no_mirror(self._flipped.path_of(name), "other rows", self._image)
        return caption_rows(self._image, self._text, name)

    def _start_fetching(self, first_step: int, positions: range) -> FetchAhead:
        """Fetch ahead of need; refuse a cache that cannot hold what one window needs."""
        _, window = next(self.order.shards_ahead(first_step, positions))
        names = [self._shards[index] for index in window.tolist()]
        needed = sum(column.shards[name]["bytes"] for column in self._columns for name in names)
        if needed > self._cache_share:
            raise UserError(
                self._image.cache.folder,
                f"{self._cache_share / 2**30:.2f} GiB of cache for this process",
                wanted=f"{needed / 2**30:.2f} GiB, for the {len(names)} shards that are read "
                "at a time",
                remedy="a larger --cache-gib, or a smaller --shuffle-window (another order: not "
                "in mid-run)",
            )
        ahead = self.order.shards_ahead(first_step, positions)
        return FetchAhead(self._columns, self._shards, ahead, self._cache_share)

    def _num_shards_in_cache(self) -> int:
        """As many as fit into the cache: a map keeps the disk space of a file that was deleted."""
        largest = max(
            sum(column.shards[shard]["bytes"] for column in self._columns) for shard in self._shards
        )
        return max(self._cache_share // max(largest, 1), 1)


def expect_null_states(null: Arrays, text: Column[TextColumn]) -> np.ndarray:
    """The states in what a text column stores of the empty caption.

    Raises:
        DatasetError: there are token ids alone.
    """
    if "states" not in null:
        raise DatasetError(
            text.dataset / text.column_id,
            "token ids alone, no text encoder states",
            wanted="states, or a text encoder that runs along",
            remedy="--text ids",
        )
    return null["states"]
