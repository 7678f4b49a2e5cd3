"""Make thousands of images, an image a prompt, into a folder; the same command again continues."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Literal

from evaluate.schedulers import DEFAULT_SCHEDULER
from shards.errors import UserError


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Settings of `python -m evaluate generate`."""

    source: str
    """A training run or one of its checkpoints, an exported pipeline, or a hub id."""
    prompts: str
    """A .txt file (a prompt a line), a .jsonl file, texts with semicolons between, `held-out` (what
    the run was not trained on; held-out:<dataset> where that has moved), or
    coco:<captions_val2014.json>."""
    out: str
    """The folder; local or a URL."""
    num_images: int = 0
    """0: one for each prompt (coco: 30,000); more than prompts: each again in turn."""
    model: str = ""
    """Model folder or hub id of a run's encoders; default: those that it was trained with."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """Of a run; auto takes the averaged ones where there are any."""
    scheduler: str = DEFAULT_SCHEDULER
    """The sampler: dpm++, ddim, ddpm, euler, euler-a, heun, pndm or unipc."""
    num_steps: int = 50
    """Of the sampler."""
    guidance_scale: float = 3.0
    """Classifier-free guidance; 1 is off."""
    guidance_rescale: float = 0.0
    """Rescale guided predictions (arXiv:2305.08891); 0.7 is usual at zero terminal SNR."""
    negative_prompt: str = ""
    """What the images are to lack."""
    width: int = 0
    """In pixels; 0: the U-Net's own."""
    height: int = 0
    """In pixels; 0: the U-Net's own."""
    seed: int = 0
    """The image of id n starts from the noise of seed + n; also chooses captions of COCO."""
    batch_size: int = 16
    """Images at a time on each process."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """That the pipeline runs in."""
    device: str = ""
    """Default: the GPU of the process's rank, else the CPU."""
    part: str = ""
    """3/16: of the folder, part 3 of 0 to 15, for arrays of jobs. Processes of torchrun and
    accelerate launch share the work without it."""


def run(config: GenerateConfig) -> None:
    """Make what is missing, and say how much is there."""
    process, num_processes = share_of(config.part)

    from evaluate.generate import GenerationSettings, generate_folder
    from evaluate.pipeline import load_pipeline
    from evaluate.prompts import load_prompts
    from shards.storage import location

    settings = GenerationSettings(
        num_steps=config.num_steps,
        guidance_scale=config.guidance_scale,
        guidance_rescale=config.guidance_rescale,
        negative_prompt=config.negative_prompt,
        width=config.width,
        height=config.height,
        seed=config.seed,
        batch_size=config.batch_size,
        source=config.source,
        weights=config.weights,
    )
    if config.num_images < 0:
        raise UserError("--num-images", f"{config.num_images}", wanted="at least 0")
    prompts = load_prompts(
        config.prompts, config.source, num_images=config.num_images, seed=config.seed
    )
    say = _say if process == 0 else _ignore
    pipeline = load_pipeline(
        config.source,
        config.model,
        weights=config.weights,
        device=config.device or _device_of_rank(),
        dtype=config.dtype,
        scheduler=config.scheduler,
        say=say,
    )
    generated = generate_folder(
        pipeline,
        prompts.texts,
        location(config.out),
        settings,
        keys=prompts.keys,
        process=process,
        num_processes=num_processes,
        say=_say,
    )
    num_missing = len(generated.missing())
    said = f"{generated.folder}: {len(prompts) - num_missing} of {len(prompts)} images"
    print(f"{said}; this process has made its own" if num_missing else said, flush=True)


def share_of(part: str) -> tuple[int, int]:
    """Which process this is, and of how many: ranks of a launcher, within a part of an array.

    Raises:
        UserError: no such part.
    """
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    number, slash, count = part.partition("/")
    if not part:
        number, slash, count = "0", "/", "1"
    is_right = bool(slash) and number.isdecimal() and count.isdecimal()
    if not is_right or int(number) >= int(count):
        raise UserError("--part", part, wanted="such as 3/16: part 3 of 0 to 15")
    return int(number) * world_size + rank, int(count) * world_size


def _device_of_rank() -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _ignore(text: str) -> None:
    """Of what one process has said."""
