"""Starting from weights that are there: another run's, a diffusers folder's, a hub's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards.errors import UserError
from shards.storage import is_remote, location, size_of
from train.checkpoint import WEIGHTS, find_unet, local_unet

_REMEDY = "--init-from <run, checkpoint, diffusers folder or hub id> of the same U-Net"


def load_initial_weights(source: str, kind: str, unet: Any) -> None:
    """Load weights alone into a U-Net: no optimizer, no step number, no average.

    Args:
        source: a run, one of its checkpoints, a diffusers folder with `unet/` (all of them local or
            behind a URL), that folder's `unet/` itself, or a hub id.
        kind: `raw` or `ema`; a run may have both.
        unet: float32, where they go.

    Raises:
        UserError: nothing is there, or it belongs to another U-Net.
    """
    weights = _read(source, kind)
    wanted = {name: tuple(p.shape) for name, p in unet.state_dict().items()}
    found = {name: tuple(w.shape) for name, w in weights.items()}
    if found != wanted:
        differing = sorted(n for n in found.keys() | wanted if found.get(n) != wanted.get(n))
        name = differing[0]
        raise UserError(
            source,
            f"weights of another U-Net ({len(differing)} differ, {name}: {found.get(name)})",
            wanted=f"{wanted.get(name)}",
            remedy=_REMEDY,
        )
    unet.load_state_dict(weights)


def _read(source: str, kind: str) -> dict[str, Tensor]:
    where = location(source)
    if size_of(where / "config.json") is not None and size_of(where / "metrics.jsonl") is None:
        folder = where  # a run has a config.json as well, and its metrics beside it
    elif is_remote(where) or where.exists():
        folder = find_unet(where, kind)
    elif where.is_absolute() or source.count("/") > 1:
        raise UserError(source, "no such folder", remedy=_REMEDY)
    else:
        return _load(source, source, subfolder="unet")  # a hub id
    with local_unet(folder) as local:
        return _load(source, str(local), variant=_variant_in(local))


def _variant_in(folder: Path) -> str | None:
    """`fp16` where a folder has its weights under that name alone."""
    has_only_fp16 = any(folder.glob("*.fp16.safetensors*")) and not (folder / WEIGHTS).exists()
    return "fp16" if has_only_fp16 else None


def _load(source: str, name: str, **options: Any) -> dict[str, Tensor]:
    from diffusers import UNet2DConditionModel

    try:
        unet, loaded = UNet2DConditionModel.from_pretrained(
            name,
            torch_dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(source, f"no U-Net weights ({reason})", remedy=_REMEDY) from None
    if missing := sorted(loaded["missing_keys"]):  # diffusers drew them, with a warning alone
        found = f"lacks {len(missing)} weights that its configuration has, first {missing[0]}"
        raise UserError(source, found, remedy=_REMEDY)
    weights: dict[str, Tensor] = unet.state_dict()
    return weights
