"""The reader of latent shards: rows gathered from memory maps into batches by one thread."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from shards.arrays import Arrays
from shards.batch import LatentBatch
from shards.column import ImageColumn, TextColumn
from shards.dataset import Column, Dataset
from shards.errors import CorruptFileError
from shards.order import DEFAULT_WINDOW, SampleOrder
from shards.prefetch import prefetch
from shards.storage import canonical_json

# Open maps are bounded: a process may hold about 65,000 of them, a dataset may have more shards.
_MAX_OPEN_SHARDS = 1024
_PREFETCH_DEPTH = 4

Allocate = Callable[[tuple[int, ...], Any], np.ndarray]


class LatentReader:
    """A `BatchSource` over one image column and one text column of a latent dataset.

    Args:
        dataset: open dataset.
        image: column of moments; its rows are the samples.
        text: column of captions.
        seed: of the order.
        global_batch_size: samples per step over all processes.
        num_partitions: see `shards.order`.
        window: shuffle window in samples.
        allocate: makes a batch's buffers from shape and dtype; pass one that makes pinned memory
            to let the copy to the device overlap.
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
        allocate: Allocate = np.empty,
    ) -> None:
        dataset.check_trainable(image, text)
        self.latent_shape = image.spec.latent_shape
        self.scaling_factor = image.spec.scaling_factor
        self.null_states = np.array(dataset.null_states(text))  # a copy, no longer a map
        self._image, self._text, self._allocate = image, text, allocate
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
        self._open_shard = lru_cache(maxsize=_MAX_OPEN_SHARDS)(self._map_shard)

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
        return prefetch(self._gather_all(first_step, positions), _PREFETCH_DEPTH)

    def _gather_all(self, first_step: int, positions: range) -> Iterator[LatentBatch]:
        step = first_step
        while True:
            yield self.gather(step, positions)
            step += 1

    def gather(self, step: int, positions: range) -> LatentBatch:
        """One batch, copied row by row out of the maps.

        Raises:
            CorruptFileError: a shard is missing, cut short, or its columns disagree.
        """
        shards, rows = self.order.locate(step, positions)
        spec = self._text.spec
        num_channels, *size = self.latent_shape
        moments = self._allocate((len(rows), 2 * num_channels, *size), np.float16)
        states = self._allocate((len(rows), spec.num_tokens, spec.dim), np.float16)
        for shard in np.unique(shards):
            members = np.flatnonzero(shards == shard)
            wanted = rows[members]
            shard_moments, caption, shard_states = self._open_shard(int(shard))
            moments[members] = shard_moments[wanted]
            states[members] = shard_states[caption[wanted]]
        samples = self.sample_numbers(shards, rows)
        return LatentBatch(step=step, samples=samples, moments=moments, states=states)

    def sample_numbers(self, shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Number in the whole dataset of samples given by shard index and row."""
        numbers: np.ndarray = self._first_sample[shards] + rows
        return numbers

    def _map_shard(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Moments, caption index *per image row*, and states of one shard; checked once."""
        name = self._shards[index]
        image, text = self._image.map_shard(name), self._text.map_shard(name)
        if not self._fit(name, image, text):
            raise CorruptFileError(
                self._image.dataset / self._image.column_id / name,
                "image rows and captions do not belong together",
                remedy=f"python -m shards verify --full {self._image.dataset}",
            )
        return image["moments"], np.asarray(text["caption"])[image["row"]], text["states"]

    def _fit(self, name: str, image: Arrays, text: Arrays) -> bool:
        """Whether a shard's arrays are what the specs say and point nowhere but into each other."""
        if not (image.keys() >= {"moments", "row"} and text.keys() >= {"caption", "states"}):
            return False
        moments, row = image["moments"], image["row"]
        caption, states = text["caption"], text["states"]
        num_rows, num_source_rows = (self._image.shards[name][key] for key in ("rows", "rows_in"))
        num_channels, *size = self.latent_shape
        return (
            moments.dtype == states.dtype == np.float16
            and moments.shape == (num_rows, 2 * num_channels, *size)
            and states.shape[1:] == (self._text.spec.num_tokens, self._text.spec.dim)
            and row.shape == (num_rows,)
            and caption.shape == (num_source_rows,)
            and _within(row, num_source_rows)
            and _within(caption[row], len(states))
        )


def _within(indices: np.ndarray, size: int) -> bool:
    return not len(indices) or bool(indices.min() >= 0 and indices.max() < size)
