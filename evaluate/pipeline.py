"""A run's U-Net joined with its model folder into a `StableDiffusionPipeline`."""

from __future__ import annotations

import json
from typing import Any

from evaluate.assemble import assemble
from shards.errors import UserError
from shards.storage import Location, location, read_bytes
from train.checkpoint import find_unet, local_unet


def load_pipeline(
    run: str | Location, model: str, *, weights: str = "auto", device: str = ""
) -> Any:
    """Build the pipeline that samples a run: DPM-Solver++ on the schedule of its training.

    Args:
        run: local or behind a URL; see `find_unet`.
        model: model folder or hub id; gives VAE, text encoder and tokenizer.
        weights: see `find_unet`.
        device: default: the first GPU, else the CPU.

    Returns:
        a diffusers `StableDiffusionPipeline` without a safety checker.

    Raises:
        UserError: a part cannot be loaded, or the model's do not fit the U-Net.
    """
    run = location(run)
    folder = find_unet(run, weights)

    import torch
    from diffusers import UNet2DConditionModel

    scheduler_config = _scheduler_config(run, folder)
    try:
        with local_unet(folder) as copy:
            unet = UNet2DConditionModel.from_pretrained(copy)
    except (OSError, ValueError) as error:
        raise UserError(folder, f"cannot be loaded ({_first_line(error)})") from None
    pipeline = assemble(unet, scheduler_config, model)
    return pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _scheduler_config(run: Location, unet: Location) -> dict[str, Any]:
    """The schedule of training, from beside the U-Net."""
    for folder in (run, unet.parent):
        try:
            data = read_bytes(folder / "scheduler" / "scheduler_config.json")
        except FileNotFoundError:
            continue
        config: dict[str, Any] = json.loads(data)
        return config
    raise UserError(unet.parent, "no scheduler/scheduler_config.json beside the U-Net")
