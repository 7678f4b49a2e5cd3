"""Sample prompts to one PNG, with their captions."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import tyro

from evaluate.schedulers import DEFAULT_SCHEDULER
from shards.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Settings of `python -m evaluate sample`."""

    source: Annotated[str, tyro.conf.arg(aliases=["--run"])]
    """A training run or one of its checkpoints, an exported pipeline, or a hub id."""
    prompts: str
    """Prompts, separated by semicolons, or the name of a text file with one in each line."""
    negative_prompt: str = ""
    """What the images are to lack."""
    model: str = ""
    """Model folder or hub id of a run's encoders; default: those that it was trained with."""
    out: str = ""
    """The PNG; default: samples.png in the run."""
    scheduler: str = DEFAULT_SCHEDULER
    """The sampler: dpm++, ddim, ddpm, euler, euler-a, heun, pndm or unipc."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """auto takes the averaged weights where there are any."""
    guidance_scale: float = 3.0
    """Classifier-free guidance; 1 is off."""
    guidance_rescale: float = 0.0
    """Rescale guided predictions (arXiv:2305.08891); 0.7 is usual at zero terminal SNR."""
    num_steps: int = 20
    """Of the sampler."""
    width: int = 0
    """In pixels; 0: the U-Net's own."""
    height: int = 0
    """In pixels; 0: the U-Net's own."""
    seed: int = 0
    """The n-th prompt starts from the noise of seed + n."""


def run(config: SampleConfig) -> None:
    """Write the grid and say where it is."""
    from evaluate.grid import write_grid
    from evaluate.pipeline import is_pipeline, load_pipeline
    from evaluate.prompts import read_prompts
    from evaluate.sample import Sampling, generate
    from shards.storage import location

    source = location(config.source)
    if not config.out and is_pipeline(source):
        raise UserError("--out", "not given, and the source is no run", wanted="a PNG to write")
    out = location(config.out) if config.out else source / "samples.png"
    prompts = read_prompts(config.prompts, "--prompts")
    sampling = Sampling(
        num_steps=config.num_steps,
        guidance_scale=config.guidance_scale,
        guidance_rescale=config.guidance_rescale,
        negative_prompt=config.negative_prompt,
        width=config.width,
        height=config.height,
    )
    pipeline = load_pipeline(
        config.source,
        config.model,
        weights=config.weights,
        scheduler=config.scheduler,
        say=lambda text: print(text, file=sys.stderr),
    )
    images = generate(pipeline, prompts, seed=config.seed, **asdict(sampling))
    write_grid(out, images, prompts)
    print(out)
