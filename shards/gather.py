"""Rows of one column, copied out of its memory-mapped shards into batches, each row checked."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from shards.arrays import Arrays, repair_remedy
from shards.checksum import row_checksums
from shards.column import ColumnSpec
from shards.dataset import Column
from shards.errors import CorruptFileError

Allocate = Callable[[tuple[int, ...], Any], np.ndarray]

_MAX_OPEN_SHARDS = 1024
_HANDLES_FRAC = (
    1 / 8
)  # of a process's, for the shards of a column; mirrored latents have twice that


def max_open_shards() -> int:
    """Shards of a column that may stay mapped: each keeps a file handle, and `ulimit -n` is low."""
    handles, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if handles == resource.RLIM_INFINITY:
        return _MAX_OPEN_SHARDS
    return max(1, min(int(handles * _HANDLES_FRAC), _MAX_OPEN_SHARDS))


@dataclass(frozen=True)
class _OpenShard:
    """A mapped shard: the arrays whose rows make a batch, and their checksums."""

    rows: tuple[np.ndarray, ...]  # each [N, numbers of a row]
    checksum: np.ndarray


class RowGatherer:
    """Gathers rows of one column, or of columns that are alike.

    Args:
        columns: of an open dataset, of equal row arrays and shards.
        shards: names of their shards; a shard is then known by its index in this list, those of
            the second column after those of the first.
        allocate: makes a batch's buffers from shape and dtype.
        max_open: shards that stay mapped; see `max_open_shards`.
    """

    def __init__(
        self,
        columns: Sequence[Column[Any]],
        shards: list[str],
        allocate: Allocate,
        max_open: int,
    ) -> None:
        self._columns, self._shards, self._allocate = columns, shards, allocate
        spec: ColumnSpec = columns[0].spec
        self._row_arrays = [(n, np.dtype(d), shape) for n, (d, shape) in spec.row_arrays.items()]
        self._open_shard = lru_cache(maxsize=max_open)(self._map_shard)

    def gather(self, shards: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
        """Copy rows, in the order asked for.

        Args:
            shards: int64 [B], indices of shards.
            rows: int64 [B], rows within them.

        Returns:
            one array [B, ...] for each of the column's row arrays (`ColumnSpec.row_arrays`).

        Raises:
            CorruptFileError: a shard is missing, cut short or not what its column says, or a row
                does not match its checksum.
        """
        batch = [self._allocate((len(rows), *shape), dtype) for _, dtype, shape in self._row_arrays]
        checksums = np.empty(len(rows), np.uint64)
        is_open = {index: self._open_shard(index) for index in set(shards.tolist())}
        # Row by row, straight into place: indexing with an array would copy everything twice.
        targets = [array.reshape(len(rows), math.prod(array.shape[1:])) for array in batch]
        for at, (index, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
            shard = is_open[index]
            for target, source in zip(targets, shard.rows, strict=True):
                target[at] = source[row]
            checksums[at] = shard.checksum[row]
        wrong = np.flatnonzero(row_checksums(batch) != checksums)
        if len(wrong):
            self._refuse_row(int(shards[wrong[0]]), int(rows[wrong[0]]))
        return batch

    def _refuse_row(self, index: int, row: int) -> None:
        column, name = self._find(index)
        where = column.path_of(name)
        raise CorruptFileError(
            where, f"row {row} does not match its checksum", remedy=repair_remedy(where)
        )

    def _find(self, index: int) -> tuple[Column[Any], str]:
        number, shard = divmod(index, len(self._shards))
        return self._columns[number], self._shards[shard]

    def _map_shard(self, index: int) -> _OpenShard:
        column, name = self._find(index)
        arrays = column.map_shard(name)
        where = column.path_of(name)
        checksum = expect_array(arrays, "checksum", np.dtype(np.uint64), (), where)
        found = tuple(
            expect_array(arrays, key, dtype, shape, where) for key, dtype, shape in self._row_arrays
        )
        lengths = {len(array) for array in (checksum, *found)}
        if len(lengths) > 1:
            raise CorruptFileError(
                where, f"arrays of {sorted(lengths)} rows", remedy=repair_remedy(where)
            )
        flat = (array.reshape(len(array), math.prod(array.shape[1:])) for array in found)
        return _OpenShard(tuple(flat), checksum)


def expect_array(
    arrays: Arrays, name: str, dtype: np.dtype, row_shape: tuple[int, ...], where: object
) -> np.ndarray:
    """One array of a shard, held to the dtype and the row shape that it must have.

    Raises:
        CorruptFileError: it is not there, or another.
    """
    array = arrays.get(name)
    if array is None or array.dtype != dtype or array.ndim == 0 or array.shape[1:] != row_shape:
        found = "no" if array is None else f"{array.dtype} {list(array.shape)}"
        raise CorruptFileError(
            where,
            f"{found} {name}",
            wanted=f"{dtype} {['N', *row_shape]}",
            remedy=repair_remedy(where),  # type: ignore[arg-type]
        )
    return array
