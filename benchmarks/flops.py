"""FLOPs per image of each part of a training step: exact, from the operators, on no device."""

from __future__ import annotations

from typing import Any

from precompute.model_folder import ModelFolder
from shards.column import ImageColumn, TextColumn
from train.unet import load_unet_config


def flops_per_image(
    unet: str, model: ModelFolder, image: ImageColumn, text: TextColumn
) -> dict[str, int]:
    """FLOPs (2 per multiply-add) for one image, counted on meta tensors.

    Args:
        unet: name of the U-Net's configuration.
        model: folder of the frozen encoders.
        image: gives resolution and latent shape.
        text: gives tokens and width.

    Returns:
        `unet` forward and backward; `vae` encode; `text` forward.
    """
    from train.flops import unet_flops

    return {
        "unet": unet_flops(load_unet_config(unet), image.latent_size, text.num_tokens),
        "vae": vae_flops(model, image.resolution),
        "text": text_flops(model, text),
    }


def vae_flops(model: ModelFolder, resolution: int) -> int:
    """FLOPs of the autoencoder's encoder for one image."""
    import diffusers
    import torch

    with torch.device("meta"):
        vae = getattr(diffusers, model.vae_class).from_config(model.vae_config)
        pixel_values = torch.randn(1, 3, resolution, resolution)
    return _count(lambda: vae.encode(pixel_values))


def text_flops(model: ModelFolder, text: TextColumn) -> int:
    """FLOPs of a text encoder for one caption."""
    import torch
    import transformers

    with torch.device("meta"):
        text_config = transformers.CLIPTextConfig(**model.text_config(text.part))
        encoder = getattr(transformers, model.text_class(text.part))(text_config)
        input_ids = torch.zeros(1, text.num_tokens, dtype=torch.long)
    return _count(lambda: encoder(input_ids))


def _count(run: Any) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    total: int = counter.get_total_flops()
    return total


def predicted_ratio(flops: dict[str, int]) -> float:
    """Online time over offline time if FLOPs alone decided."""
    return sum(flops.values()) / flops["unet"]
