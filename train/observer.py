"""What looks at a run from time to time: validation, sample grids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from train.trainer import Trainer


class Observer(Protocol):
    """Is called by every process, between two steps; must leave the run as it finds it.

    Attributes:
        every: steps between two calls; 0: at the end of the run alone.
    """

    every: int

    def observe(self, trainer: Trainer) -> dict[str, float]:
        """Look at the run.

        Returns:
            figures for metrics.jsonl and the trackers, the same on every process.
        """
        ...
