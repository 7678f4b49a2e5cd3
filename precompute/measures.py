"""What stage 1 measures of the numbers that it stores, for receipts."""

from __future__ import annotations

import numpy as np
import torch

from shards.column import ImageColumn, Json


class LatentMoments:
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
