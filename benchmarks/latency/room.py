"""Whether a model can be timed here: on a CPU, one in full size would take hours and all memory."""

from __future__ import annotations

from benchmarks.latency.config import LatencyConfig
from benchmarks.latency.models import ModelParts
from shards.column import Json

_GIB = 2**30
_BYTES = 4  # float32


def obstacle(config: LatencyConfig, parts: ModelParts, flops: Json, num_arms: int) -> str:
    """Why the calls are not made, where there is no GPU; empty where they are.

    Args:
        config: what was asked for.
        parts: of the model.
        flops: of one image, see `count_all`.
        num_arms: pipelines in memory at a time, beside the one they are copied from.
    """
    import torch

    from train.flops import matmul_flops_per_sec
    from train.host_memory import available_bytes

    needed, room = _BYTES * (num_arms + 1) * _count_weights(parts), available_bytes()
    if needed > room:
        return (
            f"no CUDA device, and {num_arms + 1} pipelines take {needed / _GIB:.0f} GiB without "
            f"activations, of which the host has {room / _GIB:.0f} left"
        )
    image_flops = flops["text"] + flops["vae"] + config.steps * flops["unet_step"]
    num_images = num_arms * (config.trials + config.warmup) * sum(config.batch_sizes)
    reached = matmul_flops_per_sec(torch.device("cpu"), torch.float32)
    minutes = num_images * image_flops / reached / 60
    if minutes <= config.max_minutes:
        return ""
    return (
        f"no CUDA device; predicted from FLOPs and the products measured here: {minutes:,.0f} "
        f"minutes for {num_images} images of {image_flops / 1e12:.1f} TFLOP at "
        f"{reached / 1e9:.0f} GFLOP/s; --max-minutes is {config.max_minutes:g}"
    )


def _count_weights(parts: ModelParts) -> int:
    import torch

    with torch.device("meta"):
        return sum(p.numel() for module in parts.build() for p in module.parameters())
