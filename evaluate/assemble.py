"""The parts of a diffusers model folder, with all their weights, put together into a pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evaluate.schedulers import DEFAULT_SCHEDULER, build_scheduler
from shards.errors import UserError

if TYPE_CHECKING:
    from precompute.model_folder import ModelFolder

_REMEDY = "--model <folder or hub id>"


def assemble(
    unet: Any, scheduler_config: dict[str, Any], model: str, scheduler: str = DEFAULT_SCHEDULER
) -> Any:
    """Build a pipeline that samples a U-Net on the schedule of its training.

    Args:
        unet: diffusers `UNet2DConditionModel`.
        scheduler_config: of any diffusers scheduler.
        model: model folder or hub id; gives VAE, text encoder and tokenizer.
        scheduler: one of `SCHEDULERS`.

    Returns:
        a diffusers `StableDiffusionPipeline` without a safety checker, float32, on the CPU but for
        the U-Net, which stays where it is.

    Raises:
        UserError: the model cannot be loaded, or does not fit the U-Net.
    """
    quieten_libraries()
    from precompute.model_folder import find_model

    folder = find_model(model)
    if len(folder.text_parts) > 1:
        found = f"has {len(folder.text_parts)} text encoders"
        raise UserError(model, found, wanted="the one that the run was trained with")
    parts = {"unet": unet, "scheduler": build_scheduler(scheduler, scheduler_config)}
    pipeline = build_pipeline("StableDiffusionPipeline", parts | load_encoders(folder))
    check_fits(model, pipeline)
    return pipeline


def load_encoders(folder: ModelFolder) -> dict[str, Any]:
    """VAE, text encoders and tokenizers, float32, by the names that pipelines know them by.

    Raises:
        UserError: one cannot be loaded, or lacks weights.
    """
    import diffusers
    import torch
    import transformers

    from precompute.loading import load_frozen, load_part
    from precompute.model_folder import tokenizer_of

    autoencoder = getattr(diffusers, folder.vae_class)
    parts = {"vae": load_frozen(folder, "vae", autoencoder, torch_dtype=torch.float32)}
    for part in folder.text_parts:
        encoder = getattr(transformers, folder.text_class(part))
        parts[part] = load_frozen(folder, part, encoder, dtype=torch.float32)
        folder.tokenizer_sha256(part)  # refuses one without vocabulary
        tokenizer = tokenizer_of(part)
        parts[tokenizer] = load_part(folder, tokenizer, transformers.CLIPTokenizer)
    return parts


def build_pipeline(class_name: str, parts: dict[str, Any]) -> Any:
    """A pipeline of these parts, in eval mode, without bars and without a safety checker."""
    import diffusers

    if class_name == "StableDiffusionPipeline":
        parts = {**parts, "safety_checker": None, "feature_extractor": None}
        parts["requires_safety_checker"] = False
    pipeline = getattr(diffusers, class_name)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_fits(model: str, pipeline: Any) -> None:
    """Refuse encoders that belong to another U-Net.

    Raises:
        UserError: names the width that differs.
    """
    unet, vae = pipeline.unet.config, pipeline.vae.config
    text_width = pipeline.text_encoder.config.hidden_size
    if second := getattr(pipeline, "text_encoder_2", None):
        text_width += second.config.hidden_size
    for found, what, wanted in (
        (text_width, "text states of width", unet.cross_attention_dim),
        (vae.latent_channels, "latent channels:", unet.in_channels),
    ):
        if found != wanted:
            raise UserError(
                model, f"{what} {found}", wanted=f"{wanted}, as the U-Net has", remedy=_REMEDY
            )


def quieten_libraries() -> None:
    """No loading bars, and no advice to install what nothing here needs.

    Nor a line for each long prompt that is cut: who samples many of them counts those.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
