"""Frozen models: from a model folder onto a device, whole or not at all."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError

from precompute.model_folder import ModelFolder
from shards.errors import UserError


def choose_device(device: str) -> torch.device:
    """`auto` is the first CUDA device, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError("--device", f"{device} ({str(error).splitlines()[0]})") from None
    return chosen


def find_devices(device: str) -> list[str]:
    """The device of that name; for `auto` every CUDA device, or the CPU where there is none."""
    if device == "auto" and torch.cuda.is_available():
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [str(choose_device(device))]


def load_part(model: ModelFolder, part: str, loader: Any, **options: Any) -> Any:
    """What `loader.from_pretrained` makes of a part of a model folder.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        return loader.from_pretrained(model.path, subfolder=part, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _cannot_be_loaded(model, part, str(error).strip().splitlines()[0]) from None


def load_frozen(model: ModelFolder, part: str, loader: Any, **options: Any) -> Any:
    """A part with all its weights, for inference.

    Raises:
        UserError: it cannot be loaded, or lacks weights.
    """
    options["variant"] = model.weights(part).variant
    loaded, report = load_part(model, part, loader, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):  # the libraries would make them up at random
        raise _cannot_be_loaded(model, part, f"{len(missing)} weights missing: {missing[0]}, …")
    return loaded.requires_grad_(False).eval()


def _cannot_be_loaded(model: ModelFolder, part: str, why: str) -> UserError:
    return UserError(
        model.path / part,
        f"cannot be loaded ({why})",
        wanted=f"a {part} as diffusers saves it",
        remedy="save the model with save_pretrained, or name another --model",
    )
