"""A pipeline as diffusers saves it, from a folder or the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evaluate.assemble import build_pipeline, check_fits, load_encoders, quieten_libraries
from evaluate.schedulers import DEFAULT_SCHEDULER, build_scheduler
from shards.errors import UserError

INDEX = "model_index.json"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def load_pipeline_folder(source: str, scheduler: str = DEFAULT_SCHEDULER) -> Any:
    """Load a text-to-image pipeline with all its weights, float32, on the CPU.

    Args:
        source: folder with model_index.json, or hub id (`owner/name`, `owner/name@revision`).
        scheduler: one of `SCHEDULERS`, on the pipeline's own schedule.

    Raises:
        UserError: there is none, it is of another kind, or a part cannot be loaded whole.
    """
    quieten_libraries()
    from diffusers import UNet2DConditionModel

    from precompute.loading import load_frozen
    from precompute.model_folder import find_model

    folder = find_model(source)
    index = _read_index(folder.path / INDEX)
    if folder.hub:
        folder.hub.fetch(["unet/*.json"])
    schedule = _read_json(folder.path / "scheduler" / "scheduler_config.json")
    parts = {
        "scheduler": build_scheduler(scheduler, schedule),
        "unet": load_frozen(folder, "unet", UNet2DConditionModel),
        **load_encoders(folder),
    }
    parts["unet"].float()
    if (zeros := index.get("force_zeros_for_empty_prompt")) is not None:  # SDXL
        parts["force_zeros_for_empty_prompt"] = zeros
    pipeline = build_pipeline(index["_class_name"], parts)
    check_fits(source, pipeline)
    return pipeline


def _read_index(path: Path) -> dict[str, Any]:
    index = _read_json(path)
    found = index.get("_class_name")
    if found not in PIPELINES:
        raise UserError(path, f"is a {found}", wanted=" or ".join(PIPELINES))
    return index


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            path, f"cannot be read ({error})", wanted="a pipeline as diffusers saves it"
        ) from None
    return document if isinstance(document, dict) else {}
