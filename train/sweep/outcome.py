"""What is known of a trial, for tables, files and the plot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from train.sweep.pareto import pareto_front

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

COMPLETE, PRUNED, FAILED = "complete", "pruned", "failed"
_STATES = {"COMPLETE": COMPLETE, "PRUNED": PRUNED, "FAIL": FAILED}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A trial.

    Args:
        trial: its number.
        state: `complete`, `pruned`, `failed`; or `under way`, when the sweep was stopped.
        loss: the last that was measured, of the better weights; None before the first.
        val_loss: of the weights as trained.
        val_ema_loss: of their average.
        device_hours: for which its processes had their devices: start-up, validation and
            checkpoints included, over all attempts.
        steps: of the whole trial.
        samples: of the whole trial.
        num_threads: of each process.
        restarts: attempts that a signal from outside ended.
        reason: why it failed.
        settings: what was searched.
        losses: by point, each a share of the trial's length.
    """

    trial: int
    state: str
    loss: float | None
    val_loss: float | None
    val_ema_loss: float | None
    device_hours: float
    steps: int | None
    samples: int | None
    num_threads: int | None
    restarts: int
    reason: str
    settings: dict[str, Any]
    losses: dict[int, float]

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in _STATES.values()


def outcome_of(trial: FrozenTrial, num_devices: int) -> Outcome:
    """A trial as the study has it."""
    known = trial.user_attrs
    run, val = known.get("run", {}), known.get("val", {})
    losses = dict(sorted(trial.intermediate_values.items()))
    return Outcome(
        trial=trial.number,
        state=_STATES.get(trial.state.name, "under way"),
        loss=next(reversed(losses.values()), None),
        val_loss=val.get("val_loss"),
        val_ema_loss=val.get("val_ema_loss"),
        device_hours=known.get("clock", {}).get("spent_sec", 0.0) * num_devices / 3600,
        steps=run.get("steps"),
        samples=run.get("samples"),
        num_threads=run.get("num_threads"),
        restarts=known.get("restarts", 0),
        reason=known.get("reason", ""),
        settings=run.get("settings", {}),
        losses=losses,
    )


def front_of(outcomes: list[Outcome]) -> list[Outcome]:
    """The complete trials that no other complete one beats in both cost and loss.

    A pruned trial is cheap because it was worse at the same point: it is no way to save.
    """
    complete = [one for one in outcomes if one.state == COMPLETE]
    points = [(one.device_hours, one.loss) for one in complete if one.loss is not None]
    assert len(points) == len(complete)
    return [complete[index] for index in pareto_front(points)]


def best_of(outcomes: list[Outcome]) -> Outcome | None:
    """The complete trial of the lowest loss."""
    complete = [one for one in outcomes if one.state == COMPLETE]
    return min(complete, key=lambda one: one.loss or 0.0, default=None)
