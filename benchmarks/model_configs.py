"""The frozen encoders of Stable Diffusion, as configurations: for counts and random weights."""

from __future__ import annotations

from typing import Any

# diffusers' AutoencoderKL; that of SD 1 is the same but for its sample size.
SD2_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 768,
}
_CLIP = {"vocab_size": 49408, "max_position_embeddings": 77}
# transformers' CLIPTextModel: OpenCLIP ViT-H/14 without its last layer, and OpenAI's CLIP ViT-L/14.
SD2_TEXT: dict[str, Any] = {
    **_CLIP,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
SD15_TEXT: dict[str, Any] = {
    **_CLIP,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
