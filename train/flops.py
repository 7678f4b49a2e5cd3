"""FLOPs of the U-Net, counted, and of the device, measured: together the share that is used."""

from __future__ import annotations

import json
import time
from functools import cache
from typing import Any

import torch

from shards.canonical import canonical_json

_SIDE = {"cuda": 8192, "cpu": 1024}
_PRODUCTS = 4  # of each try
_SECONDS = 0.5  # of tries, the best of which counts: a GPU raises its clocks meanwhile


def unet_flops(unet_config: dict[str, Any], latent_size: int, num_tokens: int) -> int:
    """FLOPs (2 per multiply-add) of the U-Net's forward and backward pass for one image.

    Counted from the operators, on meta tensors; attention's backward counts as twice its forward,
    as torch counts it, whatever the kernel recomputes.

    Args:
        unet_config: diffusers configuration.
        latent_size: h = w.
        num_tokens: of a caption.
    """
    return _count(canonical_json(unet_config), latent_size, num_tokens)


@cache
def _count(unet_config_json: str, latent_size: int, num_tokens: int) -> int:
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    unet_config = json.loads(unet_config_json)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config({**unet_config, "sample_size": latent_size})
        latents = torch.empty(1, unet_config["in_channels"], latent_size, latent_size)
        states = torch.empty(1, num_tokens, unet_config["cross_attention_dim"])
        timesteps = torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        unet(latents, timesteps, states).sample.sum().backward()
    total: int = counter.get_total_flops()
    return total


@cache
def matmul_flops_per_sec(device: torch.device, dtype: torch.dtype) -> float:
    """What the device reaches in square matrix products, measured once; waits for the device.

    Random numbers: products of zeros draw less power and run faster than training ever will.
    """
    if device.type == "cpu" and dtype == torch.float16:
        dtype = torch.float32  # no CPU kernel worth measuring
    side = _SIDE.get(device.type, 1024)
    generator = torch.Generator(device).manual_seed(0)
    left = torch.randn(side, side, device=device, generator=generator).to(dtype)
    left @ left  # the first one loads the library
    tries: list[float] = []
    while sum(tries) < _SECONDS:
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(_PRODUCTS):
            left @ left
        _synchronize(device)
        tries.append(time.perf_counter() - start)
    return _PRODUCTS * 2 * side**3 / min(tries)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
