"""The rows of a text column: captions, each once, as token ids and states."""

from __future__ import annotations

import numpy as np

from precompute.columns import CALIBRATION_CAPTIONS
from precompute.measures import RelativeError
from precompute.text_encoder import TextEncoder, TextStates
from precompute.time_account import TimeAccount
from shards.arrays import Arrays
from shards.checksum import with_checksums
from shards.column import Json, TextColumn
from shards.errors import DatasetError
from shards.layout import column_path
from shards.ledger import OK, LedgerRow
from shards.quantize import channel_scale, quantize_states, states_of
from shards.receipt import NULL, read_committed
from shards.storage import Location

TEXT_BATCH_SIZE = 64


def encode_captions(
    dataset: Location,
    column: TextColumn,
    ledger: list[LedgerRow],
    encoder: TextEncoder,
    account: TimeAccount,
) -> tuple[Arrays, Json]:
    """A shard's arrays of a text column, and what there is to know about them.

    Each distinct caption once, in order of first appearance; -1 where the row was dropped.

    Args:
        dataset: holds the static scales of int8 states, in the column's null file.
        column: the text column.
        ledger: rows of the shard.
        encoder: the text encoder.
        account: counts the encoding.
    """
    index: dict[str, int] = {}
    caption = [
        index.setdefault(row.caption or "", len(index)) if row.status == OK else -1
        for row in ledger
    ]
    with account.stage(f"encode {column.name}"):
        arrays, stats = _store_texts(dataset, column, list(index), encoder)
    indices = np.asarray(caption, dtype=np.int32)
    arrays = {**with_checksums(column, arrays, indices), "caption": indices}
    return arrays, {**stats, "captions": len(index)}


def _store_texts(
    dataset: Location, column: TextColumn, captions: list[str], encoder: TextEncoder
) -> tuple[Arrays, Json]:
    """Captions as a text column stores them, and what that cost in precision."""
    if not column.has_states:
        return {"input_ids": encoder.tokenize(captions or [""])[: len(captions)]}, {}
    arrays = encode_texts(captions, encoder)
    if column.storage_dtype != "int8":
        return arrays, {}
    static = read_committed(column_path(dataset, column.column_id, NULL))["channel_scale"]
    error, states = RelativeError(), arrays["states"]
    values, scale = quantize_states(states, static)
    error.add(states, states_of(values, scale, static).dequantize())
    return {**arrays, "states": values, "scale": scale}, error.stats()


def encode_texts(captions: list[str], encoder: TextEncoder) -> Arrays:
    """`input_ids` [U, T] uint16, `states` [U, T, D] and perhaps `pooled` [U, P] float16."""
    # An empty list still has to yield arrays of the right shape: encode one caption, keep none.
    input_ids = encoder.tokenize(captions or [""])
    batches = [
        _half_arrays(encoder.encode(input_ids[start : start + TEXT_BATCH_SIZE]))
        for start in range(0, len(input_ids), TEXT_BATCH_SIZE)
    ]
    arrays = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    for name, array in arrays.items():
        finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if not finite.all():
            raise DatasetError(
                "text encoder",
                f"{name} of {captions[int(np.argmin(finite))]!r} are not finite in float16",
                remedy="--dtype float32, or check the text encoder's weights",
            )
    arrays["input_ids"] = input_ids
    return {name: array[: len(captions)] for name, array in arrays.items()}


def _half_arrays(encoded: TextStates) -> Arrays:
    named = encoded._asdict().items()
    return {name: tensor.half().cpu().numpy() for name, tensor in named if tensor is not None}


def encode_null(column: TextColumn, encoder: TextEncoder) -> Arrays:
    """What a text column stores of the empty caption; see `Dataset.read_null`."""
    if not column.has_states:
        return {"input_ids": encoder.tokenize([""])[0]}
    arrays = {name: array[0] for name, array in encode_texts([""], encoder).items()}
    if column.storage_dtype == "int8":
        calibration = encode_texts(list(CALIBRATION_CAPTIONS), encoder)
        arrays["channel_scale"] = channel_scale(calibration["states"])
    return arrays
