"""What a sweep says while it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shards.errors import UserError
from train.sweep.outcome import FAILED, Outcome, best_of, outcome_of
from train.sweep.plan import Length, Plan
from train.sweep.report import command, shown, table
from train.sweep.study import Study


class Progress:
    """Lines for people.

    Args:
        plan: of the sweep.
        study: its trials.
        num_workers: trials at a time.
        device: `GPU`, or `device`.
    """

    def __init__(self, plan: Plan, study: Study, num_workers: int, device: str) -> None:
        self._plan, self._study, self._num_workers = plan, study, num_workers
        self._unit = f"{device}-hours"
        self._start = time.monotonic()
        self._num_over_before = sum(one.is_over for one in self._outcomes())

    def announce(self) -> None:
        """What is about to run."""
        plan, config = self._plan, self._plan.config
        print(
            f"sweep of {plan.preset}: {config.trials} trials of {plan.max_steps} steps at batch "
            f"{plan.base.global_batch_size} or as many {config.compare}, {self._num_workers} at a "
            f"time | {config.validations} validations each, of {plan.data['held_out']} held-out "
            f"samples | pruner {config.pruner if plan.prunes else 'none'}"
        )
        for name, distribution in plan.space.items():
            print(f"  {name}: {_described(distribution)}")
        if config.pruner != "none" and not plan.prunes:
            print("nothing is pruned: trials of different --max-steps have no points in common")
        if outcomes := self._outcomes():
            over = self._num_over_before
            print(f"continuing: {over} trials are over, {len(outcomes) - over} under way")

    def started(self, number: int, settings: Mapping[str, Any], length: Length) -> None:
        """A trial's trainer was started."""
        print(f"trial {number} starts: {length.steps} steps, {_words(settings)}", flush=True)

    def ended(self, number: int) -> None:
        """A trial is over."""
        outcomes = self._outcomes()
        one, best = outcomes[number], best_of(outcomes)
        num_over = sum(each.is_over for each in outcomes)
        parts = [
            f"trial {number} {one.state} ({num_over}/{self._plan.config.trials})",
            f"loss {shown(one.loss)}" if one.state != FAILED else one.reason,
            f"{one.device_hours:.4f} {self._unit}",
            f"best {shown(best.loss)} (trial {best.trial})" if best else "none complete yet",
            f"ETA {self._eta(num_over)}",
        ]
        print(" | ".join(parts), flush=True)

    def stopping(self, num_running: int) -> None:
        """A signal asked for the end."""
        print(
            f"stopping: {num_running} trials write a checkpoint; Ctrl-C again ends them at once",
            flush=True,
        )

    def finish(self, out: Path) -> None:
        """The table, and what to do with it.

        Raises:
            UserError: not one trial was complete.
        """
        outcomes = self._outcomes()
        print(f"\n{table(outcomes, self._plan.config.usd_per_gpu_hour, self._unit)}\n")
        if importances := self._study.importances():
            shares = (f"{name} {share:.0%}" for name, share in importances.items())
            print(f"what the loss depends on, roughly (PED-ANOVA): {', '.join(shares)}")
        print(f"{out}/sweep.json, trials.csv, pareto.png")
        if sum(one.is_over for one in outcomes) < self._plan.config.trials:
            print("stopped; the same command continues")
            return
        best = best_of(outcomes)
        if best is None:
            reasons = [one.reason for one in outcomes if one.state == FAILED]
            raise UserError(out, f"no trial was complete; {next(iter(reasons), 'all were pruned')}")
        print(
            f"best: trial {best.trial}. At the preset's length:\n  {command(self._plan, best, out)}"
        )
        if {"warmup_steps", "ema_decay"} & best.settings.keys():
            print(
                f"(warm-up and average belong to trials of {best.steps} steps; "
                "a longer run wants more of both)"
            )

    def _outcomes(self) -> list[Outcome]:
        num_devices = self._plan.config.devices_per_trial
        return [outcome_of(trial, num_devices) for trial in self._study.trials]

    def _eta(self, num_over: int) -> str:
        """From the pace of this sweep since it was started."""
        done = num_over - self._num_over_before
        left = max(0, self._plan.config.trials - num_over)
        sec = round((time.monotonic() - self._start) / max(1, done) * left)
        return f"{sec // 3600}:{sec // 60 % 60:02d}:{sec % 60:02d}"


def _described(distribution: Any) -> str:
    if hasattr(distribution, "choices"):
        return ", ".join(distribution.choices)
    scale = ", by its logarithm" if distribution.log else ""
    return f"{distribution.low:g} to {distribution.high:g}{scale}"


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {shown(value)}" for name, value in settings.items())
