"""Generate the same images plainly and on the fast path, and write down how far they are apart."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from serve.config import Defaults
from serve.fast_path import FastPath


@dataclass(frozen=True, kw_only=True)
class DiffConfig:
    """Settings of `python -m serve diff`."""

    source: str
    """Run, checkpoint, exported folder, diffusers pipeline folder, or hub id."""
    prompts: str
    """Prompts, separated by semicolons, or the name of a text file with one in each line."""
    model: str = ""
    """Model folder or hub id of VAE and text encoder; default: the one the run names."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """Of a run; auto takes the averaged weights where there are any."""
    steps: int = Defaults.steps
    """Denoising steps."""
    guidance: float = Defaults.guidance
    """Guidance scale; 1 is off."""
    scheduler: str = Defaults.scheduler
    """Sampler; see `evaluate/schedulers.py`."""
    seed: int = 0
    """The n-th prompt starts from the noise of seed + n."""
    device: str = ""
    """Default: the first GPU, else the CPU."""
    out: str = "image-diff"
    """Folder for images, image-diff.json and image-diff.png."""
    fast: FastPath = field(default_factory=FastPath)


def run(config: DiffConfig) -> None:
    """Write both kinds of images and their differences, and say what they are."""
    from evaluate.pipeline import load_pipeline
    from evaluate.prompts import read_prompts
    from serve.fast_path import apply_fast_path
    from serve.image_diff import SHEET, say, write_differences

    prompts = read_prompts(config.prompts, "--prompts")
    pipeline = load_pipeline(
        config.source,
        config.model,
        weights=config.weights,
        device=config.device,
        scheduler=config.scheduler,
    )
    plain = _generate(pipeline, prompts, config)
    for line in apply_fast_path(pipeline, config.fast, pipeline.device):
        print(line, file=sys.stderr)
    out = Path(config.out)
    differences = write_differences(out, _generate(pipeline, prompts, config), plain)
    for prompt, difference in zip(prompts, differences, strict=True):
        print(f"{say(difference)}: {prompt}")
    print(out / SHEET)


def _generate(pipeline: Any, prompts: list[str], config: DiffConfig) -> list[Any]:
    """One image at a time, so that what is compared has no company that differs."""
    import torch

    from serve.image_diff import to_uint8

    images = []
    for number, prompt in enumerate(prompts):
        output = pipeline(
            [prompt],
            negative_prompt=[""],
            generator=[torch.Generator("cpu").manual_seed(config.seed + number)],
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            output_type="pt",
        )
        images += to_uint8(output.images)
    return images
