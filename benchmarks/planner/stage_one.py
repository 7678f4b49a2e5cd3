"""What stage 1 takes: the encoding of every image that training sees, once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.planner.config import UNet
from benchmarks.planner.measured import Measured
from benchmarks.planner.model_flops import flops_at
from benchmarks.planner.phase import Phase
from benchmarks.planner.presets import Request
from benchmarks.planner.sources import Source, Sources
from benchmarks.planner.typed_values import by_resolution
from shards.errors import UserError

_FLAG = "--encode-images-per-sec"


@dataclass(frozen=True)
class StageOne:
    """One way to encode.

    Args:
        gpu_hours: for latents and text states.
        num_gpus: 0: as many as train.
        usd_per_gpu_hour: 0: what a GPU costs in training.
        source: of the GPU-hours.
    """

    gpu_hours: float
    num_gpus: int
    usd_per_gpu_hour: float
    source: Source


def stage_one_options(
    request: Request, phases: Sequence[Phase], measured: Measured, sources: Sources
) -> list[StageOne]:
    """Ways to encode: the one that the plan counts with, then what else there is to compare.

    Raises:
        UserError: nothing says how long it takes.
    """
    config = request.config
    known = _known_hours(request, phases, measured)
    if config.encode_usd_per_gpu_hour and (known is None or known[1].kind != "given"):
        found = "other GPUs, and nothing says how fast they encode"
        wanted = f"{_FLAG} or --encode-gpu-hours, of those GPUs, with it"
        raise UserError("--encode-usd-per-gpu-hour", found, wanted=wanted)
    options = []
    if known:
        price = config.encode_usd_per_gpu_hour
        options.append(StageOne(known[0], config.encode_gpus, price, known[1]))
    hours = sum(_encode_hours(config.unet, phases))
    if hours > 0:
        source = Source("predicted", "what online steps take longer, on the training's GPUs")
        options.append(StageOne(hours, 0 if known else config.encode_gpus, 0.0, source))
    if not options:
        found = "nothing says how long stage 1 takes: online steps take no longer than offline ones"
        raise UserError(_FLAG, found, wanted="a rate for each resolution")
    for option in options:
        sources.add("GPU-hours of stage 1", f"{option.gpu_hours:,.5g}", option.source)
    return options


def num_captions(phases: Sequence[Phase]) -> float:
    """Captions to encode, if none is shared: those of larger images are among those of smaller."""
    return max(phase.num_encoded for phase in phases)


def ids_frac(unet: UNet, phases: Sequence[Phase]) -> float:
    """The share of stage 1, by FLOPs, that remains where captions stay token ids."""
    images = sum(p.num_encoded * flops_at(unet, p.resolution)["vae"] for p in phases)
    captions = num_captions(phases) * flops_at(unet, phases[0].resolution)["text"]
    return images / (images + captions)


def _known_hours(
    request: Request, phases: Sequence[Phase], measured: Measured
) -> tuple[float, Source] | None:
    """GPU-hours that are given, or follow from a given or a measured rate."""
    config = request.config
    if config.encode_gpu_hours:
        return config.encode_gpu_hours, request.source("encode_gpu_hours")
    sides = [phase.resolution for phase in phases]
    rates = by_resolution(_FLAG, config.encode_images_per_sec, sides)
    source = request.source("encode_images_per_sec")
    if missing := [str(side) for side in sides if side not in rates]:
        if rates:
            wanted = "a rate for each resolution"
            raise UserError(_FLAG, f"nothing for {', '.join(missing)} px", wanted=wanted)
        rates = {speed.resolution: speed.value for speed in reversed(measured.encode)}
        if not set(sides) <= rates.keys():
            return None
        source = Source("measured", "; ".join(speed.source for speed in measured.encode))
    return sum(p.num_encoded / rates[p.resolution] for p in phases) / 3600, source


def _encode_hours(unet: UNet, phases: Sequence[Phase]) -> Iterator[float]:
    """Of each phase what its online steps take longer, captions with the most images alone."""
    captioned = max(phases, key=lambda phase: phase.num_encoded)
    for phase in phases:
        fewest = min(phase.offline.points)
        longer = phase.factors["online"] - 1
        if phase is not captioned:
            flops = flops_at(unet, phase.resolution)
            longer *= flops["vae"] / (flops["vae"] + flops["text"])
        yield phase.num_encoded * longer / phase.offline.per_gpu(fewest) / 3600
