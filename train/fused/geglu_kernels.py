"""Triton kernels of GEGLU; see `train.fused.geglu`.

A program takes `block_rows` rows by `block_columns` columns of the result, and with them the same
columns of both halves of the input. Arithmetic is float32.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# 256 divides every width of Stable Diffusion's U-Nets.
_TILE = {"block_rows": 8, "block_columns": 256}


@triton.jit
def _tile(num_rows, width, block_rows: tl.constexpr, block_columns: tl.constexpr):
    """Where this program's tile is in the halves of the input and in the result."""
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    column = tl.program_id(1) * block_columns + tl.arange(0, block_columns)
    mask = (row < num_rows)[:, None] & (column < width)[None, :]
    hidden = row[:, None] * (2 * width) + column[None, :]
    return hidden, row[:, None] * width + column[None, :], mask


@triton.jit
def _load(projected, hidden_at, width, mask):
    hidden = tl.load(projected + hidden_at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(projected + hidden_at + width, mask=mask, other=0.0).to(tl.float32)
    below = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))  # the normal distribution's
    return hidden, gate, below


@triton.jit(do_not_specialize=["num_rows"])
def geglu(
    projected, output, num_rows, width, block_rows: tl.constexpr, block_columns: tl.constexpr
):
    """First half times GELU of the second."""
    hidden_at, at, mask = _tile(num_rows, width, block_rows, block_columns)
    hidden, gate, below = _load(projected, hidden_at, width, mask)
    tl.store(output + at, (hidden * gate * below).to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def geglu_gradient(
    d_output,
    projected,
    d_projected,
    num_rows,
    width,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """Gradients of both halves."""
    hidden_at, at, mask = _tile(num_rows, width, block_rows, block_columns)
    gradient = tl.load(d_output + at, mask=mask, other=0.0).to(tl.float32)
    hidden, gate, below = _load(projected, hidden_at, width, mask)
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    d_hidden = gradient * gate * below
    d_gate = gradient * hidden * (below + gate * density)
    dtype = d_projected.dtype.element_ty
    tl.store(d_projected + hidden_at, d_hidden.to(dtype), mask=mask)
    tl.store(d_projected + hidden_at + width, d_gate.to(dtype), mask=mask)


def forward(projected: Tensor) -> Tensor:
    """[..., 2I], contiguous, to [..., I]."""
    width = projected.shape[-1] // 2
    output = projected.new_empty(*projected.shape[:-1], width)
    num_rows = output.numel() // width
    geglu[_grid(num_rows, width)](projected, output, num_rows, width, **_TILE)
    return output


def backward(d_output: Tensor, projected: Tensor) -> Tensor:
    """Gradient of `projected` from that of the result; both contiguous."""
    width = projected.shape[-1] // 2
    d_projected = torch.empty_like(projected)
    num_rows = d_output.numel() // width
    geglu_gradient[_grid(num_rows, width)](
        d_output, projected, d_projected, num_rows, width, **_TILE
    )
    return d_projected


def _grid(num_rows: int, width: int) -> tuple[int, int]:
    return triton.cdiv(num_rows, _TILE["block_rows"]), triton.cdiv(width, _TILE["block_columns"])
