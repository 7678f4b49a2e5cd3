"""What a run computes in, resolved once from `--mixed-precision`."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """How the U-Net computes.

    Attributes:
        name: `no`, `fp16`, `bf16` or `bf16-weights`.
        dtype: of its matrix products.
        autocast: operators are cast one by one and the weights are float32; else the weights are of
            `dtype` themselves.
    """

    name: str
    dtype: torch.dtype
    autocast: bool

    @property
    def scales_loss(self) -> bool:
        """Whether gradients would vanish in float16 unless the loss is scaled up."""
        return self.dtype == torch.float16

    @property
    def has_low_weights(self) -> bool:
        """Whether the model is kept in `dtype`, beside float32 masters."""
        return self.dtype != torch.float32 and not self.autocast


def resolve_precision(choice: str, device: torch.device) -> Precision:
    """`auto` to what it comes to here.

    Args:
        choice: `no`, `fp16`, `bf16`, `bf16-weights` or `auto`: what `accelerate launch` was told,
            else bf16-weights on a GPU that has bfloat16, else no.
        device: where the run computes.
    """
    if choice == "auto":
        told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # `no` unless one was named
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        choice = told if told in ("fp16", "bf16") else "bf16-weights" if has_bf16 else "no"
    dtype = {"no": torch.float32, "fp16": torch.float16}.get(choice, torch.bfloat16)
    return Precision(choice, dtype, autocast=choice in ("fp16", "bf16"))
