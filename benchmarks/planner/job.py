"""The job to plan, from its inputs: phases, stage 1, prices; every input checked and sourced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.planner.config import PlanConfig
from benchmarks.planner.measured import read_measured
from benchmarks.planner.phase import Phase
from benchmarks.planner.presets import Request
from benchmarks.planner.sources import Source, Sources
from benchmarks.planner.speeds import offline_curves, step_factors
from benchmarks.planner.stage_one import StageOne, ids_frac, stage_one_options
from benchmarks.planner.typed_values import (
    LARGEST,
    MOST_GPUS,
    SMALLEST,
    by_resolution,
    prices,
    resolutions,
)
from shards.errors import UserError

_MOST_IMAGES = 1e13
_NOT_NEGATIVE = (
    *("online_factor", "gpu_hours", "tflops", "mfu", "efficiency", "encode_gpu_hours"),
    *("encode_gpus", "encode_usd_per_gpu_hour", "storage_usd_per_tb_month", "storage_months"),
    *("egress_usd_per_tb", "budget_usd", "return_before_usd", "return_after_usd"),
    "return_pretrained_usd",
)
_BOUNDS = {
    "mfu": (SMALLEST, 1.0),
    "efficiency": (0.1, 1.0),
    "online_factor": (1.0, 10.0),
    "runs": (1, LARGEST),
    "gpus_per_node": (1, LARGEST),
}
_POSITIVE = ("runs", "gpus_per_node", "years")


@dataclass(frozen=True)
class Job:
    """All that the bill depends on.

    Args:
        config: the inputs in full.
        phases: in order.
        stage_one: ways to encode; the first is counted with.
        ids_frac: the share of stage 1 that is left with token ids.
        usd_per_gpu_hour: by price plan.
        sources: of the inputs.
    """

    config: PlanConfig
    phases: Sequence[Phase]
    stage_one: Sequence[StageOne]
    ids_frac: float
    usd_per_gpu_hour: Mapping[str, float]
    sources: Sources


def build_job(request: Request) -> Job:
    """Check the inputs and look up what they leave open.

    Raises:
        UserError: names the flag, what was found and what is wanted.
    """
    config, sources = request.config, Sources()
    check_numbers(config)
    sides = resolutions("--resolutions", config.resolutions)
    images = _of_all("--images", config.images, sides, at_most=_MOST_IMAGES)
    seen = _images_seen(config, images)
    for side in sides:
        count = f"{images[side]:,.0f}"
        sources.add(f"distinct images at {side} px", count, request.source("images"))
    measured = read_measured(config.results, config.unet, sides, config.hardware)
    offline = offline_curves(request, seen, measured, sources)
    factors = step_factors(request, offline, measured, sources)
    phases = [Phase(s, images[s], seen[s], offline[s], factors[s]) for s in sides]
    stage_one = stage_one_options(request, phases, measured, sources)
    frac = ids_frac(config.unet, phases)
    sources.add("share of stage 1 left with ids", round(frac, 3), Source("predicted", "by FLOPs"))
    if measured.unused:
        sources.note(f"nothing for this job in {', '.join(measured.unused)}")
    for reason in measured.refused:
        sources.note(f"not used: {reason}")
    if request.dropped:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in request.dropped)
        sources.note(f"the preset's {flags}: of its own job alone, not taken over for this one")
    for caveat in request.preset.caveats if request.preset else ():
        sources.note(caveat)
    plans = prices("--usd-per-gpu-hour", config.usd_per_gpu_hour)
    return Job(config, phases, stage_one, frac, plans, sources)


def check_numbers(config: PlanConfig) -> None:
    """Refuse numbers that no job has."""
    for name in (*_NOT_NEGATIVE, *_POSITIVE):
        value = getattr(config, name)
        flag, zero = f"--{name.replace('_', '-')}", name in _NOT_NEGATIVE
        least, most = _BOUNDS.get(name, (SMALLEST, LARGEST))
        if not least <= value <= most and not (zero and value == 0):
            raise UserError(flag, f"{value}", wanted=f"a number from {least:g} to {most:g}")
    if not config.gpus:
        raise UserError("--gpus", "none", wanted="at least one number of GPUs")
    for count in (*config.gpus, config.gpus_per_node, config.encode_gpus or 1):
        if not 1 <= count <= MOST_GPUS:
            raise UserError("--gpus", f"{count}", wanted=f"1 to {MOST_GPUS:,}")
    if len(set(config.gpus)) < len(config.gpus):
        raise UserError("--gpus", " ".join(map(str, config.gpus)), wanted="each number once")
    if bool(config.tflops) != bool(config.mfu):
        raise UserError("--tflops and --mfu", "one without the other", wanted="both, or neither")


def _images_seen(config: PlanConfig, images: Mapping[int, float]) -> dict[int, float]:
    """By resolution: epochs of its images, or steps of the global batch."""
    sides = list(images)
    if config.epochs:
        epochs = _of_all("--epochs", config.epochs, sides, at_most=1e6)
        return {side: epochs[side] * images[side] for side in sides}
    if not config.steps:
        raise UserError("--epochs", "not given", wanted="--epochs, or --steps with the batch size")
    steps = _of_all("--steps", config.steps, sides, at_most=1e10)
    batch = _of_all("--global-batch-size", config.global_batch_size, sides, at_most=1e8)
    return {side: steps[side] * batch[side] for side in sides}


def _of_all(
    flag: str, entries: Sequence[str], sides: Sequence[int], at_most: float
) -> dict[int, float]:
    found = by_resolution(flag, entries, sides, at_most=at_most)
    if missing := [str(side) for side in sides if side not in found]:
        raise UserError(flag, f"nothing for {', '.join(missing)} px", wanted="a number for each")
    return found
