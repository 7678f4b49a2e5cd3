"""A checksum for each stored row, cheap enough to check every row that training reads.

The sum of a row's bytes as little-endian 64-bit words (the last one filled up with zeros), modulo
2**64; where a row is spread over several arrays, the sum of their sums. Any change within a
single word is found, and random damage to many words but for one case in 2**64; words that only
changed places within a row are not (the file's sha256 finds those: `verify --full`). numpy sums
faster than the copy that a batch is made by; a CRC would take longer than the copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from shards.column import ColumnSpec

_WORD = np.dtype("<u8")


def with_checksums(
    spec: ColumnSpec, arrays: dict[str, np.ndarray], index: np.ndarray
) -> dict[str, np.ndarray]:
    """A shard's arrays and their checksums.

    Args:
        spec: of the column.
        arrays: among them its `row_arrays`, [N, ...]; of buckets, N is the sum of theirs.
        index: `row` or `caption`, int32: what connects the rows with the ledger's.

    Returns:
        the arrays, `checksum` uint64 [N] of their rows and `index_checksum` uint64 [1].
    """
    checksum = column_checksums(spec, arrays)
    return {**arrays, "checksum": checksum, "index_checksum": index_checksum(index)}


def column_checksums(spec: ColumnSpec, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Checksums uint64 [N] of all rows of a shard, group after group."""
    groups = [row_checksums([arrays[name] for name in group]) for group in spec.row_groups]
    return np.concatenate(groups)


def index_checksum(index: np.ndarray) -> np.ndarray:
    """Checksum uint64 [1] over the whole of `row` or `caption`."""
    return row_checksums([index[None]])


def row_checksums(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Checksums uint64 [N] of the rows of arrays [N, ...] that belong together."""
    total = np.zeros(len(arrays[0]), _WORD)
    for array in arrays:
        row_length = math.prod(array.shape[1:])
        rows = np.ascontiguousarray(array).reshape(len(array), row_length).view(np.uint8)
        whole = rows.shape[1] // _WORD.itemsize * _WORD.itemsize
        total += rows[:, :whole].view(_WORD).sum(axis=1, dtype=_WORD)
        if rest := rows.shape[1] - whole:
            last = np.zeros((len(rows), _WORD.itemsize), np.uint8)
            last[:, :rest] = rows[:, whole:]
            total += last.view(_WORD)[:, 0]
    return total
