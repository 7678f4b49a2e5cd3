"""GEGLU in one pass: the first half of a projection times GELU of the second.

A custom operator, opaque to the compiler; one Triton kernel each way, float32 arithmetic. Only the
projection is kept for the backward pass, not the halves nor GELU's result. Where Triton cannot run,
the same operator computes it with torch.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from train.fused.triton_runtime import missing


def geglu(projected: Tensor) -> Tensor:
    """First half times GELU (exact, by the error function) of the second; differentiable once.

    Shazeer, "GLU Variants Improve Transformer" (2020); the order is that of diffusers' `GEGLU`.

    Args:
        projected: [..., 2I], floating point; copied first where it is not contiguous.

    Returns:
        [..., I], contiguous.
    """
    result: Tensor = _forward(projected.contiguous())
    return result


@torch.library.custom_op("latentmill::geglu", mutates_args=())
def _forward(projected: Tensor) -> Tensor:
    if not _runs_kernels(projected.device, projected.dtype):
        hidden, gate = _halves(projected)
        return (hidden * F.gelu(gate)).to(projected.dtype)
    from train.fused import geglu_kernels

    with torch.cuda.device_of(projected):
        return geglu_kernels.forward(projected)


@_forward.register_fake
def _(projected: Tensor) -> Tensor:
    return projected.new_empty(*projected.shape[:-1], projected.shape[-1] // 2)


@torch.library.custom_op("latentmill::geglu_backward", mutates_args=())
def _backward(d_output: Tensor, projected: Tensor) -> Tensor:
    if not _runs_kernels(projected.device, projected.dtype):
        hidden, gate = _halves(projected)
        below = 0.5 * (1 + torch.erf(gate * math.sqrt(0.5)))
        density = torch.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi)
        d_hidden, d_gate = gate * below, hidden * (below + gate * density)
        halves = torch.cat([d_output * d_hidden, d_output * d_gate], dim=-1)
        return halves.to(projected.dtype)
    from train.fused import geglu_kernels

    with torch.cuda.device_of(projected):
        return geglu_kernels.backward(d_output, projected)


@_backward.register_fake
def _(d_output: Tensor, projected: Tensor) -> Tensor:
    return torch.empty_like(projected)


def _keep_projection(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, d_output: Tensor) -> Tensor:
    result: Tensor = _backward(d_output.contiguous(), *ctx.saved_tensors)
    return result


_forward.register_autograd(_differentiate, setup_context=_keep_projection)


@functools.cache  # it is asked before every kernel
def _runs_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    return dtype != torch.float64 and missing(device) is None


def _halves(projected: Tensor) -> tuple[Tensor, Tensor]:
    wide = projected.to(torch.promote_types(projected.dtype, torch.float32))
    hidden, gate = wide.chunk(2, dim=-1)
    return hidden, gate


def traffic_bytes(rows: int, width: int, itemsize: int) -> tuple[int, int]:
    """Bytes that the kernels read and write.

    Args:
        rows: of the projection, batch * tokens.
        width: I, columns of the result.
        itemsize: bytes of a number.

    Returns:
        bytes forward, bytes backward.
    """
    result = rows * width * itemsize
    return 2 * result + result, result + 2 * result + 2 * result
