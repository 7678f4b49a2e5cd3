"""Whether a ladder has room where there is no GPU: large U-Nets would take all of the memory."""

from __future__ import annotations

from shards.errors import UserError
from train.config import TrainConfig
from train.host_memory import available_bytes
from train.unet import load_unet_config

# Float32 numbers for each weight: of two rungs the weight, its gradient, two moments and the
# average; of the reference weight and gradient twice, once to compute with.
_NUMBERS = 2 * 5 + 4
_GIB = 2**30


def check_host_room(config: TrainConfig) -> None:
    """Refuse a U-Net that is too large for a ladder in the host's memory.

    Raises:
        UserError: it is.
    """
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(load_unet_config(config.unet))
    num_weights = sum(parameter.numel() for parameter in unet.parameters())
    needed, room = 4 * _NUMBERS * num_weights, available_bytes()
    if needed > room:
        raise UserError(
            "--ladder",
            f"no CUDA device, and the host has {room / _GIB:.0f} GiB left",
            wanted=f"{needed / _GIB:.0f} GiB for {num_weights:,} weights, activations not counted",
            remedy="a GPU, or --preset tiny; python -m benchmarks traffic counts bytes without one",
        )
