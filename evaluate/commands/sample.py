"""Sample prompts to one PNG, with their captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shards.errors import UserError

TINY_MODEL = "examples/tiny-model"


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Settings of `python -m evaluate sample`."""

    run: str
    """Folder of a training run, or one of its checkpoints."""
    prompts: str
    """Prompts, separated by semicolons, or the name of a text file with one in each line."""
    negative_prompt: str = ""
    """What the images are to lack."""
    model: str = TINY_MODEL
    """Model folder or hub id that the run's dataset was encoded with."""
    out: str = ""
    """The PNG; default: samples.png in the run."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """auto takes the averaged weights where there are any."""
    guidance_scale: float = 3.0
    """Classifier-free guidance; 1 is off."""
    guidance_rescale: float = 0.0
    """Rescale guided predictions (arXiv:2305.08891); 0.7 is usual at zero terminal SNR."""
    num_steps: int = 20
    """Steps of DPM-Solver++."""
    seed: int = 0
    """The n-th prompt starts from the noise of seed + n."""


def run(config: SampleConfig) -> None:
    """Write the grid and say where it is."""
    from evaluate.grid import write_grid
    from evaluate.pipeline import load_pipeline
    from evaluate.sample import generate, read_prompts

    prompts = read_prompts(config.prompts, "--prompts")
    if config.num_steps < 1:
        raise UserError("--num-steps", f"{config.num_steps}", wanted="at least 1")
    if not 0 <= config.guidance_rescale <= 1:
        raise UserError("--guidance-rescale", f"{config.guidance_rescale}", wanted="0 to 1")
    out = Path(config.out or Path(config.run) / "samples.png")
    images = generate(
        load_pipeline(config.run, config.model, weights=config.weights),
        prompts,
        seed=config.seed,
        num_steps=config.num_steps,
        guidance_scale=config.guidance_scale,
        guidance_rescale=config.guidance_rescale,
        negative_prompt=config.negative_prompt,
    )
    write_grid(out, images, prompts)
    print(out)
