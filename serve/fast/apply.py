"""A pipeline made fast in place, and run once for the shapes that are known beforehand."""

from __future__ import annotations

from typing import Any

import torch

from serve.fast.attention import choose_attention
from serve.fast.graphs import WARM_UP_RUNS, GraphCache, InferenceRecorder
from serve.fast.parts import FastDecode, FastText, FastUnet, Machinery
from serve.fast.plan import FastPlan, Shape, plan_fast
from serve.fast_path import FastPath
from shards.errors import UserError
from train.step_graph import Recorder

_GUIDANCE = 2.0  # any that is on


def make_fast(pipeline: Any, fast: FastPath, device: torch.device) -> list[str]:
    """See `serve.fast_path.apply_fast_path`."""
    if reason := _stranger(pipeline):
        return [f"fast path off: {reason}"]
    plan = plan_fast(fast, pipeline, device)
    if plan.is_plain:
        return ["fast path off: no switch is on", *plan.notes]
    lines = plan.lines()
    recorder = None
    if plan.cuda_graphs:
        with torch.cuda.device(device):
            recorder = InferenceRecorder()
    machinery, attention = rebuild(pipeline, plan, device, recorder)
    return [*lines, *attention, *warm_up(pipeline, plan.shapes, machinery)]


def rebuild(
    pipeline: Any, plan: FastPlan, device: torch.device, recorder: Recorder | None
) -> tuple[Machinery, list[str]]:
    """Give a pipeline the parts of a plan, in place.

    Args:
        pipeline: diffusers `StableDiffusionPipeline`.
        plan: what is on.
        device: of the pipeline.
        recorder: of what is replayed; None: nothing is.

    Returns:
        how the parts run, and the line about attention, if there is one.
    """
    from serve.fast.pipeline import FastPipeline

    unet, vae, text = pipeline.unet, pipeline.vae, pipeline.text_encoder
    for module in (unet, text):
        module.to(plan.dtype)
    vae.to(_vae_dtype(vae, plan.dtype))
    _rebuild_blocks(unet, vae, plan)
    size, factor = plan.shapes[0], pipeline.vae_scale_factor
    latent_shape = (unet.config.in_channels, size.height // factor, size.width // factor)
    num_tokens = text.config.max_position_embeddings
    attention = choose_attention(unet, plan, device, latent_shape, num_tokens)
    machinery = Machinery(
        device,
        None if recorder is None else GraphCache(recorder, plan.max_graphs),
        conv_search=plan.conv_search,
        compiles=plan.compile,
    )
    pipeline.unet = FastUnet(unet, machinery)
    vae.decode = FastDecode(vae, machinery)
    text.forward = FastText(text, machinery)
    pipeline.__class__ = FastPipeline
    return machinery, attention


def warm_up(pipeline: Any, shapes: tuple[Shape, ...], machinery: Machinery) -> list[str]:
    """Run shapes as often as it takes for all parts to be compiled and recorded.

    Returns:
        a line for each shape, and one for each part that did not go as planned.

    Raises:
        UserError: a shape does not fit in the device's memory.
    """
    lines = []
    for shape in shapes:
        try:
            _run(pipeline, shape, machinery, WARM_UP_RUNS + 1)
        except UserError as error:
            if not machinery.compiles:
                raise  # it is not the compiler's
            lines.append(f"compile off: {error}")
            machinery.compiles = False
            _run(pipeline, shape, machinery, WARM_UP_RUNS + 1)
        lines.append(f"ready for {shape}")
    refusals = machinery.graphs.refusals if machinery.graphs else {}
    return lines + [f"{name} not recorded: {reason}" for name, reason in refusals.items()]


def _run(pipeline: Any, shape: Shape, machinery: Machinery, num_runs: int) -> None:
    """Runs that may compile.

    Raises:
        UserError: the compiler failed, or there is no memory.
    """
    machinery.is_warming = True
    try:
        for _ in range(num_runs):
            pipeline(
                [""] * shape.batch,
                height=shape.height,
                width=shape.width,
                num_inference_steps=1,
                guidance_scale=_GUIDANCE,
                output_type="pt",
            )
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        raise UserError("--compiled-shapes", f"{shape}: {reason}", wanted="a smaller one") from None
    finally:
        machinery.is_warming = False


def _stranger(pipeline: Any) -> str | None:
    """Why a pipeline is not one that this knows."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    if type(pipeline) is not StableDiffusionPipeline:
        return f"it knows StableDiffusionPipeline, not {type(pipeline).__name__}"
    unet = pipeline.unet
    if type(unet) is not UNet2DConditionModel:
        return f"it knows UNet2DConditionModel, not {type(unet).__name__}"
    if unet.config.time_cond_proj_dim is not None or unet.config.addition_embed_type is not None:
        return "the U-Net reads more than samples, timesteps and text states"
    return None


def _vae_dtype(vae: Any, dtype: torch.dtype) -> torch.dtype:
    """bfloat16 has the range of float32; float16 has not, and some VAEs are known to leave it."""
    upcast = dtype == torch.float16 and vae.config.force_upcast
    return torch.float32 if upcast else dtype


def _rebuild_blocks(unet: Any, vae: Any, plan: FastPlan) -> None:
    from train.blocks import keep_channels_last, use_fused_geglu, use_fused_norms
    from train.projections import batch_projections

    if plan.channels_last:
        for module in (unet, vae):
            module.to(memory_format=torch.channels_last)
        keep_channels_last(unet)
    if plan.fused_norms:
        use_fused_norms(unet)
    if plan.fused_geglu:
        use_fused_geglu(unet)
    if plan.batched_projections:
        batch_projections(unet)
