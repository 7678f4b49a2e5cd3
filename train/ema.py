"""The exponential moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor


class WeightAverage:
    """Float32 shadow of the master weights, by name.

    Args:
        sources: what is averaged; copied now, so create this when the average is to start.
        decay: share of the old average that stays at each update.
    """

    def __init__(self, sources: dict[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._sources = sources
        self.weights: dict[str, Tensor] = {name: w.clone() for name, w in sources.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights; one fused operator for all."""
        averages, sources = list(self.weights.values()), list(self._sources.values())
        torch._foreach_lerp_(averages, sources, 1 - self.decay)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over the average of a checkpoint."""
        for name, weight in self.weights.items():
            weight.copy_(weights[name])
