"""Group and layer norms in the precision of autocast.

Autocast runs them in float32 on a GPU, which casts every activation up and down again. Here input,
weight and bias are cast down for the call instead; the kernels still sum in float32. The idea is
MosaicML Composer's `LowPrecisionGroupNorm` and `LowPrecisionLayerNorm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shards.errors import UserError


class LowPrecisionGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` that computes in `compute_dtype`; its parameters stay as they are."""

    compute_dtype: torch.dtype

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in torch
        """[B, C, ...] to the same shape in `compute_dtype`."""
        weight, bias = _cast(self.weight, self.compute_dtype), _cast(self.bias, self.compute_dtype)
        with torch.autocast(input.device.type, enabled=False):
            low = input.to(self.compute_dtype)
            return F.group_norm(low, self.num_groups, weight, bias, self.eps)


class LowPrecisionLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` that computes in `compute_dtype`; its parameters stay as they are."""

    compute_dtype: torch.dtype

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in torch
        """[..., *normalized_shape] to the same shape in `compute_dtype`."""
        weight, bias = _cast(self.weight, self.compute_dtype), _cast(self.bias, self.compute_dtype)
        with torch.autocast(input.device.type, enabled=False):
            low = input.to(self.compute_dtype)
            return F.layer_norm(low, self.normalized_shape, weight, bias, self.eps)


_LOW_PRECISION: dict[type[nn.Module], type[nn.Module]] = {
    nn.GroupNorm: LowPrecisionGroupNorm,
    nn.LayerNorm: LowPrecisionLayerNorm,
}


def use_low_precision_norms(unet: nn.Module, dtype: torch.dtype) -> int:
    """Let a model's group and layer norms compute in `dtype`, in place.

    Args:
        unet: any module; parameters, names and hooks of its norms stay the very same.
        dtype: that of autocast.

    Returns:
        how many norms were changed.

    Raises:
        UserError: `dtype` is float32: there is no lower precision to use.
    """
    if dtype == torch.float32:
        raise UserError(
            "--low-precision-norm",
            "the run computes in float32",
            remedy="--mixed-precision bf16, or leave --low-precision-norm out",
        )
    norms: list[Any] = [module for module in unet.modules() if type(module) in _LOW_PRECISION]
    for norm in norms:
        # Its class alone is another one: optimizers and hooks hold on to what they know.
        norm.__class__ = _LOW_PRECISION[type(norm)]
        norm.compute_dtype = dtype
    return len(norms)


def _cast(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.to(dtype)
