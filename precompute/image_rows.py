"""The growing rows of one image column in one shard."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from precompute.encoders import ImageEncoder, to_pixel_values
from precompute.measures import LatentMoments, RelativeError
from precompute.time_account import TimeAccount
from shards.arrays import Arrays
from shards.checksum import with_checksums
from shards.column import ImageColumn, Json
from shards.quantize import latents_of, quantize_latents


class ImageRows:
    """Collects the samples of a shard, encodes them in batches, and gives the shard's arrays.

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
        self._pending: list[tuple[int, np.ndarray]] = []
        self._parts: list[Arrays] = []
        self._rows: list[int] = []
        self.absent: Counter[str] = Counter()
        self._float32_fallbacks = 0
        self._latents = LatentMoments()
        self._error = RelativeError()

    def add(self, row: int, square: np.ndarray | None) -> None:
        """Take the next sample; None when its image is smaller than the resolution."""
        if square is None:
            self.absent["too_small"] += 1
            return
        self._pending.append((row, square))
        if len(self._pending) == self._batch_size:
            self.flush()

    def flush(self) -> None:
        """Encode what is pending. Batches never reach into another shard."""
        if not self._pending:
            return
        rows, squares = zip(*self._pending, strict=True)
        self._pending = []
        with self._account.stage(f"encode {self.spec.name}"):
            pixel_values = to_pixel_values(np.stack(squares), self._encoder.device)
            moments, fallbacks = self._encoder.encode(pixel_values)
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
