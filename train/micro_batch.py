"""How many rows go through the U-Net at once: as asked, or as many as the device's memory holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from shards.errors import UserError
from train.diffusion_loss import DiffusionLoss

_WITHOUT_MEASURE = 16  # on a CPU, where larger batches gain nothing
_TRIED = (2, 6)
# Convolution workspaces, what a checkpoint copies and fragments need room as well.
_USABLE_FRAC = 0.85

PeakBytes = Callable[[int], int]


def choose_micro_batch(
    requested: int | Literal["auto"],
    share: int,
    peak_bytes: PeakBytes | None = None,
    available_bytes: int = 0,
) -> int:
    """Rows per forward pass: a divisor of a process's share.

    Memory grows linearly with the rows, so two small passes tell how many fit.

    Args:
        requested: 0 for the whole share; `auto` for the largest that fits.
        share: rows of a step on one process.
        peak_bytes: what the device holds at most while so many rows go forward and backward, and
            the weights are updated; None where that cannot be measured.
        available_bytes: on the device, to this process.

    Raises:
        UserError: the rows asked for do not divide the share; names the nearest sizes that do.
    """
    divisors = [size for size in range(1, share + 1) if share % size == 0]
    if requested == "auto":
        limit = _WITHOUT_MEASURE
        if peak_bytes:
            limit = _rows_that_fit(share, peak_bytes, available_bytes)
        return max(size for size in divisors if size <= max(1, limit))
    if requested and share % requested:
        nearest = sorted(sorted(divisors, key=lambda size: abs(size - requested))[:2])
        raise UserError(
            "--micro-batch-size",
            f"{requested} does not divide a process's share of {share}",
            remedy=f"--micro-batch-size {' or '.join(map(str, nearest))}",
        )
    return requested or share


def peak_bytes_on_gpu(
    model: DiffusionLoss, latent_shape: tuple[int, int, int], text_shape: tuple[int, ...], rows: int
) -> int:
    """What the GPU holds at most while so many rows go forward and backward, not compiled.

    Compiled, they need less. No gradient is left behind.

    Args:
        model: on the GPU.
        latent_shape: [C, h, w].
        text_shape: [T, D].
        rows: of the pass.
    """
    device = model.null_states.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    latents = torch.zeros(rows, *latent_shape, device=device)
    try:
        losses = model.forward(  # past what `compile_model` may have put in front of it
            latents,
            torch.zeros(rows, *text_shape, device=device),
            latents,
            latents,
            torch.zeros(rows, dtype=torch.int64, device=device),
            torch.zeros(rows, dtype=torch.bool, device=device),
        )
        losses.mean().backward()
        return torch.cuda.max_memory_allocated(device)
    finally:
        for parameter in model.parameters():
            parameter.grad = None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _rows_that_fit(share: int, peak_bytes: PeakBytes, available_bytes: int) -> int:
    few, more = _TRIED
    if share <= few:
        return share
    more = min(more, share)
    sizes = [1]
    try:
        first = peak_bytes(few)
        sizes.append(few)
        second = peak_bytes(more)
    except torch.OutOfMemoryError:
        return sizes[-1]
    bytes_per_row = max(1, second - first) / (more - few)
    fixed = first - few * bytes_per_row
    return int((_USABLE_FRAC * available_bytes - fixed) / bytes_per_row)
