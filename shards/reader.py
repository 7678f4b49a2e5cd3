"""The reader of latent shards: rows gathered from memory maps into batches, ahead of need."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from shards.arrays import Arrays, repair_remedy
from shards.batch import LatentBatch
from shards.buffers import BufferPool
from shards.canonical import canonical_json
from shards.checksum import index_checksum
from shards.column import ImageColumn, TextColumn
from shards.dataset import Column, Dataset
from shards.errors import CorruptFileError, DatasetError, UserError
from shards.fetch_ahead import FetchAhead
from shards.gather import MAX_OPEN_SHARDS, Allocate, RowGatherer, expect_array
from shards.order import DEFAULT_WINDOW, SampleOrder
from shards.prefetch import prefetch
from shards.quantize import latents_of, states_of
from shards.storage import Location, is_remote

PREFETCH_DEPTH = 4
STEPS_AT_A_TIME = 32  # located together; a batch alone would cost more to locate than to copy
_INDEX = np.dtype(np.int32)


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
    ) -> None:
        dataset.check_trainable(image, text)
        self.latent_shape = image.spec.latent_shape
        self.scaling_factor = image.spec.scaling_factor
        self._null = dataset.read_null(text)
        self._image, self._text = image, text
        self._shards = sorted(image.shards)
        lengths = np.array([image.shards[shard]["rows"] for shard in self._shards], dtype=np.int64)
        self._first_sample = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        self.order = SampleOrder(
            lengths,
            seed=seed,
            global_batch_size=global_batch_size,
            num_partitions=num_partitions,
            window=window,
        )
        self.identity = self._identity(lengths)
        self._cache_share = image.cache.max_bytes // processes_sharing_cache
        max_open = self._num_shards_to_keep_open() if is_remote(dataset.path) else MAX_OPEN_SHARDS
        allocate = allocate or BufferPool()
        self.image_rows = RowGatherer(image, self._shards, allocate, max_open)
        self.text_rows = RowGatherer(text, self._shards, allocate, max_open)
        self._captions_of = lru_cache(maxsize=max_open)(self._read_captions)
        self._ahead: FetchAhead | None = None

    @property
    def null_states(self) -> np.ndarray:
        """States of the empty caption, [T, D] float16.

        Raises:
            DatasetError: the dataset has token ids alone.
        """
        if "states" not in self._null:
            raise DatasetError(
                self._text.dataset / self._text.column_id,
                "token ids alone, no text encoder states",
                wanted="states, or a text encoder that runs along",
                remedy="--text ids",
            )
        return self._null["states"]

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
                    yield self._gather(first + number, shards, rows)
        finally:
            if self._ahead:
                self._ahead.stop()

    def gather(self, step: int, positions: range) -> LatentBatch:
        """One batch.

        Raises:
            CorruptFileError: a shard is missing, cut short, or damaged in a row that is read.
            StorageError: a remote shard cannot be fetched.
        """
        return self._gather(step, *self.order.locate(step, positions))

    def _gather(self, step: int, shards: np.ndarray, rows: np.ndarray) -> LatentBatch:
        if self._ahead:
            self._ahead.reach(step)
        latents = self.image_rows.gather(shards, rows)
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
        image, text = self._image.map_shard(name), self._text.map_shard(name)
        image_path, text_path = self._image.path_of(name), self._text.path_of(name)
        row = expect_array(image, "row", _INDEX, (), image_path)
        caption = expect_array(text, "caption", _INDEX, (), text_path)
        num_rows, num_source_rows = (self._image.shards[name][key] for key in ("rows", "rows_in"))
        num_captions = len(expect_array(text, "checksum", np.dtype(np.uint64), (), text_path))
        _expect_within(row, num_rows, num_source_rows, "row", image_path)
        if len(caption) != num_source_rows:
            raise CorruptFileError(
                text_path,
                f"{len(caption)} captions",
                wanted=f"{num_source_rows}, one for each row of the ledger",
                remedy=repair_remedy(text_path),
            )
        captions = np.asarray(caption)[row]
        _expect_within(captions, num_rows, num_captions, "caption of an image row", text_path)
        _expect_checksum(row, image, image_path)
        _expect_checksum(caption, text, text_path)
        return captions

    def _start_fetching(self, first_step: int, positions: range) -> FetchAhead:
        """Fetch ahead of need; refuse a cache that cannot hold what one window needs."""
        columns: list[Column] = [self._image, self._text]
        _, window = next(self.order.shards_ahead(first_step, positions))
        names = [self._shards[index] for index in window.tolist()]
        needed = sum(column.shards[name]["bytes"] for column in columns for name in names)
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
        return FetchAhead(columns, self._shards, ahead, self._cache_share)

    def _num_shards_to_keep_open(self) -> int:
        """As many as fit into the cache: a map keeps the disk space of a file that was deleted."""
        largest = max(
            self._image.shards[shard]["bytes"] + self._text.shards[shard]["bytes"]
            for shard in self._shards
        )
        return min(max(self._cache_share // max(largest, 1), 1), MAX_OPEN_SHARDS)


def _expect_checksum(index: np.ndarray, arrays: Arrays, where: Location) -> None:
    """A wrong index would give a sample another one's caption, and nothing else would tell."""
    if not np.array_equal(index_checksum(index), arrays.get("index_checksum", ())):
        raise CorruptFileError(
            where, "its index does not match its checksum", remedy=repair_remedy(where)
        )


def _expect_within(indices: np.ndarray, length: int, size: int, name: str, where: Location) -> None:
    wrong = np.flatnonzero((indices < 0) | (indices >= size))
    if len(indices) != length or len(wrong):
        found = f"{len(indices)} entries"
        if len(wrong):
            found = f"{indices[wrong[0]]} at row {wrong[0]}"
        raise CorruptFileError(
            where,
            f"{name}: {found}",
            wanted=f"{length} indices below {size}",
            remedy=repair_remedy(where),
        )
