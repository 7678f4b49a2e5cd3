"""The U-Net to train: its shipped configurations, and whether it fits a dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shards.column import ImageColumn, TextColumn
from shards.dataset import Column
from shards.errors import DatasetError, UserError

_SHIPPED = Path(__file__).parent / "unets"
_NEEDED = {"in_channels", "cross_attention_dim"}  # what a dataset is held against


def load_unet_config(name: str) -> dict[str, Any]:
    """A shipped configuration by name, or one from a diffusers config.json.

    Raises:
        UserError: neither, or not a configuration.
    """
    path = _SHIPPED / f"{name}.json" if "/" not in name else Path(name)
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        shipped = ", ".join(sorted(p.stem for p in _SHIPPED.glob("*.json")))
        raise UserError(
            "--unet", f"no U-Net configuration {name!r}", wanted=f"one of {shipped}, or a path"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(path, f"not a U-Net configuration ({error})") from None
    missing = _NEEDED - config.keys() if isinstance(config, dict) else _NEEDED
    if missing:
        raise UserError(path, f"not a U-Net configuration (no {', '.join(sorted(missing))})")
    return config


def check_fits(
    config: dict[str, Any], image: Column[ImageColumn], text: Column[TextColumn]
) -> None:
    """Refuse a dataset that was encoded for another U-Net.

    Raises:
        DatasetError: names the column, what it holds and what the U-Net wants.
    """
    remedy = "another preset, or precompute with the MODEL that belongs to this U-Net"
    if config["in_channels"] != image.spec.latent_channels:
        raise DatasetError(
            image.dataset / image.column_id,
            f"latents of {image.spec.latent_channels} channels from {image.model}",
            wanted=f"{config['in_channels']}, the U-Net's in_channels",
            remedy=remedy,
        )
    if config["cross_attention_dim"] != text.spec.dim:
        raise DatasetError(
            text.dataset / text.column_id,
            f"text states of width {text.spec.dim} from {text.model}",
            wanted=f"{config['cross_attention_dim']}, the U-Net's cross_attention_dim",
            remedy=remedy,
        )


def build_unet(config: dict[str, Any], latent_size: int, seed: int) -> Any:
    """A randomly initialised `UNet2DConditionModel`, float32 and channels-last.

    Args:
        config: diffusers configuration.
        latent_size: becomes the configuration's `sample_size`.
        seed: of the weights; torch's global generator is left as it was.
    """
    import torch
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel.from_config({**config, "sample_size": latent_size})
    return unet.to(memory_format=torch.channels_last)
