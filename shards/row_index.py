"""What connects the rows of columns: `row`, into the ledger, and `caption`, from there; checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shards.arrays import Arrays, repair_remedy
from shards.checksum import index_checksum
from shards.column import ImageColumn, Json, TextColumn
from shards.dataset import Column
from shards.errors import CorruptFileError
from shards.gather import expect_array
from shards.layout import ledger_path
from shards.ledger import read_ledger
from shards.storage import Location

_INDEX = np.dtype(np.int32)


def ledger_rows(image: Column[ImageColumn], shard: str) -> np.ndarray:
    """For each row of an image column's shard its row in the ledger, int32 [N].

    Raises:
        CorruptFileError: the shard is missing, or they are not rows of its ledger.
    """
    arrays, row = _map_row(image, shard)
    _expect_checksum(row, arrays, image.path_of(shard))
    return row


def caption_rows(image: Column[ImageColumn], text: Column[TextColumn], shard: str) -> np.ndarray:
    """For each row of an image column's shard its row in the text column, int32 [N].

    Raises:
        CorruptFileError: a shard is missing, or they are not rows of it.
    """
    image_path, text_path = image.path_of(shard), text.path_of(shard)
    image_arrays, row = _map_row(image, shard)
    text_arrays = text.map_shard(shard)
    caption = expect_array(text_arrays, "caption", _INDEX, (), text_path)
    num_captions = len(expect_array(text_arrays, "checksum", np.dtype(np.uint64), (), text_path))
    num_source_rows = image.shards[shard]["rows_in"]
    if len(caption) != num_source_rows:
        raise CorruptFileError(
            text_path,
            f"{len(caption)} captions",
            wanted=f"{num_source_rows}, one for each row of the ledger",
            remedy=repair_remedy(text_path),
        )
    captions = np.asarray(caption)[row]
    _expect_within(captions, len(row), num_captions, "caption of an image row", text_path)
    _expect_checksum(row, image_arrays, image_path)
    _expect_checksum(caption, text_arrays, text_path)
    return captions


def sample_keys(
    image: Column[ImageColumn], shards: Sequence[str], rows: Sequence[int]
) -> list[str]:
    """`<shard>/<key>` of rows of an image column, from the ledger.

    Args:
        image: of an open dataset.
        shards: of each sample.
        rows: of each sample, within its shard.

    Raises:
        CorruptFileError: the ledger, or the column, is not what its receipt says.
    """
    keys = {}
    for shard in set(shards):
        ledger = read_whole_ledger(image.dataset, shard, ["key"], image.shards[shard]["rows_in"])
        keys[shard] = [ledger[row]["key"] for row in ledger_rows(image, shard).tolist()]
    return [f"{shard}/{keys[shard][row]}" for shard, row in zip(shards, rows, strict=True)]


def read_whole_ledger(
    dataset: Location, shard: str, columns: Sequence[str], num_rows: int
) -> list[Json]:
    """Some columns of a shard's ledger, held to the number of its rows.

    Raises:
        CorruptFileError: missing, not parquet, or of another length.
    """
    path = ledger_path(dataset, shard)
    rows = read_ledger(path, columns)
    if len(rows) != num_rows:
        raise CorruptFileError(
            path, f"{len(rows)} rows", wanted=f"{num_rows}", remedy=repair_remedy(path)
        )
    return rows


def _map_row(image: Column[ImageColumn], shard: str) -> tuple[Arrays, np.ndarray]:
    where, entry = image.path_of(shard), image.shards[shard]
    arrays = image.map_shard(shard)
    row = expect_array(arrays, "row", _INDEX, (), where)
    _expect_within(row, entry["rows"], entry["rows_in"], "row", where)
    return arrays, row


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
