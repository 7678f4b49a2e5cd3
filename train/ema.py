"""The exponential moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WeightAverage:
    """Float32 shadow of a module's parameters, by name.

    Args:
        module: its parameters are copied now; create this when the average is to start.
        decay: share of the old average that stays at each update.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._sources = dict(module.named_parameters())
        self.weights: dict[str, Tensor] = {
            name: parameter.detach().float().clone() for name, parameter in self._sources.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights."""
        sources = [parameter.detach() for parameter in self._sources.values()]
        torch._foreach_lerp_(list(self.weights.values()), sources, 1 - self.decay)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over the average of a checkpoint."""
        for name, weight in self.weights.items():
            weight.copy_(weights[name])
