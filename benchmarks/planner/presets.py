"""Jobs to start from: two that were published, and our recipe; what the command line adds to them.

The published totals (days, dollars) are nowhere here: they have to come out of the inputs.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, fields, replace
from typing import Any

from benchmarks.planner.config import PlanConfig
from benchmarks.planner.sources import PRESET, Source
from shards.errors import UserError
from train.presets import PRESETS as RECIPES


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A job's inputs and where they are from.

    Args:
        inputs: the rest is as without a preset.
        source: in words.
        caveats: what its publishers leave out or do not say.
    """

    inputs: PlanConfig
    source: str
    caveats: tuple[str, ...] = ()


_RATES_256 = ("256@8=1100", "256@16=2180", "256@32=4080", "256@64=8530", "256@128=11600")
_RATES_512 = ("512@8=290", "512@16=585", "512@32=1195", "512@64=2340", "512@128=4590")
_RECIPES = {side: RECIPES[f"sd2-base-{side}"] for side in (256, 512)}
_SD2_BASE = PlanConfig(
    resolutions=",".join(map(str, _RECIPES)),
    steps=tuple(f"{side}={recipe.max_steps}" for side, recipe in _RECIPES.items()),
    global_batch_size=tuple(
        f"{side}={recipe.global_batch_size}" for side, recipe in _RECIPES.items()
    ),
    images=("256=790e6", "512=300e6"),
)
PRESETS = {
    "mosaicml-a100": Preset(
        inputs=replace(
            _SD2_BASE,
            images_per_sec=(*_RATES_256, *_RATES_512),
            online_factor=1.4,
            gpus=(8, 16, 32, 64, 128),
            usd_per_gpu_hour=("2",),
            encode_gpu_hours=3784.0,
        ),
        source="README of mosaicml/diffusion, 2023; numbers of images: MosaicML's posts on the run",
        caveats=(
            "published: the U-Net's time and cost, and 1.4x for encoding while training; not said "
            "there is what is left of 1.4x once the encoding is counted",
            "they store one draw of the posterior for good: the bytes of `mean`, not of `moments`",
        ),
    ),
    "anyscale-a100": Preset(
        inputs=replace(
            _SD2_BASE,
            steps=("256=275_000", "512=425_000"),
            global_batch_size=("4096",),
            images=("2e9",),
            gpu_hours=13_165.0,
            gpus=(32,),
            usd_per_gpu_hour=("reserved=3.00", "on-demand=5.12"),
        ),
        source="README of the Stable Diffusion template of anyscale/templates, 2024",
        caveats=(
            "published dollars: 39,511 and 67,405; the prices per hour are those over 13,165 "
            "hours, rounded to cents",
            "the A10G GPUs that encode beside the training are not in the published hours",
        ),
    ),
    "sd2-base": Preset(
        inputs=_SD2_BASE,
        source="presets sd2-base-256 and sd2-base-512 of train/; numbers of images: MosaicML's "
        "posts on the run they follow",
    ),
}

# Ways to state the same thing: one on the command line takes the place of all in a preset.
_SPEED = ("images_per_sec", "gpu_hours", "tflops", "mfu")
_SAME = (
    _SPEED,
    ("online_images_per_sec", "online_factor"),
    ("encode_images_per_sec", "encode_gpu_hours"),
    ("epochs", "steps"),
)
# Where nobody states anything. A flag's own default is empty: what is typed always counts.
_DEFAULTS: dict[str, Any] = {"gpus": (8,), "global_batch_size": ("2048",)}
_LENGTH = ("epochs", "steps", "global_batch_size")
_BY_RESOLUTION = ("images", *_LENGTH, "images_per_sec")
# What of a preset does not hold any more where the command line states something else.
_HOLDS_FOR = {
    "images_per_sec": {"unet", "results"},
    "online_factor": {"unet", "results"},
    "gpu_hours": {"unet", "results", "resolutions", "images", *_LENGTH},
    "encode_gpu_hours": {"unet", "results", "resolutions", "images", *_SPEED, *_LENGTH},
}


@dataclass(frozen=True)
class Request:
    """Inputs in full, and which of them are the command line's.

    Args:
        config: preset and command line.
        typed: names of fields that the command line set.
        preset: None: there is none.
        dropped: names of fields whose value in the preset does not hold for this job.
    """

    config: PlanConfig
    typed: frozenset[str]
    preset: Preset | None
    dropped: tuple[str, ...] = ()

    def source(self, name: str) -> Source:
        """Where a field is from."""
        if self.preset is None or name in self.typed:
            return Source("given", f"--{name.replace('_', '-')}")
        return Source(PRESET, self.preset.source)


def fill(typed: PlanConfig) -> Request:
    """Put the command line's inputs in the place of the preset's.

    Raises:
        UserError: an unknown preset, or two ways to state the same thing.
    """
    default = PlanConfig()
    names = [field.name for field in fields(PlanConfig)]
    changed = {name for name in names if getattr(typed, name) != getattr(default, name)}
    _refuse_twice(changed)
    preset = _preset(typed.preset) if typed.preset else None
    inputs = preset.inputs if preset else default
    values = {name: getattr(inputs, name) for name in names}
    replaced = {name for group in _SAME if changed.intersection(group) for name in group}
    stale = {name for name, reasons in _HOLDS_FOR.items() if changed & reasons}
    dropped = sorted(n for n in stale - replaced if values[n] != getattr(default, n))
    values |= {name: getattr(default, name) for name in replaced | stale}
    if "resolutions" in changed:
        values |= _of_phases(values, typed.resolutions)
    values |= {name: getattr(typed, name) for name in changed}
    unstated = {name for name in _DEFAULTS if values[name] == getattr(default, name)}
    values |= {name: _DEFAULTS[name] for name in unstated}
    return Request(PlanConfig(**values), frozenset(changed), preset, tuple(dropped))


def _of_phases(values: dict[str, Any], resolutions: str) -> dict[str, Any]:
    """What a preset states for one resolution each, for those that are asked for."""
    wanted = {*resolutions.split(",")}
    return {
        name: tuple(e for e in entries if "=" not in e or re.split("[@=]", e)[0] in wanted)
        for name, entries in values.items()
        if name in _BY_RESOLUTION
    }


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.3)
        remedy = f"--preset {near[0]}" if near else ""
        wanted = f"one of {', '.join(PRESETS)}"
        raise UserError("--preset", f"{name!r} is unknown", wanted=wanted, remedy=remedy)
    return PRESETS[name]


def _refuse_twice(changed: set[str]) -> None:
    for group in _SAME:
        stated = [f"--{name.replace('_', '-')}" for name in group if name in changed]
        if len(stated) > 1 and stated != ["--tflops", "--mfu"]:
            raise UserError(" and ".join(stated), "state the same thing", wanted="one of them")
