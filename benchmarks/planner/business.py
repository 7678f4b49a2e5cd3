"""What a job costs against what the model is expected to bring; the latter is an input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.planner.config import PlanConfig
from shards.errors import UserError

_RETURNS = ("return_before_usd", "return_after_usd", "return_pretrained_usd")


def business_case(
    config: PlanConfig, totals: Mapping[str, Any], usd_per_gpu_hour: Mapping[str, float]
) -> dict[str, Any] | None:
    """Cost of the planned job against budget and expected gain; None: neither was given.

    The job is offline training at the first number of GPUs and the first price plan, stage 1,
    storage and all runs included.

    Args:
        config: the inputs in full.
        totals: of `costs.totals`.
        usd_per_gpu_hour: by price plan.

    Raises:
        UserError: no price, or a return before without one after.
    """
    returns = [name for name in _RETURNS if getattr(config, name)]
    if not returns and not config.budget_usd:
        return None
    if not usd_per_gpu_hour:
        wanted = "--usd-per-gpu-hour with it"
        raise UserError("--budget-usd and --return-*", "no price of a GPU", wanted=wanted)
    if returns and not (config.return_before_usd and config.return_after_usd):
        given = ", ".join(f"--{name.replace('_', '-')}" for name in returns)
        wanted = "--return-before-usd and --return-after-usd"
        raise UserError(given, "no gain without both sides of it", wanted=wanted)
    plan = next(iter(usd_per_gpu_hour))
    usd = totals["arms"]["offline"]["usd"][plan]
    per_run = usd["training"] / config.runs
    case: dict[str, Any] = {
        "plan": plan,
        "num_gpus": totals["num_gpus"],
        "runs": config.runs,
        "job_usd": usd["total"],
    }
    if config.budget_usd:
        left = config.budget_usd - (usd["total"] - usd["training"])
        case["budget_usd"] = config.budget_usd
        case["runs_within_budget"] = max(0, math.floor(left / per_run))
    if returns:
        case |= _gain(config, usd["total"])
    return case


def _gain(config: PlanConfig, job_usd: float) -> dict[str, Any]:
    """Shares are None where nothing is gained."""
    per_year = config.return_after_usd - config.return_before_usd
    gain = per_year * config.years
    spent = {"job": job_usd} | ({"budget": config.budget_usd} if config.budget_usd else {})
    found: dict[str, Any] = {
        "before_usd": config.return_before_usd,
        "after_usd": config.return_after_usd,
        "years": config.years,
        "expected_gain_usd": gain,
    }
    for name, usd in spent.items():
        found[f"{name}_share_frac"] = usd / gain if gain > 0 else None
        found[f"{name}_payback_months"] = usd / (per_year / 12) if gain > 0 else None
    if config.return_pretrained_usd:
        more = (config.return_after_usd - config.return_pretrained_usd) * config.years
        found["pretrained_gain_usd"] = (
            config.return_pretrained_usd - config.return_before_usd
        ) * config.years
        found["own_over_pretrained_usd"] = more - job_usd
    return found
