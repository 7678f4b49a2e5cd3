"""Which attention the U-Net runs; resolved once, by trying it, and said in the log."""

from __future__ import annotations

from typing import Any

import torch

from shards.errors import UserError


def apply_attention(unet: Any, choice: str, device: torch.device) -> str:
    """Give the U-Net its attention processors.

    Args:
        unet: diffusers U-Net.
        choice: `auto`, `xformers` or `sdpa`.
        device: where it will run.

    Returns:
        the name of what will run.

    Raises:
        UserError: xFormers was asked for and does not run here.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    problem = _xformers_problem(device) if choice in ("auto", "xformers") else ""
    if choice == "xformers" and problem:
        raise UserError(
            "--attention", f"xformers does not run here ({problem})", remedy="--attention auto"
        )
    if choice == "sdpa" or problem:
        unet.set_attn_processor(AttnProcessor2_0())  # torch.nn.functional's; picks its own kernel
    else:
        unet.enable_xformers_memory_efficient_attention()
    names = {type(processor).__name__ for processor in unet.attn_processors.values()}
    return "+".join(sorted(names))


def _xformers_problem(device: torch.device) -> str:
    """Why xFormers cannot be used, found by a small forward and backward pass; empty if it can."""
    if device.type != "cuda":
        return f"it needs CUDA, the device is {device.type}"
    try:
        from xformers.ops import memory_efficient_attention

        query = torch.randn(1, 16, 4, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
        memory_efficient_attention(query, query, query).sum().backward()
    except (ImportError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        return str(error).strip().splitlines()[0]
    return ""
