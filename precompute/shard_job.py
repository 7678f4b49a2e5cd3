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
from pathlib import Path

import numpy as np
import torch

from precompute.decoding import decode_sample, map_ahead
from precompute.encoders import ImageEncoder, TextEncoder, to_pixel_values
from shards.arrays import write_arrays
from shards.column import ColumnSpec, ImageColumn, Json, TextColumn
from shards.dataset import NULL, column_path, ledger_path
from shards.errors import DatasetError
from shards.image_shards import ShardStream, SourceShard
from shards.ledger import OK, LedgerRow, count_reasons, write_ledger
from shards.receipt import (
    Receipt,
    file_facts,
    read_receipt,
    read_receipt_of,
    receipt_path,
    refuse_changed_source,
    write_receipt,
)

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
        self._moments: list[np.ndarray] = []
        self._rows: list[int] = []
        self.absent: Counter[str] = Counter()
        self.float32_fallbacks = 0
        self._count = 0
        self._sum = self._sum_of_squares = 0.0

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
            self.float32_fallbacks += fallbacks
            stored = moments.half()
            finite = torch.isfinite(stored).flatten(1).all(dim=1)
            self._measure(stored[finite])
            kept = finite.cpu().numpy()
            self._moments.append(stored.cpu().numpy()[kept])
        self._rows.extend(np.asarray(rows)[kept].tolist())
        if dropped := int((~kept).sum()):
            self.absent["not_finite"] += dropped

    def _measure(self, stored: torch.Tensor) -> None:
        """First two moments of the scaled latents that training will sample."""
        mean, logvar = stored.double().chunk(2, dim=1)
        factor = self.spec.scaling_factor
        self._count += mean.numel()
        self._sum += factor * mean.sum().item()
        variance = logvar.clamp(-30.0, 20.0).exp()
        self._sum_of_squares += factor**2 * (mean.square() + variance).sum().item()

    def arrays(self) -> dict[str, np.ndarray]:
        """`moments` [N, 2C, h, w] float16 and `row` [N] int32."""
        channels, *size = self.spec.latent_shape
        empty = np.empty((0, 2 * channels, *size), np.float16)
        return {
            "moments": np.concatenate([empty, *self._moments]),
            "row": np.asarray(self._rows, dtype=np.int32),
        }

    def stats(self) -> Json:
        """Mean and deviation of the scaled latents; empty for an empty shard."""
        if not self._count:
            return {}
        mean = self._sum / self._count
        variance = max(self._sum_of_squares / self._count - mean**2, 0.0)
        return {
            "latent_mean": round(mean, 6),
            "latent_std": round(variance**0.5, 6),
            "float32_fallbacks": self.float32_fallbacks,
        }


def encode_shard(
    dataset: Path,
    source: SourceShard,
    columns: list[ColumnSpec],
    encoders: Encoders,
    on_sample: Callable[[], object] = lambda: None,
) -> TimeAccount:
    """Write a shard's ledger, where it is not there, and its rows of some columns.

    Args:
        dataset: folder of the latent dataset.
        source: the image shard.
        columns: the columns that lack this shard.
        encoders: the loaded encoders.
        on_sample: called once per source sample, for a progress bar.

    Raises:
        DatasetError: the source is not the one that the ledger was written from.
    """
    account = TimeAccount()
    images = [_ImageRows(c, encoders, account) for c in columns if isinstance(c, ImageColumn)]
    stream = ShardStream(source)
    resolutions = [image.spec.resolution for image in images]
    ledger: list[LedgerRow] = []
    decode = partial(decode_sample, resolutions=resolutions)
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
        _write_ledger(dataset, facts, ledger, dropped)
    for column in columns:
        path = column_path(dataset, column.column_id, source.name)
        if isinstance(column, TextColumn):
            arrays = _encode_captions(ledger, encoders, account)
            rows, absent, stats = int((arrays["caption"] >= 0).sum()), dropped, {}
        else:
            image = images[resolutions.index(column.resolution)]  # type: ignore[attr-defined]
            arrays, stats = image.arrays(), image.stats()
            rows, absent = len(arrays["row"]), {**dropped, **image.absent}
        with account.stage("write"):
            write_arrays(path, arrays)
            receipt = Receipt(
                **facts,
                column=column.to_json(),
                rows=rows,
                absent=absent,
                stats=stats,
                model=encoders.model_name,
                timings=account.of_column(column),
                **file_facts(path),
            )
            write_receipt(path, receipt)
    return account


def _write_ledger(
    dataset: Path, facts: Json, ledger: list[LedgerRow], dropped: dict[str, int]
) -> None:
    """Write the ledger and its receipt; an earlier one of the same source stays as it is."""
    path = ledger_path(dataset, facts["shard"])
    if receipt_path(path).exists():
        refuse_changed_source(read_receipt(receipt_path(path)), dataset, facts["source"])
    if read_receipt_of(path):
        return
    write_ledger(path, ledger)
    rows = len(ledger) - sum(dropped.values())
    write_receipt(
        path, Receipt(**facts, column=None, rows=rows, absent=dropped, **file_facts(path))
    )


def _encode_captions(
    ledger: list[LedgerRow], encoders: Encoders, account: TimeAccount
) -> dict[str, np.ndarray]:
    """Each distinct caption once, in order of first appearance; -1 where the row was dropped."""
    index: dict[str, int] = {}
    caption = [
        index.setdefault(row.caption or "", len(index)) if row.status == OK else -1
        for row in ledger
    ]
    with account.stage("encode text"):
        arrays = encode_texts(list(index), encoders.text)
    return {**arrays, "caption": np.asarray(caption, dtype=np.int32)}


def encode_texts(captions: list[str], encoder: TextEncoder) -> dict[str, np.ndarray]:
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


def write_null(dataset: Path, column: TextColumn, encoders: Encoders) -> None:
    """The states of the empty caption, once per text column."""
    path = column_path(dataset, column.column_id, NULL)
    if read_receipt_of(path):
        return
    arrays = encode_texts([""], encoders.text)
    write_arrays(path, {name: array[0] for name, array in arrays.items()})
    receipt = Receipt(
        shard=NULL,
        column=column.to_json(),
        source={},
        rows_in=1,
        rows=1,
        absent={},
        model=encoders.model_name,
        versions=library_versions(),
        **file_facts(path),
    )
    write_receipt(path, receipt)
