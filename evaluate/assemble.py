"""A U-Net and a schedule joined with a model folder into a `StableDiffusionPipeline`."""

from __future__ import annotations

from typing import Any

from shards.errors import UserError

_REMEDY = "--model <folder or hub id>"


def assemble(unet: Any, scheduler_config: dict[str, Any], model: str) -> Any:
    """Build a pipeline that samples a U-Net: DPM-Solver++ on the schedule of its training.

    Args:
        unet: diffusers `UNet2DConditionModel`.
        scheduler_config: of any diffusers scheduler.
        model: model folder or hub id; gives VAE, text encoder and tokenizer.

    Returns:
        a diffusers `StableDiffusionPipeline` without a safety checker, float32, on the CPU but for
        the U-Net, which stays where it is.

    Raises:
        UserError: the model cannot be loaded, or does not fit the U-Net.
    """
    _quieten_libraries()
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    scheduler = DPMSolverMultistepScheduler.from_config(scheduler_config)
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            model, unet=unet, scheduler=scheduler, safety_checker=None, feature_extractor=None
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            model,
            f"cannot be loaded as a pipeline ({reason})",
            wanted="the model folder that the dataset was encoded with",
            remedy=_REMEDY,
        ) from None
    _check_fits(model, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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


def _quieten_libraries() -> None:
    """No loading bars, and no advice to install what nothing here needs."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
