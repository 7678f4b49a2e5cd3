"""Whether the fused kernels compute on this device what torch computes: asked before they are used.

A new GPU, driver or Triton may bring a kernel that is wrong without a word. Each is run once on
small random input, of shapes with and without remainders, and held against torch in float64 on the
CPU. What a kernel should write holds NaN before.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from train.fused.geglu import geglu
from train.fused.group_norm import group_norm
from train.fused.triton_runtime import missing

Kernel = Literal["norms", "geglu", "update"]
Comparison = tuple[str, Tensor, Tensor]  # of what, as the kernel has it, as it should be

_MIN_TOLERANCE = 2e-5  # of float32 arithmetic; a GPU's exponential is good to 22 bits
_EPS = 1e-5
# [B, C, H, W], groups, with a shift and SiLU or not: sizes that leave remainders, and that do not.
_NORMS = (((2, 130, 13, 17), 13, True), ((2, 64, 8, 8), 8, False))
_PROJECTIONS = ((3, 7, 2 * 259), (2, 8, 2 * 256))
_WEIGHTS = ((4099,), (7, 5, 3, 3), (1,))
_LEARNING_RATE, _DIVISOR, _AVERAGE_WEIGHT, _NUM_UPDATES = 0.1, 4.0, 0.1, 2
_ADAMW: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def failure_of(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str | None:
    """Run a kernel, forward and backward, and compare.

    Args:
        kernel: which.
        device: where it is to run.
        dtype: of activations and of the gradients of weights.

    Returns:
        one line of why it is not to be used: it is wrong, does not compile or cannot run; None
        where it is right.
    """
    if reason := missing(device):
        return reason
    from triton.errors import TritonError

    generator = torch.Generator().manual_seed(0)
    try:
        for name, found, expected in _CHECKS[kernel](device, dtype, generator):
            deviation = _deviation(found, expected)
            tolerance = max(torch.finfo(found.dtype).eps, _MIN_TOLERANCE)
            if not deviation <= tolerance:  # NaN is neither more nor less
                shape = "x".join(map(str, found.shape))
                return f"{name} ({shape}) is off by {deviation:.1e}, more than {tolerance:.1e}"
    except (
        RuntimeError,
        OSError,
        AssertionError,
        subprocess.CalledProcessError,
        TritonError,
    ) as error:
        # Triton asserts that the loader knows the driver's library.
        first_line = next(iter(str(error).splitlines()), "")
        return f"it does not run: {type(error).__name__}: {first_line}"
    return None


def _deviation(found: Tensor, expected: Tensor) -> float:
    """As a part of the largest number that is expected."""
    error = (found.cpu().double() - expected).abs().max()
    return float(error / expected.abs().max())


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN until something is written to them; then all is as before."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # this is what fills them
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


# The kernels --------------------------------------------------------------------------------------


def _check_norms(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[Comparison]:
    for shape, num_groups, silu in _NORMS:
        parameter_dtype = torch.float32 if silu else dtype  # as under autocast, or low weights
        inputs = {
            "x": torch.randn(shape, generator=generator).to(dtype) + 1,
            "weight": torch.randn(shape[1], generator=generator).to(parameter_dtype),
            "bias": torch.randn(shape[1], generator=generator).to(parameter_dtype),
        }
        if silu:
            inputs["shift"] = torch.randn(shape[:2], generator=generator).to(dtype)
        fused = partial(_fused_norm, num_groups=num_groups, silu=silu)
        plain = partial(_plain_norm, num_groups=num_groups, silu=silu)
        yield from _compare(fused, plain, inputs, device, generator)


def _fused_norm(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None = None, **kind: Any
) -> Tensor:
    return group_norm(x, weight=weight, bias=bias, eps=_EPS, shift=shift, **kind)


def _plain_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None = None,
    *,
    num_groups: int,
    silu: bool,
) -> Tensor:
    shifted = x if shift is None else x + shift[:, :, None, None]
    normalised = F.group_norm(shifted, num_groups, weight, bias, _EPS)
    return F.silu(normalised) if silu else normalised


def _check_geglu(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[Comparison]:
    for shape in _PROJECTIONS:
        inputs = {"projected": torch.randn(shape, generator=generator).to(dtype)}
        yield from _compare(geglu, _plain_geglu, inputs, device, generator)


def _plain_geglu(projected: Tensor) -> Tensor:
    hidden, gate = projected.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def _compare(
    fused: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    device: torch.device,
    generator: torch.Generator,
) -> Iterator[Comparison]:
    """The results and the gradients of all inputs, which are on the CPU."""
    wide = {name: value.double().requires_grad_() for name, value in inputs.items()}
    narrow = {name: value.to(device).requires_grad_() for name, value in inputs.items()}
    with torch.enable_grad():
        with _poisoned_memory():
            found = fused(**narrow)
        expected = plain(**wide)
        gradient = torch.randn(found.shape, generator=generator).to(found.dtype)
        with _poisoned_memory():
            gradients = torch.autograd.grad(found, list(narrow.values()), gradient.to(device))
        wanted = torch.autograd.grad(expected, list(wide.values()), gradient.double())
    yield "the result", found.detach(), expected.detach()
    for name, one, other in zip(inputs, gradients, wanted, strict=True):
        yield f"the gradient of {name}", one, other


def _check_update(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[Comparison]:
    """Some updates, then one that is left out for its NaN gradients."""
    from train.fused.adamw import FusedAdamW

    def scalar(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=device)

    weights = [torch.randn(shape, generator=generator) for shape in _WEIGHTS]
    masters, averages = ([weight.to(device, copy=True) for weight in weights] for _ in range(2))
    published = None
    if dtype != torch.float32:
        published = [torch.full_like(master, torch.nan, dtype=dtype) for master in masters]
    optimizer = FusedAdamW(masters, **_ADAMW, published=published)
    expected = [weight.double() for weight in weights]
    expected_averages = [weight.clone() for weight in expected]
    reference = torch.optim.AdamW(expected, lr=_LEARNING_RATE, **_ADAMW)
    for update in range(_NUM_UPDATES + 1):
        is_left_out = update == _NUM_UPDATES
        gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in _WEIGHTS]
        optimizer.update(
            [(g * torch.nan if is_left_out else g).to(device) for g in gradients],
            learning_rate=scalar(_LEARNING_RATE),
            divisor=scalar(_DIVISOR),
            left_out=scalar(float(is_left_out)),
            averages=averages,
            average_weight=_AVERAGE_WEIGHT,
        )
        if not is_left_out:
            for weight, gradient in zip(expected, gradients, strict=True):
                weight.grad = gradient.double() / _DIVISOR
            reference.step()
        for average, weight in zip(expected_averages, expected, strict=True):
            average.lerp_(weight, _AVERAGE_WEIGHT)
    yield "the weights", _joined(masters), _joined(expected)
    yield "the average", _joined(averages), _joined(expected_averages)
    if published is not None:
        yield "the copy of the weights", _joined(published), _joined(expected)


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


_CHECKS = {"norms": _check_norms, "geglu": _check_geglu, "update": _check_update}
