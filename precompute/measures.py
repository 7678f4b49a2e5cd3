"""What stage 1 measures of the numbers that it stores, for receipts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shards.column import ImageColumn, Json


def latent_sums(stored: Tensor, finite: Tensor, spec: ImageColumn) -> Tensor:
    """Count, sum and sum of squares [3] of the scaled latents that training will sample.

    Args:
        stored: moments [B, 2C, h, w], or latents [B, C, h, w] of a deterministic encoder.
        finite: [B]; the samples that count.
        spec: of their column.
    """
    mean, logvar = stored.double().tensor_split([spec.latent_channels], dim=1)
    square = mean.square()
    if spec.latents == "moments":
        square = square + logvar.clamp(-30.0, 20.0).exp()
    factor, counts = spec.scaling_factor, finite[:, None, None, None]
    values = mean[0].numel() * finite.sum()
    zero = torch.zeros((), dtype=torch.double, device=stored.device)
    total = torch.where(counts, mean, zero).sum() * factor
    total_of_squares = torch.where(counts, square, zero).sum() * factor**2
    return torch.stack([values.double(), total, total_of_squares])


class LatentMoments:
    """First two moments of the scaled latents."""

    def __init__(self) -> None:
        self._count, self._sum, self._sum_of_squares = 0.0, 0.0, 0.0

    def add(self, sums: Sequence[float]) -> None:
        """Take `latent_sums`."""
        self._count += sums[0]
        self._sum += sums[1]
        self._sum_of_squares += sums[2]

    def stats(self) -> Json:
        """`latent_mean` and `latent_std`; empty where nothing was added."""
        if not self._count:
            return {}
        mean = self._sum / self._count
        variance = max(self._sum_of_squares / self._count - mean**2, 0.0)
        return {"latent_mean": round(mean, 6), "latent_std": round(variance**0.5, 6)}


class RelativeError:
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
