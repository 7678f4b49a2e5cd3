"""Batches to the device: copies that do not wait, integers multiplied out there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shards.quantize import Quantized


def to_device(stored: Any, device: torch.device) -> Tensor:
    """A batch's moments or states as a tensor: float16 as they come, int8 as float32 numbers.

    Args:
        stored: numpy array, tensor, or `Quantized`.
        device: where to; from pinned memory the copy overlaps with what the device is doing.
    """
    if not isinstance(stored, Quantized):
        return torch.as_tensor(stored).to(device, non_blocking=True)
    numbers = to_device(stored.values, device).float()
    for scale in stored.scales:
        numbers.mul_(to_device(scale, device))
    return numbers
