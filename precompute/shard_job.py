"""Encode one image shard into its rows of every column. Idempotent: equal input, equal bytes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version

import numpy as np
import torch

from precompute.columns import CALIBRATION_CAPTIONS
from precompute.decoding import decode_sample, map_ahead
from precompute.encoders import ImageEncoder, TextEncoder, to_pixel_values
from precompute.filters import Filter
from shards.arrays import Arrays, save_arrays
from shards.checksum import with_checksums
from shards.column import ColumnSpec, ImageColumn, Json, TextColumn
from shards.dataset import column_path, ledger_path
from shards.errors import DatasetError
from shards.image_shards import ShardStream, SourceShard
from shards.ledger import OK, LedgerRow, count_reasons, save_ledger
from shards.quantize import (
    channel_scale,
    latents_of,
    quantize_latents,
    quantize_states,
    states_of,
)
from shards.receipt import (
    NULL,
    Receipt,
    commit,
    read_committed,
    read_receipt_of,
    refuse_changed_source,
)
from shards.storage import Location

TEXT_BATCH_SIZE = 64
READ_AND_DECODE = "read_and_decode"


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """What a worker holds while it encodes shards."""

    image: ImageEncoder
    text: TextEncoder
    device: torch.device
    batch_size: int
    pool: ThreadPoolExecutor
    decode_ahead: int
    model_name: str


@dataclass
class TimeAccount:
    """Seconds of the encoding thread by stage; what it waits for is counted where it waits."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to one stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def of_column(self, column: ColumnSpec) -> dict[str, float]:
        """What one column cost: its encoding, and the reading and decoding that all share."""
        return {
            READ_AND_DECODE: round(self.seconds[READ_AND_DECODE], 3),
            "encode": round(self.seconds.get(f"encode {column.name}", 0.0), 3),  # no rows, no time
        }


def library_versions() -> dict[str, str]:
    """Libraries that stored bytes may depend on."""
    names = ("torch", "diffusers", "transformers", "pillow", "numpy", "safetensors", "pyarrow")
    return {name: version(name) for name in names}


class _ImageRows:
    """The growing rows of one image column in one shard."""

    def __init__(self, spec: ImageColumn, encoders: Encoders, account: TimeAccount) -> None:
        self.spec, self._encoders, self._account = spec, encoders, account
        self._pending: list[tuple[int, np.ndarray]] = []
        self._parts: list[Arrays] = []
        self._rows: list[int] = []
        self.absent: Counter[str] = Counter()
        self._float32_fallbacks = 0
        self._latents = _Moments()
        self._error = _RelativeError()

    def add(self, row: int, square: np.ndarray | None) -> None:
        """Take the next sample; None when its image is smaller than the resolution."""
        if square is None:
            self.absent["too_small"] += 1
            return
        self._pending.append((row, square))
        if len(self._pending) == self._encoders.batch_size:
            self.flush()

    def flush(self) -> None:
        """Encode what is pending. Batches never reach into another shard."""
        if not self._pending:
            return
        rows, squares = zip(*self._pending, strict=True)
        self._pending = []
        with self._account.stage(f"encode {self.spec.name}"):
            pixel_values = to_pixel_values(np.stack(squares), self._encoders.device)
            moments, fallbacks = self._encoders.image.encode(pixel_values)
            self._float32_fallbacks += fallbacks
            half = moments.half()
            finite = torch.isfinite(half).flatten(1).all(dim=1)
            kept = finite.cpu().numpy()
            self._latents.add(half[finite], self.spec)
            self._parts.append(self._stored(half[finite].cpu().numpy()))
        self._rows.extend(np.asarray(rows)[kept].tolist())
        if dropped := int((~kept).sum()):
            self.absent["not_finite"] += dropped

    def _stored(self, moments: np.ndarray) -> Arrays:
        """Finite moments [N, 2C, h, w] float16 as this column stores them."""
        latents = moments
        if self.spec.latents == "mean":
            latents = np.ascontiguousarray(moments[:, : self.spec.latent_channels])
        if self.spec.storage_dtype != "int8" or not len(latents):
            return {self.spec.latents: latents} if len(latents) else {}
        values, scale = quantize_latents(latents)
        means = slice(0, self.spec.latent_channels)  # the log-variances would hide their error
        self._error.add(latents[:, means], latents_of(values, scale).dequantize()[:, means])
        return {self.spec.latents: values, "scale": scale}

    def arrays(self) -> Arrays:
        """`ColumnSpec.row_arrays` [N, ...], their checksums, and `row` [N] int32."""
        stored = {
            name: np.concatenate(
                [np.empty((0, *shape), dtype), *(part[name] for part in self._parts if part)]
            )
            for name, (dtype, shape) in self.spec.row_arrays.items()
        }
        rows = np.asarray(self._rows, dtype=np.int32)
        return {**with_checksums(self.spec, stored, rows), "row": rows}

    def stats(self) -> Json:
        """What there is to know about the numbers; empty for an empty shard."""
        if not self._rows:
            return {}
        fallbacks = {"float32_fallbacks": self._float32_fallbacks}
        return {**self._latents.stats(), **self._error.stats(), **fallbacks}


