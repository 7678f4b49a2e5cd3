"""A trial's validation losses, from the metrics.jsonl that its trainer writes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from train.metrics import read_metrics


@dataclass(frozen=True)
class Loss:
    """One measurement.

    Args:
        step: of the run.
        raw: of the weights as trained.
        average: of their moving average; None where there is none.
    """

    step: int
    raw: float
    average: float | None

    @property
    def best(self) -> float:
        """Of the better weights, which are the ones to use; NaN if either is not finite.

        Early in a run the average lags, late it is ahead: the lower of the two is compared, so that
        a slow average is not pruned for being slow.
        """
        losses = [self.raw] if self.average is None else [self.raw, self.average]
        return min(losses) if all(map(math.isfinite, losses)) else math.nan


def read_losses(run_dir: Path) -> list[Loss]:
    """All validations so far, in the order of their steps."""
    return [
        Loss(int(row["step"]), row["val/loss"], row.get("val/ema_loss"))
        for row in read_metrics(run_dir / "metrics.jsonl")
        if "val/loss" in row
    ]
