"""Launches of the group norm's kernels: buffers and grids. Importing this imports Triton."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from train.fused import group_norm_kernels as kernels
from train.fused.group_norm import TILE_CHANNELS, count_chunks, empty_gradients, tile_rows

_NUM_WARPS = 8
_BLOCK_CHUNKS = 32  # rows of the small buffers that a program reads at a time
_BLOCK_IMAGES = 32


def forward(
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """`silu(group_norm(x + shift))`, and its statistics for `backward`.

    Args:
        x: [B, C, H, W] channels-last.
        shift: [B, C] or None.
        weight: [C].
        bias: [C].
        num_groups: divides C.
        eps: is added to the variance.
        silu: whether SiLU follows.

    Returns:
        [B, C, H, W] channels-last, and float32 [B, 2, C].
    """
    batch, channels, positions = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    num_chunks, group_size = count_chunks(positions), channels // num_groups
    shift, shift_stride = _rows_of(shift)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    statistics = x.new_empty(batch, 2, channels, dtype=torch.float32)
    partial = x.new_empty(batch, num_chunks, 2, channels, dtype=torch.float32)
    grid, tile = _grid(x), _tile(positions)
    kernels.tile_statistics[grid](x, partial, positions, channels, num_chunks, **tile)
    kernels.combine_statistics[(num_groups, batch)](
        partial, shift, shift_stride, statistics, positions, channels, group_size, num_chunks, eps,
        block_rows=tile_rows(positions), has_shift=shift is not None,
        **_sums(num_chunks, group_size),
    )  # fmt: skip
    kernels.normalise[grid](x, statistics, weight, bias, y, positions, channels, silu=silu, **tile)
    return y, statistics


def backward(
    dy: Tensor,
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    num_groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the shift ([0] where there is none), of weight and bias.

    Args:
        dy: [B, C, H, W] channels-last.
        x: [B, C, H, W] channels-last.
        shift: [B, C] or None.
        weight: [C].
        bias: [C].
        statistics: as `forward` returned them.
        num_groups: as in `forward`.
        silu: as in `forward`.
    """
    batch, channels, positions = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    num_chunks, group_size = count_chunks(positions), channels // num_groups
    has_shift = shift is not None
    dx, d_shift, d_weight, d_bias = empty_gradients(x, shift, weight, bias)
    partial = x.new_empty(batch, num_chunks, 3, channels, dtype=torch.float32)
    per_image = x.new_empty(batch, 2, channels, dtype=torch.float32)
    coefficients = torch.empty_like(statistics)
    grid, tile = _grid(x), _tile(positions)
    inputs = (dy, x, statistics, weight, bias)
    kernels.tile_gradients[grid](
        *inputs, partial, positions, channels, num_chunks, silu=silu, has_shift=has_shift, **tile
    )
    kernels.combine_gradients[(num_groups, batch)](
        partial, weight, statistics, per_image, coefficients, d_shift, positions, channels,
        group_size, num_chunks, has_shift=has_shift, **_sums(num_chunks, group_size),
    )  # fmt: skip
    kernels.affine_gradients[grid[:1]](
        per_image, d_weight, d_bias, batch, channels,
        block_images=_BLOCK_IMAGES, block_channels=TILE_CHANNELS,
    )  # fmt: skip
    kernels.input_gradient[grid](*inputs, coefficients, dx, positions, channels, silu=silu, **tile)
    return dx, d_shift, d_weight, d_bias


def _grid(x: Tensor) -> tuple[int, int, int]:
    """Neighbouring programs read neighbouring channels: together, whole rows of memory."""
    batch, channels, height, width = x.shape
    return triton.cdiv(channels, TILE_CHANNELS), count_chunks(height * width), batch


def _tile(positions: int) -> dict[str, int]:
    rows = tile_rows(positions)
    return {"block_rows": rows, "block_channels": TILE_CHANNELS, "num_warps": _NUM_WARPS}


def _sums(num_chunks: int, group_size: int) -> dict[str, int]:
    chunks = min(_BLOCK_CHUNKS, triton.next_power_of_2(num_chunks))
    return {"block_chunks": chunks, "block_group": triton.next_power_of_2(group_size)}


def _rows_of(shift: Tensor | None) -> tuple[Tensor | None, int]:
    """The shift with contiguous channels, and its stride: it may be a slice of a wider product."""
    if shift is None:
        return None, 0
    shift = shift if shift.stride(1) == 1 else shift.contiguous()
    return shift, shift.stride(0)
