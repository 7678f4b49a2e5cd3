"""Encode one image shard into its rows of every column. Idempotent: equal input, equal bytes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

from precompute.decoding import decode_sample, map_ahead
from precompute.encoders import ImageEncoder, TextEncoder
from precompute.filters import Filter
from precompute.image_rows import ImageRows
from precompute.text_rows import encode_captions, encode_null
from precompute.time_account import READ_AND_DECODE, TimeAccount
from shards.arrays import Arrays, save_arrays
from shards.column import ColumnSpec, ImageColumn, Json, TextColumn
from shards.image_shards import ShardStream, SourceShard
from shards.layout import column_path, ledger_path
from shards.ledger import OK, LedgerRow, count_reasons, save_ledger
from shards.receipt import NULL, Receipt, commit, read_receipt_of, refuse_changed_source
from shards.storage import Location


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """What a worker holds while it encodes shards."""

    image: ImageEncoder
    text: TextEncoder
    batch_size: int
    pool: ThreadPoolExecutor
    decode_ahead: int
    model_name: str


def library_versions() -> dict[str, str]:
    """Libraries that stored bytes may depend on."""
    names = ("torch", "diffusers", "transformers", "pillow", "numpy", "safetensors", "pyarrow")
    return {name: version(name) for name in names}


def encode_shard(
    dataset: Location,
    source: SourceShard,
    columns: list[ColumnSpec],
    encoders: Encoders,
    on_sample: Callable[[], object] = lambda: None,
    wanted: Filter | None = None,
) -> TimeAccount:
    """Write a shard's ledger, where it is not there, and its rows of some columns.

    Args:
        dataset: folder of the latent dataset.
        source: the image shard.
        columns: the columns that lack this shard.
        encoders: the loaded encoders.
        on_sample: called once per source sample, for a progress bar.
        wanted: drops samples before they are decoded; one and the same for the whole dataset.

    Raises:
        DatasetError: the source is not the one that the ledger was written from.
    """
    account = TimeAccount()
    images = [
        ImageRows(column, encoders.image, encoders.batch_size, account)
        for column in columns
        if isinstance(column, ImageColumn)
    ]
    stream = ShardStream(source)
    resolutions = [image.spec.resolution for image in images]
    ledger: list[LedgerRow] = []
    decode = partial(decode_sample, resolutions=resolutions, wanted=wanted)
    decoded = map_ahead(encoders.pool, decode, stream, encoders.decode_ahead)
    while True:
        with account.stage(READ_AND_DECODE):
            sample = next(decoded, None)
        if sample is None:
            break
        if sample.row.status == OK:
            for image in images:
                image.add(len(ledger), sample.squares.get(image.spec.resolution))
        ledger.append(sample.row)
        on_sample()
    for image in images:
        image.flush()

    facts: Json = {
        "shard": source.name,
        "source": {"url": source.url, "bytes": source.num_bytes, "sha256": stream.sha256},
        "rows_in": len(ledger),
        "versions": library_versions(),
    }
    dropped = count_reasons(ledger)
    with account.stage("write"):
        _write_ledger(dataset, facts, ledger, dropped, wanted)
    for column in columns:
        path = column_path(dataset, column.column_id, source.name)
        if isinstance(column, TextColumn):
            arrays, stats = encode_captions(dataset, column, ledger, encoders.text, account)
            rows, absent = int((arrays["caption"] >= 0).sum()), dropped
        else:
            image = images[resolutions.index(column.resolution)]  # type: ignore[attr-defined]
            arrays, stats = image.arrays(), image.stats()
            rows, absent = len(arrays["row"]), {**dropped, **image.absent}
        receipt_of = partial(
            Receipt,
            **facts,
            column=column.to_json(),
            rows=rows,
            absent=absent,
            stats=stats,
            model=encoders.model_name,
            timings=account.of_column(column),
        )
        with account.stage("write"):
            _commit_arrays(path, arrays, receipt_of)
    return account


def _commit_arrays(path: Location, arrays: Arrays, receipt_of: Callable[..., Receipt]) -> None:
    commit(path, partial(save_arrays, arrays=arrays), lambda written: receipt_of(**written))


def _write_ledger(
    dataset: Location,
    facts: Json,
    ledger: list[LedgerRow],
    dropped: dict[str, int],
    wanted: Filter | None,
) -> None:
    """Write the ledger and its receipt; an earlier one of the same source stays as it is."""
    rows = len(ledger) - sum(dropped.values())
    stats = {"filter": wanted.expression} if wanted else {}
    receipt = commit(
        ledger_path(dataset, facts["shard"]),
        partial(save_ledger, rows=ledger),
        lambda written: Receipt(
            **facts, column=None, rows=rows, absent=dropped, stats=stats, **written
        ),
    )
    refuse_changed_source(receipt, dataset, facts["source"])


def write_null(dataset: Location, column: TextColumn, encoders: Encoders) -> None:
    """What a text column stores of the empty caption, once; see `Dataset.read_null`."""
    path = column_path(dataset, column.column_id, NULL)
    if read_receipt_of(path):
        return
    arrays = encode_null(column, encoders.text)
    receipt_of = partial(
        Receipt,
        shard=NULL,
        column=column.to_json(),
        source={},
        rows_in=1,
        rows=1,
        absent={},
        model=encoders.model_name,
        versions=library_versions(),
    )
    _commit_arrays(path, arrays, receipt_of)
