"""Group norm of channels-last activations with what surrounds it: a shift before, SiLU after.

    y = silu(group_norm(x + shift[:, :, None, None]))

One custom operator, opaque to the compiler: three Triton kernels forward and four backward, none of
which leaves the channels-last layout, as ATen's CUDA kernel does. Arithmetic is float32; x is read
twice each way and only x is kept for the backward pass. Where Triton cannot run, the same operator
computes it with torch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from train.fused.triton_runtime import missing

TILE_CHANNELS = 64  # 128 bytes of bfloat16; divides every width of Stable Diffusion's U-Nets
_TILE_POSITIONS = (16, 128)  # at least, at most
_FLOAT32_BYTES = 4


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    shift: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """`silu(group_norm(x + shift[:, :, None, None]))`, differentiable once.

    Args:
        x: [B, C, H, W], floating point; copied first where it is not channels-last.
        num_groups: divides C.
        weight: [C] of any floating type; so is its gradient.
        bias: [C] of any floating type; so is its gradient.
        eps: is added to the variance.
        shift: [B, C] of any floating type, what a time embedding adds to the channels.
        silu: whether SiLU follows.

    Returns:
        [B, C, H, W] in x's dtype, channels-last.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    y, _ = _forward(x, shift, weight, bias, num_groups, eps, silu)
    return y


# The operators ------------------------------------------------------------------------------------


