"""Measure how often generated scenes show what their captions ask for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from shards.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """Settings of `python -m evaluate scenes`."""

    source: Annotated[str, tyro.conf.arg(aliases=["--run"])]
    """Folder of a training run, or one of its checkpoints."""
    scenes: str
    """Folder with image shards of scenes; their captions are the prompts."""
    model: str = ""
    """Model folder that the run's dataset was encoded with; default: the one that the run names."""
    num_images: int = 200
    """Pictures to generate."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """auto takes the averaged weights where there are any."""
    guidance_scale: float = 3.0
    """Classifier-free guidance; 1 is off."""
    seed: int = 0
    """The n-th prompt starts from the noise of seed + n."""


def run(config: ScenesConfig) -> None:
    """Print the accuracies; the last line is JSON."""
    from evaluate.scenes import held_out_captions, measure_scenes

    if config.num_images < 2:
        wanted = "at least 2: chance is the score against another's caption"
        raise UserError("--num-images", f"{config.num_images}", wanted=wanted)
    captions = held_out_captions(config.scenes, config.num_images)
    result = measure_scenes(
        config.source,
        config.model,
        captions,
        seed=config.seed,
        guidance_scale=config.guidance_scale,
        weights=config.weights,
    )
    print(f"{'part':<12}{'right':>8}{'chance':>8}   ({result['num_images']} images)")
    for part, right in result["accuracy"].items():
        if right is not None:
            print(f"{part:<12}{right:>8.1%}{result['chance'][part]:>8.1%}")
    print(json.dumps(result))
