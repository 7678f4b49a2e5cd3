"""What a sweep leaves: a table, sweep.json, trials.csv and pareto.png."""

from __future__ import annotations

import csv
import io
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shards.canonical import canonical_json
from shards.storage import write_text_whole
from train.sweep.outcome import FAILED, Outcome, best_of, front_of, outcome_of
from train.sweep.plan import Plan
from train.sweep.plot import write_plot
from train.sweep.study import Study

FORMAT = 1
_PACKAGES = ("torch", "diffusers", "accelerate", "optuna")


def write_report(plan: Plan, study: Study, out: Path, device: str) -> None:
    """Write the three files from what the study has so far.

    Args:
        plan: of the sweep.
        study: its trials.
        out: folder of the sweep.
        device: `GPU`, or `device`.
    """
    outcomes = [outcome_of(trial, plan.config.devices_per_trial) for trial in study.trials]
    prices = plan.config.usd_per_gpu_hour
    front = {one.trial for one in front_of(outcomes)}
    rows = [_row(one, prices, one.trial in front) for one in outcomes]
    best = best_of(outcomes)
    document = {
        "format": FORMAT,
        "sweep": plan.identity(device),
        "cost_unit": f"{device}-hours",
        "environment": _environment(),
        "trials": [
            {**row, "losses": {str(point): loss for point, loss in one.losses.items()}}
            for row, one in zip(rows, outcomes, strict=True)
        ],
        "pareto": sorted(front),
        "best": best
        and {"trial": best.trial, "loss": best.loss, "command": command(plan, best, out)},
        "importances": study.importances(),
    }
    write_text_whole(out / "sweep.json", canonical_json(document))
    write_text_whole(out / "trials.csv", _csv(rows, list(plan.space)))
    if any(one.loss is not None for one in outcomes):
        write_plot(outcomes, out / "pareto.png", f"{device}-hours", _protocol(plan))


def command(plan: Plan, best: Outcome, out: Path) -> str:
    """The command that trains at the preset's own length with the best settings."""
    arguments = plan.full_size_arguments(best.settings, out / "best")
    return shlex.join(["accelerate", "launch", "train/main.py", *arguments])


def table(outcomes: list[Outcome], prices: Sequence[float], unit: str) -> str:
    """All trials, best first, as a Markdown table; those on the front are marked."""
    front = {one.trial for one in front_of(outcomes)}
    names = list(dict.fromkeys(name for one in outcomes for name in one.settings))
    dollars = [f"USD at {price:g}" for price in prices]
    head = ["trial", "", "loss", unit, *dollars, "steps", *names, "front"]
    lines = [head, ["---"] * len(head)]
    lines += [
        [
            str(one.trial),
            one.state,
            shown(one.loss),
            f"{one.device_hours:.4f}",
            *(f"{one.device_hours * price:.2f}" for price in prices),
            shown(one.steps),
            *(shown(one.settings.get(name)) for name in names),
            "*" if one.trial in front else "",
        ]
        for one in sorted(outcomes, key=lambda each: (_RANK[each.state], each.loss or 0.0))
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


_RANK = {"complete": 0, "pruned": 1, "under way": 2, FAILED: 3}


def shown(value: Any) -> str:
    """A figure or a setting for people."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _row(one: Outcome, prices: Sequence[float], is_on_front: bool) -> dict[str, Any]:
    row = {name: value for name, value in asdict(one).items() if name != "losses"}
    dollars = {f"usd_at_{price:g}": one.device_hours * price for price in prices}
    return {**row, **dollars, "pareto": is_on_front}


def _csv(rows: list[dict[str, Any]], names: list[str]) -> str:
    plain = [
        {
            **{name: value for name, value in row.items() if name not in ("settings", "reason")},
            **{name: row["settings"].get(name) for name in names},
            "reason": row["reason"],
        }
        for row in rows
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(plain[0]) if plain else ["trial"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain)
    return text.getvalue()


def _protocol(plan: Plan) -> str:
    batch = plan.base.global_batch_size
    same = "samples" if plan.config.compare == "samples" else "steps"
    return f"{plan.preset}, {plan.max_steps} steps of batch {batch}, equal {same}"


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        **{name: version(name) for name in _PACKAGES},
    }
