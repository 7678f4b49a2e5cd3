"""A model folder of Stable Diffusion 2's size with random weights: for speed, not for pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

RANDOM_SD2 = "random-sd2"


def write_random_sd2(folder: Path) -> Path:
    """Write VAE, text encoder and a small tokenizer: 0.85 GB in float16."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=768,
    )
    vae.half().save_pretrained(folder / "vae")
    text = CLIPTextConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        hidden_act="gelu",
        projection_dim=512,
        vocab_size=49408,
        max_position_embeddings=77,
    )
    CLIPTextModel(text).half().save_pretrained(folder / "text_encoder")
    tokenizer = Path(__file__).parent.parent / "examples" / "tiny-model" / "tokenizer"
    shutil.copytree(tokenizer, folder / "tokenizer")
    return folder
