"""How fast each phase trains: what is given, else what was measured, else what FLOPs predict."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.planner.config import PlanConfig, UNet
from benchmarks.planner.measured import Measured
from benchmarks.planner.model_flops import flops_at
from benchmarks.planner.phase import Arm, Curve
from benchmarks.planner.presets import Request
from benchmarks.planner.sources import Source, Sources
from benchmarks.planner.typed_values import curves
from shards.errors import UserError
from train.presets import PRESETS as RECIPES

# Dense bfloat16 of the fastest GPU of 2025 (B300). A rate that takes more is no rate of one GPU.
_MOST_TFLOPS = 2500.0


def offline_curves(
    request: Request, seen: Mapping[int, float], measured: Measured, sources: Sources
) -> dict[int, Curve]:
    """Speed from latents, by resolution.

    Args:
        request: the inputs.
        seen: images that training sees, by resolution.
        measured: what results say.
        sources: what is used is stated there.

    Raises:
        UserError: the speed of a phase is not known, or is beyond any GPU.
    """
    config = request.config
    given = curves("--images-per-sec", config.images_per_sec, list(seen))
    found = {}
    for side in seen:
        if side in given:
            points, source = given[side], request.source("images_per_sec")
        else:
            points, source = _one_speed(config, side, seen, measured)
        _check_possible(config.unet, side, points)
        rates = ", ".join(f"{rate:,.4g} of {count}" for count, rate in sorted(points.items()))
        sources.add(f"img/s per GPU at {side} px, offline", rates, source)
        scaled = _scaled(points, measured.efficiency) if len(points) == 1 else {}
        found[side] = Curve({**scaled, **points}, config.efficiency or None, frozenset(scaled))
    _state_scaling(config, found, measured, sources)
    return found


def _one_speed(
    config: PlanConfig, side: int, seen: Mapping[int, float], measured: Measured
) -> tuple[dict[int, float], Source]:
    for found in measured.offline:
        if found.resolution == side:
            return {1: found.value}, Source("measured", found.source)
    flops = flops_at(config.unet, side)["unet"]
    if config.gpu_hours:
        work = sum(seen[each] * flops_at(config.unet, each)["unet"] for each in seen)
        words = f"{config.gpu_hours:,.0f} GPU-hours of all phases, divided by FLOPs"
        speed = work / (config.gpu_hours * 3600) / flops
        return {config.gpus[0]: speed}, Source("predicted", words)
    if config.tflops and config.mfu:
        words = (
            f"{flops / 1e9:,.2f} GFLOPs an image at {config.mfu:.0%} of {config.tflops:g} TFLOP/s"
        )
        return {1: config.tflops * 1e12 * config.mfu / flops}, Source("predicted", words)
    recipes = [n for n, r in RECIPES.items() if (r.unet, r.resolution) == (config.unet, side)]
    name = recipes[0] if recipes else f"<a preset with {config.unet} at {side}>"
    raise UserError(
        "--images-per-sec",
        f"nothing is known for {side} px",
        wanted=f"{side}=<images per second of one GPU>, or --results with it, or --tflops and "
        "--mfu for a prediction",
        remedy=f"python -m benchmarks train-step --presets {name} measures it",
    )


def _check_possible(unet: UNet, side: int, points: Mapping[int, float]) -> None:
    flops = flops_at(unet, side)["unet"]
    for rate in points.values():
        if (tflops := rate * flops / 1e12) > _MOST_TFLOPS:
            raise UserError(
                "--images-per-sec",
                f"{rate:,.0f} images per second at {side} px take {tflops:,.0f} TFLOP/s of a GPU",
                wanted=f"{side}=<rate of one GPU>, or {side}@<GPUs>=<rate of all together>",
            )


def _scaled(points: Mapping[int, float], efficiency: Mapping[int, float]) -> dict[int, float]:
    """Speeds at more GPUs whose efficiency is known, from the one speed that is."""
    ((count, rate),) = points.items()
    scale = Curve({1: 1.0, **efficiency})
    more = [other for other in efficiency if other > count]
    return {other: rate * scale.per_gpu(other) / scale.per_gpu(count) for other in more}


def _state_scaling(
    config: PlanConfig, found: Mapping[int, Curve], measured: Measured, sources: Sources
) -> None:
    known = min(max(curve.points) for curve in found.values())
    if measured.efficiency_source:
        value = ", ".join(f"{share:.2f} at {n}" for n, share in sorted(measured.efficiency.items()))
        sources.add("scaling efficiency", value, measured.efficiency_source)
    if max(config.gpus) <= known:
        return
    if config.efficiency:
        value = f"{config.efficiency:g} per doubling beyond {known}"
        sources.add("scaling efficiency", value, Source("given", "--efficiency"))
    else:
        words = (
            "not known: more GPUs are taken to be as fast each (--efficiency, or a scaling result)"
        )
        sources.add(f"scaling efficiency beyond {known}", 1.0, Source("assumed", words))


def step_factors(
    request: Request, offline: Mapping[int, Curve], measured: Measured, sources: Sources
) -> dict[int, dict[Arm, float]]:
    """Time of a step over that of an offline one, by resolution and arm."""
    config = request.config
    given = {
        "online": curves("--online-images-per-sec", config.online_images_per_sec, list(offline)),
        "ids": curves("--ids-images-per-sec", config.ids_images_per_sec, list(offline)),
    }
    found: dict[int, dict[Arm, float]] = {side: {"offline": 1.0} for side in offline}
    arms: tuple[Arm, ...] = ("online", "ids")
    for arm in arms:
        for side, curve in offline.items():
            if side in given[arm]:
                count = min(given[arm][side])
                factor = curve.per_gpu(count) / given[arm][side][count]
                source = request.source(f"{arm}_images_per_sec")
            else:
                factor, source = _factor(request, arm, side, measured, sources)
            sources.add(f"step time at {side} px, {arm} over offline", round(factor, 4), source)
            if factor < 1:
                sources.note(f"{arm} steps at {side} px are faster than offline ones: is that so?")
            found[side][arm] = factor
    return found


def _factor(
    request: Request, arm: Arm, side: int, measured: Measured, sources: Sources
) -> tuple[float, Source]:
    if arm == "online" and request.config.online_factor:
        return request.config.online_factor, request.source("online_factor")
    for speed in measured.factors[arm]:
        if speed.resolution == side:
            if speed.caveat:
                sources.note(speed.caveat)
            return speed.value, Source("measured", speed.source)
    flops = flops_at(request.config.unet, side)
    parts = ["unet", "text"] if arm == "ids" else list(flops)
    ratio = sum(flops[part] for part in parts) / flops["unet"]
    return ratio, Source("predicted", "by FLOPs alone")
