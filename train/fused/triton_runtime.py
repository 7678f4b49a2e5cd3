"""Where Triton kernels can run."""

from __future__ import annotations

import importlib.util
import os

import torch

_MIN_CAPABILITY = (7, 0)  # what Triton supports


def missing(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device.

    Triton's interpreter (TRITON_INTERPRET=1, set before a module with kernels is imported) runs
    them on a CPU, a program at a time: for tests.

    Args:
        device: where the tensors are.

    Returns:
        the reason, for the log; None where they can run.
    """
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cuda" and interprets:  # it would read the device's memory as the host's
        return "TRITON_INTERPRET=1 interprets kernels on the CPU"
    is_interpreted = device.type == "cpu" and interprets
    if device.type != "cuda" and not is_interpreted:
        return "no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if is_interpreted:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        return "compute capability {}.{} < {}.{}".format(*capability, *_MIN_CAPABILITY)
    return None
