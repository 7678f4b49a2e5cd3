"""Encode one image shard into its rows of every column. Idempotent: equal input, equal bytes.

    read ─▶ decode, crop: threads, ahead ─▶ encode: one shard at a time ─▶ write

Several shards go through this at once (`precompute.worker`): while one encodes, the next decodes
and the one before writes. Batches never hold samples of two shards.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from threading import Lock
from typing import Protocol

from precompute.decoding import DecodedSample
from precompute.filters import Filter
from precompute.image_encoder import ImageEncoder
from precompute.image_rows import ImageRows
from precompute.shard_task import ShardTask
from precompute.text_encoder import TextEncoder
from precompute.text_rows import encode_captions, encode_null
from precompute.time_account import WRITE, TimeAccount, bottleneck
from precompute.transform import Crop
from shards.arrays import Arrays, save_arrays
from shards.column import ColumnSpec, ImageColumn, Json, TextColumn
from shards.errors import CorruptFileError
from shards.layout import column_path, ledger_path
from shards.ledger import OK, LedgerRow, count_reasons, read_ledger, save_ledger
from shards.receipt import NULL, Receipt, commit, read_receipt_of, refuse_changed_source
from shards.source_shard import SourceShard
from shards.storage import Location


class DecodedSamples(Protocol):
    """The decoded samples of one shard, in order; decoding begins before they are asked for."""

    def __iter__(self) -> Iterator[DecodedSample]: ...

    def close(self) -> None:
        """End the decoding."""

    @property
    def source(self) -> Json:
        """`url`, `bytes` and `sha256` of the shard, once all samples were taken."""

    @property
    def seconds(self) -> dict[str, float]:
        """Of the thread that read."""


OpenDecoded = Callable[[SourceShard, list[Crop]], DecodedSamples]


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What a worker holds while it encodes shards.

    Args:
        image: None where there is no image column.
        text: by `TextColumn.part`.
        open_decoded: starts decoding a shard, here or elsewhere.
        batch_size: images per call of the encoder.
        decode_workers: threads behind `open_decoded`.
        compiled: whether the encoders are compiled.
        encoding: one shard at a time has the encoders.
    """

    dataset: Location
    image: ImageEncoder | None
    text: dict[str, TextEncoder]
    model_name: str
    wanted: Filter
    caption_field: str
    batch_size: int
    decode_workers: int
    open_decoded: OpenDecoded
    compiled: bool = False
    encoding: Lock = field(default_factory=Lock)


@cache
def library_versions(*, compiled: bool = False) -> dict[str, str]:
    """Libraries that stored bytes may depend on; `inductor` among them: encoders are compiled."""
    names = ("torch", "diffusers", "transformers", "pillow", "simplejpeg", "numpy", "safetensors")
    found = {name: version(name) for name in (*names, "pyarrow")}
    return found | ({"inductor": found["torch"]} if compiled else {})


def encode_shard(
    task: ShardTask, tools: Tools, on_samples: Callable[[int], object] = lambda _: None
) -> TimeAccount:
    """Write a shard's rows of the columns that lack it, then its ledger, which makes it count.

    Args:
        task: what is to be done.
        tools: encoders and threads.
        on_samples: called with the number of source samples that were read since, for a bar.

    Raises:
        UnreadableShardError: the source cannot be read; nothing was written.
        DatasetError: the source is not the one that the dataset was made from.
    """
    account = TimeAccount()
    if task.has_ledger and not any(isinstance(c, ImageColumn) for c in task.columns):
        _encode_from_ledger(task, tools, account, on_samples)
        return account
    images = {
        column.column_id: ImageRows(column, tools.image, tools.batch_size, account)
        for column in task.columns
        if isinstance(column, ImageColumn) and tools.image
    }
    crops = [Crop.of_column(rows.spec) for rows in images.values()]
    known = _known_rows(task, tools)
    with closing(tools.open_decoded(task.source, crops)) as decoded, tools.encoding:
        ledger = _encode_images(decoded, list(images.values()), known, account, on_samples)
        account.add(decoded.seconds)
        source = decoded.source
        if task.receipt:
            refuse_changed_source(task.receipt, tools.dataset, source)
        texts = _encode_texts(task, tools, ledger, account)
    facts = _facts(task, tools, source, len(ledger))
    dropped = count_reasons(ledger)
    for column in task.columns:
        if isinstance(column, TextColumn):
            arrays, stats, absent = *texts[column.column_id], dropped
        else:
            rows = images[column.column_id]
            arrays, stats = rows.arrays(), rows.stats()
            absent = Counter(dropped) + rows.absent  # they may share a reason
        _commit_column(tools, facts, column, arrays, stats, absent, account)
    if not task.has_ledger:
        with account.stage(WRITE):
            _commit_ledger(tools, facts, ledger, dropped)
    return account


def _known_rows(task: ShardTask, tools: Tools) -> list[LedgerRow] | None:
    """The shard's rows as the ledger has them, which then say what became of each sample."""
    if not task.has_ledger:
        return None
    path = ledger_path(tools.dataset, task.source.name)
    return [LedgerRow(**row) for row in read_ledger(path)]


