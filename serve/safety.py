"""Safety checkers: what decides that an image is not to be shown."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import UserError

# Images [B, H, W, 3] uint8 in, one flag for each out.
SafetyChecker = Callable[[np.ndarray], Sequence[bool]]


def load_checker(named: str, device: str) -> SafetyChecker | None:
    """The safety checker of a device.

    Args:
        named: `module:factory`, where `factory(device)` returns a `SafetyChecker`; or a folder with
            a diffusers `StableDiffusionSafetyChecker`; or empty: none.
        device: of the pipeline.

    Raises:
        UserError: it is neither, or cannot be loaded.
    """
    if not named:
        return None
    if Path(named).is_dir():
        return _load_folder(Path(named), device)
    module_name, _, factory_name = named.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            "--safety-checker",
            f"{named!r} cannot be loaded ({error})",
            wanted="module:factory, or a folder with a StableDiffusionSafetyChecker",
        ) from None
    return _one_flag_each(named, factory(device))


def _one_flag_each(named: str, checker: SafetyChecker) -> SafetyChecker:
    """The same, held to its contract: a flag that is missing or too many may be another image's."""

    def check(pictures: np.ndarray) -> Sequence[bool]:
        flags = list(checker(pictures))
        if len(flags) != len(pictures):
            found = f"{named!r} gave {len(flags)} flags for {len(pictures)} images"
            raise UserError("--safety-checker", found, wanted="one for each")
        return flags

    return check


def _load_folder(folder: Path, device: str) -> SafetyChecker:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    try:
        model, report = StableDiffusionSafetyChecker.from_pretrained(
            folder, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(folder, f"cannot be loaded as a safety checker ({reason})") from None
    if missing := sorted(report["missing_keys"]):  # transformers made them up, with a warning alone
        found = f"cannot be loaded as a safety checker (it lacks {', '.join(missing)})"
        raise UserError(folder, found, wanted="a diffusers StableDiffusionSafetyChecker")
    model = model.eval().to(device)
    side = model.config.vision_config.image_size
    processor = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )

    def check(pictures: np.ndarray) -> list[bool]:
        inputs: Any = processor(list(pictures), return_tensors="pt")
        _, flags = model(clip_input=inputs.pixel_values.to(device), images=list(pictures))
        return [bool(flag) for flag in flags]

    return check
