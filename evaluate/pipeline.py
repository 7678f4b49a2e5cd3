"""A run's U-Net joined with its model folder into a `StableDiffusionPipeline`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shards.errors import UserError
from train.checkpoint import checkpoints_of

_REMEDY = "--model <folder or hub id>"


def find_unet(run: Path, weights: str = "auto") -> Path:
    """The folder of a U-Net that a run, a checkpoint or an export holds.

    Args:
        run: a run folder, one of its checkpoints, or a folder with `unet/`.
        weights: `auto` (averaged where there are any), `ema` or `raw`.

    Raises:
        UserError: there is none of this kind.
    """
    kinds = {"auto": ("unet_ema", "unet"), "ema": ("unet_ema",), "raw": ("unet",)}[weights]
    # A run's own unet/ comes last: it may be an average, and of an end before the run was extended.
    for folder in [*checkpoints_of(run)[::-1], run]:
        for kind in kinds:
            if (folder / kind / "config.json").exists():
                return folder / kind
    raise UserError(
        run,
        f"no {'' if weights == 'auto' else weights + ' '}U-Net",
        wanted="the folder of a training run that has written a checkpoint",
        remedy="accelerate launch train/main.py --output-dir <run>",
    )


def load_pipeline(run: str | Path, model: str, *, weights: str = "auto", device: str = "") -> Any:
    """Build the pipeline that samples a run: DPM-Solver++ on the schedule of its training.

    Args:
        run: see `find_unet`.
        model: model folder or hub id; gives VAE, text encoder and tokenizer.
        weights: see `find_unet`.
        device: default: the first GPU, else the CPU.

    Returns:
        a diffusers `StableDiffusionPipeline` without a safety checker.

    Raises:
        UserError: a part cannot be loaded, or the model's do not fit the U-Net.
    """
    run = Path(run)
    folder = find_unet(run, weights)

    import torch

    _quieten_libraries()
    from diffusers import (
        DPMSolverMultistepScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    scheduler = DPMSolverMultistepScheduler.from_config(_scheduler_config(run, folder))
    try:
        unet = UNet2DConditionModel.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(folder, f"cannot be loaded ({_first_line(error)})") from None
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            model, unet=unet, scheduler=scheduler, safety_checker=None, feature_extractor=None
        )
    except (OSError, ValueError) as error:
        raise UserError(
            model,
            f"cannot be loaded as a pipeline ({_first_line(error)})",
            wanted="the model folder that the dataset was encoded with",
            remedy=_REMEDY,
        ) from None
    _check_fits(model, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _check_fits(model: str, pipeline: Any) -> None:
    """Refuse a model folder that belongs to another U-Net."""
    unet, text, vae = (part.config for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae))
    for found, what, wanted in (
        (text.hidden_size, "text states of width", unet.cross_attention_dim),
        (vae.latent_channels, "latent channels:", unet.in_channels),
    ):
        if found != wanted:
            raise UserError(
                model, f"{what} {found}", wanted=f"{wanted}, as the U-Net has", remedy=_REMEDY
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _quieten_libraries() -> None:
    """No loading bars, and no advice to install what nothing here needs."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _scheduler_config(run: Path, unet: Path) -> dict[str, Any]:
    """The schedule of training, from beside the U-Net."""
    for folder in (run, unet.parent):
        path = folder / "scheduler" / "scheduler_config.json"
        if path.exists():
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return config
    raise UserError(unet.parent, "no scheduler/scheduler_config.json beside the U-Net")