def _encode_images(
    decoded: DecodedSamples,
    images: list[ImageRows],
    known: list[LedgerRow] | None,
    account: TimeAccount,
    on_samples: Callable[[int], object],
) -> list[LedgerRow]:
    """Take all samples of a shard, and encode what the columns want of them."""
    ledger: list[LedgerRow] = []
    for sample in decoded:
        account.add(sample.seconds)
        row = sample.row
        if known is not None:
            row = _row_of(known, len(ledger), sample)
        if row.status == OK:
            for number, image in enumerate(images):
                if number in sample.crops:
                    image.add(len(ledger), *sample.crops[number])
                else:
                    # Good when the ledger was written, and not now: another release of a decoder.
                    image.leave_out("too_small" if sample.row.status == OK else sample.row.status)
        ledger.append(row)
        on_samples(1)
    for image in images:
        image.flush()
    if known is not None and len(known) != len(ledger):
        raise _another_ledger(f"{len(ledger)} samples, {len(known)} in its ledger")
    return ledger


def _row_of(known: list[LedgerRow], at: int, sample: DecodedSample) -> LedgerRow:
    if at >= len(known) or known[at].key != sample.row.key:
        raise _another_ledger(f"sample {at} is {sample.row.key!r}")
    return known[at]


def _another_ledger(found: str) -> CorruptFileError:
    return CorruptFileError(
        "image shard",
        f"does not have the samples of its ledger ({found})",
        remedy="python -m shards verify --full <dataset> says whether the ledger is damaged",
    )


def _encode_texts(
    task: ShardTask, tools: Tools, ledger: list[LedgerRow], account: TimeAccount
) -> dict[str, tuple[Arrays, Json]]:
    return {
        column.column_id: encode_captions(
            tools.dataset, column, ledger, tools.text[column.part], account
        )
        for column in task.columns
        if isinstance(column, TextColumn)
    }


def _encode_from_ledger(
    task: ShardTask,
    tools: Tools,
    account: TimeAccount,
    on_samples: Callable[[int], object],
) -> None:
    """Add text columns to a shard that is there: the ledger has its captions."""
    ledger = _known_rows(task, tools)
    assert ledger is not None
    assert task.receipt is not None
    with tools.encoding:
        texts = _encode_texts(task, tools, ledger, account)
    on_samples(len(ledger))
    facts = _facts(task, tools, task.receipt.source, len(ledger))
    dropped = count_reasons(ledger)
    for column in task.columns:
        _commit_column(tools, facts, column, *texts[column.column_id], dropped, account)


def _facts(task: ShardTask, tools: Tools, source: Json, rows_in: int) -> Json:
    """What the receipts of all files of a shard share."""
    return {
        "shard": task.source.name,
        "source": source,
        "rows_in": rows_in,
        "versions": library_versions(compiled=tools.compiled),
    }


def _commit_column(
    tools: Tools,
    facts: Json,
    column: ColumnSpec,
    arrays: Arrays,
    stats: Json,
    absent: dict[str, int],
    account: TimeAccount,
) -> None:
    path = column_path(tools.dataset, column.column_id, facts["shard"])
    index = arrays[column.index_array]
    num_rows = int((index >= 0).sum())
    seconds: Json = account.of_column(column)
    seconds["decode_workers"] = tools.decode_workers
    seconds["bottleneck"] = bottleneck(account.seconds, tools.decode_workers)
    start = time.perf_counter()

    def receipt_of(written: Json) -> Receipt:
        return Receipt(
            **facts,
            **written,
            column=column.to_json(),
            rows=num_rows,
            absent=dict(sorted(absent.items())),
            stats=stats,
            model=tools.model_name,
            timings={**seconds, WRITE: round(time.perf_counter() - start, 3)},
        )

    with account.stage(WRITE):
        commit(path, partial(save_arrays, arrays=arrays), receipt_of)


def _commit_ledger(
    tools: Tools, facts: Json, ledger: list[LedgerRow], dropped: dict[str, int]
) -> None:
    """Write the ledger and its receipt: from here on the shard counts."""
    settings = {"filter": tools.wanted.expression, "caption_field": tools.caption_field}
    stats = {name: value for name, value in settings.items() if value}

    def receipt_of(written: Json) -> Receipt:
        rows = len(ledger) - sum(dropped.values())
        return Receipt(**facts, **written, column=None, rows=rows, absent=dropped, stats=stats)

    receipt = commit(
        ledger_path(tools.dataset, facts["shard"]), partial(save_ledger, rows=ledger), receipt_of
    )
    refuse_changed_source(receipt, tools.dataset, facts["source"])


def write_null(
    dataset: Location,
    column: TextColumn,
    encoder: TextEncoder,
    model: str,
    *,
    compiled: bool = False,
) -> None:
    """What a text column stores of the empty caption, once; see `Dataset.read_null`."""
    path = column_path(dataset, column.column_id, NULL)
    if read_receipt_of(path):
        return
    arrays = encode_null(column, encoder)
    receipt_of = partial(
        Receipt,
        shard=NULL,
        column=column.to_json(),
        source={},
        rows_in=1,
        rows=1,
        absent={},
        model=model,
        versions=library_versions(compiled=compiled),
    )
    commit(path, partial(save_arrays, arrays=arrays), lambda written: receipt_of(**written))
