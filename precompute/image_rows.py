"""The growing rows of one image column in one shard."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from precompute.image_encoder import ImageEncoder, finite_samples, to_pixel_values
from precompute.measures import LatentMoments, RelativeError, latent_sums
from precompute.time_account import TimeAccount, encode_stage
from shards.arrays import Arrays
from shards.checksum import with_checksums
from shards.column import ImageColumn, Json
from shards.quantize import latents_of, quantize_latents

_IN_FLIGHT = 2  # batches: the device works at one while the host prepares and collects others


@dataclass(frozen=True)
class _Launched:
    """A batch that the device may still be working at; its results are on their way here."""

    bucket: int
    rows: np.ndarray
    pixel_values: Tensor
    half: Tensor
    finite: Tensor
    sums: Tensor
    done: Any

    def wait(self) -> None:
        if self.done is not None:
            self.done.synchronize()


class ImageRows:
    """Collects the samples of a shard, encodes them in batches, and gives the shard's arrays.

    Batches hold one bucket and never reach into another shard: rounding depends on a batch's
    company, and a shard's bytes must not depend on its neighbours.

    Args:
        spec: of the column.
        encoder: the VAE's.
        batch_size: samples per call of it.
        account: counts the encoding.
    """

    def __init__(
        self, spec: ImageColumn, encoder: ImageEncoder, batch_size: int, account: TimeAccount
    ) -> None:
        self.spec = spec
        self._encoder, self._batch_size, self._account = encoder, batch_size, account
        buckets = range(len(spec.crop_sizes))
        self._pending: list[list[tuple[int, np.ndarray]]] = [[] for _ in buckets]
        self._launched: deque[_Launched] = deque()
        self._parts: list[list[Arrays]] = [[] for _ in buckets]
        self._rows: list[list[int]] = [[] for _ in buckets]
        self.absent: Counter[str] = Counter()
        self._float32_fallbacks = 0
        self._latents = LatentMoments()
        self._error = RelativeError()

    def add(self, row: int, bucket: int, crop: np.ndarray) -> None:
        """Take the next sample: its crop, uint8 [H, W, 3]."""
        pending = self._pending[bucket]
        pending.append((row, crop))
        if len(pending) == self._batch_size:
            self._launch(bucket)

    def leave_out(self, reason: str) -> None:
        """Count a sample that has no row here."""
        self.absent[reason] += 1

    def flush(self) -> None:
        """Encode what is pending, and wait for it."""
        for bucket, pending in enumerate(self._pending):
            if pending:
                self._launch(bucket)
        with self._account.stage(encode_stage(self.spec)):
            while self._launched:
                self._collect()

    def _launch(self, bucket: int) -> None:
        rows, crops = zip(*self._pending[bucket], strict=True)
        self._pending[bucket] = []
        with self._account.stage(encode_stage(self.spec)):
            pixel_values = to_pixel_values(crops, self._encoder.device)
            self._launched.append(self._start(bucket, np.asarray(rows), pixel_values))
            if len(self._launched) == _IN_FLIGHT:
                self._collect()

    @torch.inference_mode()
    def _start(self, bucket: int, rows: np.ndarray, pixel_values: Tensor) -> _Launched:
        half = self._encoder.launch(pixel_values).half()
        finite = finite_samples(half)
        sums = latent_sums(half, finite, self.spec)
        half_here, finite_here, sums_here = map(_copy_to_host, (half, finite, sums))
        done = self._encoder.record_event()
        return _Launched(bucket, rows, pixel_values, half_here, finite_here, sums_here, done)

    def _collect(self) -> None:
        """Take the results of the oldest batch; what overflowed is encoded again in float32."""
        batch = self._launched.popleft()
        batch.wait()
        self._keep(batch.bucket, batch.rows, batch.half, batch.finite, batch.sums)
        failed = ~batch.finite
        if not failed.any():
            return
        rows = batch.rows[failed.numpy()]
        if self._encoder.is_exact:
            self.absent["not_finite"] += len(rows)
            return
        self._float32_fallbacks += len(rows)
        half = self._encoder.encode_exactly(batch.pixel_values[failed]).half()
        finite = finite_samples(half)
        sums = latent_sums(half, finite, self.spec)
        self._keep(batch.bucket, rows, half.cpu(), finite.cpu(), sums.cpu())
        if left := int((~finite).sum()):
            self.absent["not_finite"] += left

    def _keep(
        self, bucket: int, rows: np.ndarray, half: Tensor, finite: Tensor, sums: Tensor
    ) -> None:
        kept = finite.numpy()
        self._latents.add(sums.tolist())
        if kept.any():
            self._parts[bucket].append(self._stored(bucket, half.numpy()[kept]))
            self._rows[bucket].extend(rows[kept].tolist())

    def _stored(self, bucket: int, moments: np.ndarray) -> Arrays:
        """Finite float16 moments [N, 2C, h, w], or latents [N, C, h, w], as the column has them."""
        name, scale_name = self.spec.array_names(bucket)
        latents = moments
        if self.spec.latents == "mean":
            latents = np.ascontiguousarray(moments[:, : self.spec.latent_channels])
        if self.spec.storage_dtype != "int8":
            return {name: latents}
        values, scale = quantize_latents(latents)
        means = slice(0, self.spec.latent_channels)  # the log-variances would hide their error
        self._error.add(latents[:, means], latents_of(values, scale).dequantize()[:, means])
        return {name: values, scale_name: scale}

    def arrays(self) -> Arrays:
        """`ColumnSpec.row_groups` in the order of samples, their checksums, and `row` [N] int32.

        A sample that overflowed comes behind its batch; so rows are sorted here.
        """
        stored: Arrays = {}
        row_parts: list[np.ndarray] = []
        for group, parts, rows in zip(self.spec.row_groups, self._parts, self._rows, strict=True):
            order = np.argsort(np.asarray(rows, dtype=np.int64))
            row_parts.append(np.asarray(rows, dtype=np.int32)[order])
            for name, (dtype, shape) in group.items():
                stored[name] = _joined([part[name] for part in parts], dtype, shape, order)
        row = np.concatenate(row_parts)
        return {**with_checksums(self.spec, stored, row), "row": row}

    def stats(self) -> Json:
        """What there is to know about the numbers; empty for an empty shard."""
        if not any(self._rows):
            return {}
        stats = {**self._latents.stats(), **self._error.stats()}
        stats["float32_fallbacks"] = self._float32_fallbacks
        if self.spec.buckets:
            counts = zip(self.spec.buckets, self._rows, strict=True)
            stats["buckets"] = {f"{h}x{w}": len(rows) for (h, w), rows in counts}
        return stats


def _joined(
    parts: Sequence[np.ndarray], dtype: str, shape: tuple[int, ...], order: np.ndarray
) -> np.ndarray:
    """Parts as one array [N, *shape], in another order where they are not in it yet."""
    joined = np.concatenate([np.empty((0, *shape), dtype), *parts])
    return joined if (np.diff(order) == 1).all() else joined[order]


def _copy_to_host(tensor: Tensor) -> Tensor:
    """Start copying to where the host can read it; on a GPU without waiting for it."""
    if not tensor.is_cuda:
        return tensor
    here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return here.copy_(tensor, non_blocking=True)
