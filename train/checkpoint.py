"""Checkpoints: diffusers folders plus the optimizer, without pickle, whole or not at all.

In `<run>/checkpoints/000300/`:

- `unet/` loads with `UNet2DConditionModel.from_pretrained`
- `unet_ema/` the same, averaged weights (where there are any)
- `scheduler/` the noise schedule of training
- `optimizer.safetensors`
- `state.json` step, configuration, identity of the batches, sums since the last log
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shards.canonical import canonical_json
from shards.errors import UserError
from shards.storage import TEMPORARY_SUFFIX, sync_folder, write_text_whole, write_whole
from train.objective import SCHEDULER_CONFIG

WEIGHTS = "diffusion_pytorch_model.safetensors"
_STATE = "state.json"
_STATE_KEYS = {"step", "config", "batches", "interval"}


def checkpoints_of(run: Path) -> list[Path]:
    """A run's whole checkpoints, oldest first."""
    whole = [path for path in (run / "checkpoints").glob("*") if path.name.isdigit()]
    return sorted(whole, key=lambda path: int(path.name))


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint of one step stands."""
    return run / "checkpoints" / f"{step:06d}"


def save_unet(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Write a folder that `UNet2DConditionModel.from_pretrained` loads."""
    contiguous = {name: weight.detach().contiguous() for name, weight in weights.items()}
    metadata = {"format": "pt"}
    write_whole(folder / WEIGHTS, lambda path: save_file(contiguous, path, metadata=metadata))
    write_text_whole(folder / "config.json", canonical_json(config))


def save_scheduler(folder: Path, prediction_type: str) -> None:
    """Write the schedule of training as a diffusers scheduler folder: sampling must agree."""
    config = {**SCHEDULER_CONFIG, "prediction_type": prediction_type}
    write_text_whole(folder / "scheduler_config.json", canonical_json(config))


def save_checkpoint(
    run: Path,
    *,
    step: int,
    state: dict[str, Any],
    prediction_type: str,
    unet_config: dict[str, Any],
    weights: dict[str, Tensor],
    average: dict[str, Tensor] | None,
    optimizer: dict[str, Tensor],
    keep: int,
) -> Path:
    """Write a checkpoint beside its final name, then rename; remove all but the newest `keep`."""
    final = checkpoint_path(run, step)
    temporary = _temporary(final)
    for leftover in final.parent.glob(f"*{TEMPORARY_SUFFIX}"):
        shutil.rmtree(leftover)  # of a process that was killed
    save_unet(temporary / "unet", unet_config, weights)
    if average is not None:
        save_unet(temporary / "unet_ema", unet_config, average)
    save_scheduler(temporary / "scheduler", prediction_type)
    save_file(optimizer, temporary / "optimizer.safetensors")
    write_text_whole(temporary / _STATE, canonical_json({**state, "step": step}))
    for path in temporary.rglob("*"):
        sync_folder(path)  # fsync takes a folder and a file alike
    temporary.replace(final)
    sync_folder(final.parent)
    for old in checkpoints_of(run)[:-keep]:
        shutil.rmtree(old.replace(_temporary(old)))  # never in sight half removed
    return final


def _temporary(final: Path) -> Path:
    return final.with_name(final.name + TEMPORARY_SUFFIX)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Step, configuration, batch identity and open interval of a checkpoint."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _broken(checkpoint, error) from None
    if not isinstance(state, dict) or not state.keys() >= _STATE_KEYS:
        raise _broken(checkpoint, ValueError(f"{_STATE} is not that of a run"))
    return state


def load_weights(checkpoint: Path, part: str) -> dict[str, Tensor]:
    """Tensors of `unet`, `unet_ema` or `optimizer`, on the CPU."""
    name = f"{part}.safetensors" if part == "optimizer" else f"{part}/{WEIGHTS}"
    path = checkpoint / name
    try:
        weights: dict[str, Tensor] = load_file(path)
        return weights
    except (OSError, SafetensorError) as error:
        raise _broken(checkpoint, error) from None


def _broken(checkpoint: Path, error: Exception) -> UserError:
    return UserError(
        checkpoint,
        f"not a whole checkpoint ({error})",
        remedy="delete this folder; the run then continues from the checkpoint before it",
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """Flatten an optimizer's state to `<parameter>.<moment>` tensors."""
    (group,) = optimizer.param_groups
    return {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, parameter in zip(names, group["params"], strict=True)
        for key, value in optimizer.state[parameter].items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]
) -> None:
    """Put flattened state back, in the memory layout of the parameters.

    Layout matters: the update of a channels-last weight must meet channels-last moments.
    """
    (group,) = optimizer.param_groups
    keys = sorted({name.rsplit(".", 1)[1] for name in tensors})
    state = {
        index: {key: _in_layout_of(parameter, tensors[f"{name}.{key}"]) for key in keys}
        for index, (name, parameter) in enumerate(zip(names, group["params"], strict=True))
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _in_layout_of(parameter: Tensor, saved: Tensor) -> Tensor:
    if saved.shape != parameter.shape:
        return saved.clone()  # no longer a map of the file
    return torch.empty_like(parameter, dtype=saved.dtype, device="cpu").copy_(saved)
