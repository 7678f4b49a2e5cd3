"""A run, or any Stable Diffusion pipeline, ready to sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from evaluate.assemble import assemble
from evaluate.pipeline_folder import INDEX, load_pipeline_folder
from evaluate.schedulers import DEFAULT_SCHEDULER
from evaluate.training_match import check_matches_training
from evaluate.training_run import TrainingRun
from precompute.hub import HubRepository
from shards.errors import UserError
from shards.storage import Location, is_remote, location, size_of
from train.checkpoint import find_unet, local_unet

DTYPES = ("float32", "float16", "bfloat16")


def load_pipeline(
    source: str | Location,
    model: str = "",
    *,
    weights: str = "auto",
    device: str = "",
    dtype: str = "float32",
    scheduler: str = DEFAULT_SCHEDULER,
    say: Callable[[str], object] = lambda text: None,
) -> Any:
    """Build the pipeline that samples a run, on the schedule of its training, or load one.

    That of a run is held against the dataset it was trained on, where that can be read
    (`evaluate.training_match`).

    Args:
        source: a run, or one of its checkpoints, local or behind a URL (see `find_unet`); or a
            pipeline: a local folder with model_index.json, or a hub id.
        model: of a run: model folder or hub id that gives VAE, text encoder and tokenizer;
            default: the one that its settings name.
        weights: of a run: `auto` (averaged where there are any), `ema` or `raw`.
        device: default: the first GPU, else the CPU.
        dtype: one of `DTYPES`.
        scheduler: one of `SCHEDULERS`.
        say: is told what was compared with the training, or why nothing was.

    Returns:
        a diffusers `StableDiffusionPipeline` without a safety checker, or a
        `StableDiffusionXLPipeline`; in eval mode, without progress bars.

    Raises:
        UserError: a part cannot be loaded, lacks weights, or does not fit the others; or the
            training had another null condition.
    """
    import torch

    from precompute.loading import choose_device

    if dtype not in DTYPES:
        raise UserError("dtype", f"{dtype!r}", wanted=f"one of {', '.join(DTYPES)}")
    chosen = choose_device(device or "auto")
    where = location(source)
    if is_pipeline(where):
        _refuse_for_pipeline(source, model=model, weights=weights)
        pipeline = load_pipeline_folder(str(source), scheduler)
    else:
        pipeline = _load_run(where, model, weights, scheduler, say)
    return pipeline.to(chosen, getattr(torch, dtype))


def is_pipeline(source: Location) -> bool:
    """Whether it is no run: a local folder with model_index.json, or a hub id."""
    if is_remote(source):
        return False
    is_hub_id = not source.exists() and HubRepository.parse(str(source)) is not None
    return is_hub_id or size_of(source / INDEX) is not None


def _refuse_for_pipeline(source: str | Location, *, model: str, weights: str) -> None:
    for flag, value, default in (("--model", model, ""), ("--weights", weights, "auto")):
        if value != default:
            raise UserError(
                flag, f"{value}, but {source} is no run", wanted="nothing: a pipeline has one of it"
            )


def _load_run(
    run: Location, model: str, weights: str, scheduler: str, say: Callable[[str], object]
) -> Any:
    folder = find_unet(run, weights)
    training = TrainingRun(run)
    unet = _load_unet(folder)
    schedule = training.scheduler_config(folder)
    pipeline = assemble(unet, schedule, model or training.model(), scheduler)
    say(check_matches_training(pipeline, training))
    return pipeline


def _load_unet(folder: Location) -> Any:
    """With all its weights: diffusers makes up those that are missing, with a warning alone."""
    from diffusers import UNet2DConditionModel
    from safetensors import SafetensorError

    try:
        with local_unet(folder) as copy:
            unet, report = UNet2DConditionModel.from_pretrained(copy, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(folder, f"cannot be loaded ({reason})") from None
    if missing := sorted(report["missing_keys"]):
        found = f"lacks {len(missing)} weights that its configuration has, first {missing[0]}"
        raise UserError(folder, found, remedy="another checkpoint")
    return unet.eval()
