"""What the ladder of the training step found on a device: which switches did not pay there.

`python -m benchmarks train-step --ladder` writes it, once it has measured on a GPU; every later run
of the same U-Net, resolution and torch on such a device leaves off what cost time or failed, where
its switch is `auto`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from shards.canonical import canonical_json
from shards.errors import UserError
from shards.storage import write_text_whole
from train.config import TrainConfig
from train.unet import load_unet_config

_FORMAT = 1


def tuned_path(config: TrainConfig, device: torch.device) -> Path:
    """The file for a run's U-Net and resolution on a GPU: in the user's cache folder.

    Raises:
        RuntimeError: the user has no home, and `XDG_CACHE_HOME` names no folder.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    gpu = re.sub(r"[^a-z0-9.]+", "-", torch.cuda.get_device_name(device).lower())
    release = torch.__version__.partition("+")[0]
    unet = canonical_json(load_unet_config(config.unet))  # most of them are called config.json
    name = f"{Path(config.unet).stem}-{hashlib.sha256(unet.encode()).hexdigest()[:8]}"
    return cache / "latentmill" / "step" / f"{gpu}_{name}-{config.resolution}_torch-{release}.json"


def read_tuned(config: TrainConfig, device: torch.device) -> dict[str, str]:
    """Why a switch is to stay off, by its name; empty where nothing was measured, or within reach.

    Raises:
        UserError: the file is not what `write_tuned` writes.
    """
    if device.type != "cuda":
        return {}
    try:
        path = tuned_path(config, device)
        text = path.read_text(encoding="utf-8")
    except (OSError, RuntimeError):  # of a home folder that is another's, or is none
        return {}
    except UnicodeDecodeError as error:
        raise _not_the_ladders(path, error) from None
    try:
        document = json.loads(text)
        off: dict[str, Any] = document["off"] if document["format"] == _FORMAT else {}
        return {str(name): str(reason) for name, reason in off.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _not_the_ladders(path, error) from None


def _not_the_ladders(path: Path, error: Exception) -> UserError:
    what = f"not what the ladder writes ({type(error).__name__}: {error})"
    return UserError(path, what, remedy="delete it")


def write_tuned(config: TrainConfig, device: torch.device, off: dict[str, str]) -> Path:
    """Keep what was found for the runs to come; replaces what was found before.

    Args:
        config: of the run that was measured.
        device: that it ran on.
        off: why, by the name of the switch.

    Returns:
        where.

    Raises:
        OSError: it cannot be written.
        RuntimeError: see `tuned_path`.
    """
    path = tuned_path(config, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_whole(path, canonical_json({"format": _FORMAT, "off": off}))
    return path