@torch.library.custom_op("latentmill::group_norm", mutates_args=())
def _forward(
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """The result, and [B, 2, C]: what is subtracted from x, and what multiplies the rest."""
    if not _runs_kernels(x.device, x.dtype):
        return _torch_forward(x, shift, weight, bias, num_groups, eps, silu)
    from train.fused import group_norm_launch

    with torch.cuda.device_of(x):
        return group_norm_launch.forward(x, shift, weight, bias, num_groups, eps, silu)


@_forward.register_fake
def _(
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    statistics = x.new_empty(x.shape[0], 2, x.shape[1], dtype=_arithmetic_dtype(x))
    return torch.empty_like(x, memory_format=torch.channels_last), statistics


@torch.library.custom_op("latentmill::group_norm_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    num_groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the shift ([0] where there is none), of weight and bias."""
    if not _runs_kernels(x.device, x.dtype):
        return _torch_backward(dy, x, shift, weight, bias, statistics, num_groups, silu)
    from train.fused import group_norm_launch

    with torch.cuda.device_of(x):
        return group_norm_launch.backward(dy, x, shift, weight, bias, statistics, num_groups, silu)


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    num_groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_gradients(x, shift, weight, bias)


def empty_gradients(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the backward operator returns, without contents."""
    d_shift = x.new_empty(0) if shift is None else shift.new_empty(shift.shape)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    return dx, d_shift, torch.empty_like(weight), torch.empty_like(bias)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, shift, weight, bias, num_groups, _, silu = inputs
    ctx.set_materialize_grads(False)  # the statistics have no gradient: no zeros in its place
    ctx.save_for_backward(x, shift, weight, bias, output[1])
    ctx.num_groups, ctx.silu = num_groups, silu


def _differentiate(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    x, shift, weight, bias, statistics = ctx.saved_tensors
    dy = dy.contiguous(memory_format=torch.channels_last)
    dx, d_shift, d_weight, d_bias = _backward(
        dy, x, shift, weight, bias, statistics, ctx.num_groups, ctx.silu
    )
    return dx, None if shift is None else d_shift, d_weight, d_bias, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep_inputs)


@functools.cache  # it is asked before every kernel
def _runs_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    return dtype != torch.float64 and missing(device) is None


# With torch ---------------------------------------------------------------------------------------


def _torch_forward(
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    values = x.to(_arithmetic_dtype(x))
    shift = x.new_zeros(x.shape[:2]) if shift is None else shift
    shift = shift.to(values.dtype)
    grouped = (values + shift[:, :, None, None]).unflatten(1, (num_groups, -1))
    variance, mean = torch.var_mean(grouped, dim=(2, 3, 4), correction=0)
    group_size = x.shape[1] // num_groups
    centre = mean.repeat_interleave(group_size, dim=1) - shift
    rstd = (variance + eps).rsqrt().repeat_interleave(group_size, dim=1)
    statistics = torch.stack([centre, rstd], dim=1)
    y = _normalised(x, statistics) * _per_channel(weight, x) + _per_channel(bias, x)
    y = (F.silu(y) if silu else y).to(x.dtype)
    return y.contiguous(memory_format=torch.channels_last), statistics


def _torch_backward(
    dy: Tensor,
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    num_groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normalised = _normalised(x, statistics)
    gradient, scale = dy.to(normalised.dtype), _per_channel(weight, x)
    if silu:
        before = normalised * scale + _per_channel(bias, x)
        sigmoid = before.sigmoid()
        gradient = gradient * sigmoid * (1 + before * (1 - sigmoid))
    d_weight, d_bias = (gradient * normalised).sum((0, 2, 3)), gradient.sum((0, 2, 3))
    groups = (num_groups, -1)
    scaled, normalised = (gradient * scale).unflatten(1, groups), normalised.unflatten(1, groups)
    slope = (scaled * normalised).mean((2, 3, 4), keepdim=True)
    centred = scaled - scaled.mean((2, 3, 4), keepdim=True) - normalised * slope
    dx = centred.flatten(1, 2) * statistics[:, 1, :, None, None]
    d_shift = x.new_empty(0) if shift is None else dx.sum((2, 3)).to(shift.dtype)
    dx = dx.to(x.dtype).contiguous(memory_format=torch.channels_last)
    return dx, d_shift, d_weight.to(weight.dtype), d_bias.to(bias.dtype)


def _normalised(x: Tensor, statistics: Tensor) -> Tensor:
    centre, rstd = statistics[:, :, :, None, None].unbind(1)
    return (x.to(rstd.dtype) - centre) * rstd


def _per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter.to(_arithmetic_dtype(x))[:, None, None]


def _arithmetic_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# What the kernels read and write ------------------------------------------------------------------


def tile_rows(positions: int) -> int:
    """Positions that a program of the kernels takes: a power of two."""
    at_least, at_most = _TILE_POSITIONS
    return min(at_most, max(at_least, 1 << (positions - 1).bit_length()))


def count_chunks(positions: int) -> int:
    """Tiles that an image's positions are cut into."""
    return -(-positions // tile_rows(positions))


def traffic_bytes(
    batch: int,
    channels: int,
    positions: int,
    itemsize: int,
    *,
    parameter_itemsize: int = 4,
    shift_itemsize: int = 0,
) -> tuple[int, int]:
    """Bytes that the kernels read and write; what a program reads again counts once.

    Args:
        batch: images.
        channels: of x.
        positions: H * W.
        itemsize: bytes of a number of x, and of its gradients.
        parameter_itemsize: bytes of a number of weight and bias, and of their gradients.
        shift_itemsize: bytes of a number of the shift; 0 where there is none.

    Returns:
        bytes forward, bytes backward.
    """
    activation = batch * channels * positions * itemsize
    affine = 2 * channels * parameter_itemsize
    shift = batch * channels * shift_itemsize
    pairs = 2 * batch * channels * _FLOAT32_BYTES  # [B, 2, C]
    sums = batch * count_chunks(positions) * channels * _FLOAT32_BYTES
    forward = (
        (activation + 2 * sums)  # tile_statistics
        + (2 * sums + shift + pairs)  # combine_statistics
        + (activation + pairs + affine + activation)  # normalise
    )
    num_sums = 3 if shift else 2
    of_shift = pairs // 2 + shift if shift else 0
    backward = (
        (2 * activation + pairs + affine + num_sums * sums)  # tile_gradients
        + (num_sums * sums + affine // 2 + 2 * pairs + of_shift)  # combine_gradients
        + (pairs + affine)  # affine_gradients
        + (2 * activation + 2 * pairs + affine + activation)  # input_gradient
    )
    return forward, backward
