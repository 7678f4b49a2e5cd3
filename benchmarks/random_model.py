"""A model folder of Stable Diffusion's size with random weights: for speed, not for pictures."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.model_configs import SD2_VAE
from benchmarks.stage_one_data import draw_jpeg


def write_random_model(folder: Path, text: dict[str, Any]) -> Path:
    """Write VAE, text encoder and a small tokenizer: 0.85 GB in float16 with SD 2's.

    Args:
        folder: where to.
        text: configuration of the text encoder.
    """
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    vae = AutoencoderKL(**SD2_VAE)
    vae.register_to_config(scaling_factor=_scaling_factor(vae))
    vae.half().save_pretrained(folder / "vae")
    CLIPTextModel(CLIPTextConfig(**text)).half().save_pretrained(folder / "text_encoder")
    tokenizer = Path(__file__).parent.parent / "examples" / "tiny-model" / "tokenizer"
    shutil.copytree(tokenizer, folder / "tokenizer")
    return folder


def _scaling_factor(vae: Any) -> float:
    """What brings the latents of drawn pictures to deviation 1, near which stage 2 wants them."""
    import torch
    from PIL import Image

    jpeg = Image.open(io.BytesIO(draw_jpeg(np.random.default_rng(0), 512, 512))).resize((256, 256))
    pixel_values = torch.from_numpy(np.asarray(jpeg).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(pixel_values).latent_dist.sample()
    return 1 / float(latents.std())
