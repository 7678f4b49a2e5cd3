"""FLOPs per image of each part of a training step: exact, from the operators, on no device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.model_configs import SD2_TEXT, SD2_VAE, SD15_TEXT
from precompute.model_folder import ModelFolder
from shards.column import ImageColumn, Json, TextColumn
from train.unet import load_unet_config

_RESOLUTIONS = (256, 512)
_NUM_TOKENS = 77
_DOWNSAMPLE_FACTOR = 8
# U-Net, and the text encoder that goes with it; both have the same autoencoder.
_MODELS = {"sd2-base": SD2_TEXT, "sd15": SD15_TEXT}


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
    import torch

    vae = _build_vae(model.vae_class, model.vae_config)
    pixel_values = torch.empty(1, 3, resolution, resolution, device="meta")
    return _count(lambda: vae.encode(pixel_values))


def text_flops(model: ModelFolder, text: TextColumn) -> int:
    """FLOPs of a text encoder for one caption."""
    encoder = _build_text_encoder(model.text_class(text.part), model.text_config(text.part))
    return _count_text(encoder, text.num_tokens)


def table() -> list[Json]:
    """Parameters and FLOPs per image of the published models, in full size.

    Returns:
        a row for each U-Net and resolution: parameters and FLOPs of its `unet` (forward and
        backward), `vae` (its encoder) and `text` encoder, and `predicted_ratio`.
    """
    vae = _build_vae("AutoencoderKL", SD2_VAE)
    return [
        _table_row(unet, resolution, vae, _build_text_encoder("CLIPTextModel", text))
        for unet, text in _MODELS.items()
        for resolution in _RESOLUTIONS
    ]


def predicted_ratio(flops: dict[str, int]) -> float:
    """Online time over offline time if FLOPs alone decided."""
    return sum(flops.values()) / flops["unet"]


def _table_row(unet: str, resolution: int, vae: Any, text_encoder: Any) -> Json:
    import torch

    from train.flops import unet_flops

    latent_size = resolution // _DOWNSAMPLE_FACTOR
    pixel_values = torch.empty(1, 3, resolution, resolution, device="meta")
    flops = {
        "unet": unet_flops(load_unet_config(unet), latent_size, _NUM_TOKENS),
        "vae": _count(lambda: vae.encode(pixel_values)),
        "text": _count_text(text_encoder, _NUM_TOKENS),
    }
    num_parameters = {
        "unet": _num_parameters(_build_unet(unet)),
        "vae": _num_parameters(vae.encoder) + _num_parameters(vae.quant_conv),
        "text": _num_parameters(text_encoder),
    }
    return {
        "unet": unet,
        "resolution": resolution,
        "num_parameters": num_parameters,
        "flops_per_image": flops,
        "predicted_ratio": predicted_ratio(flops),
    }


# Models without weights ---------------------------------------------------------------------------


def _build_unet(name: str) -> Any:
    import diffusers
    import torch

    with torch.device("meta"):
        return diffusers.UNet2DConditionModel.from_config(load_unet_config(name))


def _build_vae(class_name: str, config: Json) -> Any:
    import diffusers
    import torch

    with torch.device("meta"):
        return getattr(diffusers, class_name).from_config(config)


def _build_text_encoder(class_name: str, config: Json) -> Any:
    import torch
    import transformers

    with torch.device("meta"):
        return getattr(transformers, class_name)(transformers.CLIPTextConfig(**config))


def _num_parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _count_text(encoder: Any, num_tokens: int) -> int:
    import torch

    input_ids = torch.zeros(1, num_tokens, dtype=torch.long, device="meta")
    return _count(lambda: encoder(input_ids))


def _count(run: Callable[[], object]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    total: int = counter.get_total_flops()
    return total