class _Moments:
    """First two moments of the scaled latents that training will sample."""

    def __init__(self) -> None:
        self._count, self._sum, self._sum_of_squares = 0, 0.0, 0.0

    def add(self, moments: torch.Tensor, spec: ImageColumn) -> None:
        """Take finite moments [N, 2C, h, w]."""
        mean, logvar = moments.double().chunk(2, dim=1)
        factor = spec.scaling_factor
        self._count += mean.numel()
        self._sum += factor * mean.sum().item()
        square = mean.square()
        if spec.latents == "moments":
            square = square + logvar.clamp(-30.0, 20.0).exp()
        self._sum_of_squares += factor**2 * square.sum().item()

    def stats(self) -> Json:
        """`latent_mean` and `latent_std`."""
        mean = self._sum / self._count
        variance = max(self._sum_of_squares / self._count - mean**2, 0.0)
        return {"latent_mean": round(mean, 6), "latent_std": round(variance**0.5, 6)}


class _RelativeError:
    """Root of the mean squared error over that of the numbers themselves."""

    def __init__(self) -> None:
        self._error = self._square = 0.0

    def add(self, exact: np.ndarray, stored: np.ndarray) -> None:
        """Take numbers and what became of them."""
        wide = exact.astype(np.float64)
        self._error += float(np.square(wide - stored).sum())
        self._square += float(np.square(wide).sum())

    def stats(self) -> Json:
        """`relative_error`; empty where nothing was added."""
        if not self._square:
            return {}
        return {"relative_error": round((self._error / self._square) ** 0.5, 6)}


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
    images = [_ImageRows(c, encoders, account) for c in columns if isinstance(c, ImageColumn)]
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
            arrays, stats = _encode_captions(dataset, column, ledger, encoders, account)
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


def _encode_captions(
    dataset: Location,
    column: TextColumn,
    ledger: list[LedgerRow],
    encoders: Encoders,
    account: TimeAccount,
) -> tuple[Arrays, Json]:
    """Each distinct caption once, in order of first appearance; -1 where the row was dropped."""
    index: dict[str, int] = {}
    caption = [
        index.setdefault(row.caption or "", len(index)) if row.status == OK else -1
        for row in ledger
    ]
    with account.stage(f"encode {column.name}"):
        arrays, stats = _store_texts(dataset, column, list(index), encoders.text)
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
    error, states = _RelativeError(), arrays["states"]
    values, scale = quantize_states(states, static)
    error.add(states, states_of(values, scale, static).dequantize())
    return {"input_ids": arrays["input_ids"], "states": values, "scale": scale}, error.stats()


def encode_texts(captions: list[str], encoder: TextEncoder) -> Arrays:
    """`input_ids` [U, T] uint16 and `states` [U, T, D] float16."""
    # An empty list still has to yield arrays of the right shape: encode one caption, keep none.
    input_ids = encoder.tokenize(captions or [""])
    parts = [
        encoder.encode(input_ids[start : start + TEXT_BATCH_SIZE]).half().cpu().numpy()
        for start in range(0, len(input_ids), TEXT_BATCH_SIZE)
    ]
    states = np.concatenate(parts)
    if not np.isfinite(states).all():
        worst = captions[int(np.flatnonzero(~np.isfinite(states).all(axis=(1, 2)))[0])]
        raise DatasetError(
            "text encoder",
            f"states of {worst!r} are not finite in float16",
            remedy="--dtype float32, or check the text encoder's weights",
        )
    return {"input_ids": input_ids[: len(captions)], "states": states[: len(captions)]}


def write_null(dataset: Location, column: TextColumn, encoders: Encoders) -> None:
    """What a text column stores of the empty caption, once; see `Dataset.read_null`."""
    path = column_path(dataset, column.column_id, NULL)
    if read_receipt_of(path):
        return
    if column.has_states:
        arrays = {name: array[0] for name, array in encode_texts([""], encoders.text).items()}
    else:
        arrays = {"input_ids": encoders.text.tokenize([""])[0]}
    if column.storage_dtype == "int8":
        calibration = encode_texts(list(CALIBRATION_CAPTIONS), encoders.text)
        arrays["channel_scale"] = channel_scale(calibration["states"])
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
