"""Look at what a run has learnt.

python -m evaluate sample --run runs/x --prompts "a lion; a leaf"
python -m evaluate scenes --run runs/demo --scenes data/demo/scenes/held_out
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from shards.errors import UserError, reported

_TINY = "examples/tiny-model"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Sample prompts to one PNG, with their captions."""

    run: str
    """Folder of a training run, or one of its checkpoints."""
    prompts: str
    """Prompts, separated by semicolons, or the name of a text file with one in each line."""
    negative_prompt: str = ""
    """What the images are to lack."""
    model: str = _TINY
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


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Measure how often generated scenes show what their captions ask for."""

    run: str
    """Folder of a training run, or one of its checkpoints."""
    scenes: str
    """Folder with image shards of scenes; their captions are the prompts."""
    model: str = _TINY
    """Model folder that the run's dataset was encoded with."""
    num_images: int = 200
    """Pictures to generate."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """auto takes the averaged weights where there are any."""
    guidance_scale: float = 3.0
    """Classifier-free guidance; 1 is off."""
    seed: int = 0
    """The n-th prompt starts from the noise of seed + n."""


Command = (
    Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Scenes, tyro.conf.subcommand("scenes")]
)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m evaluate`."""
    command: Command = tyro.cli(
        Command,
        args=argv,
        prog="python -m evaluate",
        description="Look at what a run has learnt.",
    )
    with reported("evaluate"):
        if isinstance(command, Sample):
            sample(command)
        else:
            scenes(command)


def sample(command: Sample) -> None:
    """Write the grid and say where it is."""
    from pathlib import Path

    from evaluate.grid import write_grid
    from evaluate.pipeline import load_pipeline
    from evaluate.sample import generate, read_prompts

    prompts = read_prompts(command.prompts, "--prompts")
    if command.num_steps < 1:
        raise UserError("--num-steps", f"{command.num_steps}", wanted="at least 1")
    if not 0 <= command.guidance_rescale <= 1:
        raise UserError("--guidance-rescale", f"{command.guidance_rescale}", wanted="0 to 1")
    out = Path(command.out or Path(command.run) / "samples.png")
    images = generate(
        load_pipeline(command.run, command.model, weights=command.weights),
        prompts,
        seed=command.seed,
        num_steps=command.num_steps,
        guidance_scale=command.guidance_scale,
        guidance_rescale=command.guidance_rescale,
        negative_prompt=command.negative_prompt,
    )
    write_grid(out, images, prompts)
    print(out)


def scenes(command: Scenes) -> None:
    """Print the accuracies; the last line is JSON."""
    from evaluate.scenes import held_out_captions, measure_scenes

    if command.num_images < 2:
        wanted = "at least 2: chance is the score against another's caption"
        raise UserError("--num-images", f"{command.num_images}", wanted=wanted)
    captions = held_out_captions(command.scenes, command.num_images)
    result = measure_scenes(
        command.run,
        command.model,
        captions,
        seed=command.seed,
        guidance_scale=command.guidance_scale,
        weights=command.weights,
    )
    print(f"{'part':<12}{'right':>8}{'chance':>8}   ({result['num_images']} images)")
    for part, right in result["accuracy"].items():
        if right is not None:
            print(f"{part:<12}{right:>8.1%}{result['chance'][part]:>8.1%}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
