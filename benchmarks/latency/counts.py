"""What holds without a GPU: operators, bytes, waits and FLOPs, plain and on the fast path."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from benchmarks.latency.config import LatencyConfig
from benchmarks.latency.models import ModelParts, open_pipeline
from shards.column import Json

_NUM_TOKENS = 77
_FEW, _MORE = 6, 8  # steps, between whose counts the difference is that of two
_UNET_INPUTS = 3  # are copied to where a recording reads them


def count_all(config: LatencyConfig, parts: ModelParts, latent: tuple[int, int]) -> Json:
    """Counts of one image.

    Args:
        config: scheduler, guidance, steps.
        parts: of the model.
        latent: h and w.

    Returns:
        `flops` of an image by part; `step`: a row for the plain pipeline in half precision and one
        for ours, with operators and bytes of the U-Net, the operators around it, launches and
        waits of one denoising step. Ours is counted with every switch on that a GPU may have.
    """
    rows = 2 if config.guidance > 1 else 1
    plain, fast = (
        _count_unet(parts.unet, latent, rows, is_fast=is_fast) for is_fast in (False, True)
    )
    around = {is_fast: _count_around(config, is_fast=is_fast) for is_fast in (False, True)}
    return {
        "flops": _count_flops(parts, latent, rows),
        "step": [
            _step("plain, half precision", plain, around[False], recorded=False),
            _step("fast path, not compiled", fast, around[True], recorded=True),
        ],
    }


def _step(name: str, unet: Json, around: Json, *, recorded: bool) -> Json:
    launched = 1 + _UNET_INPUTS if recorded else unet["num_operators"]
    return {
        "name": name,
        "unet_operators": unet["num_operators"],
        "unet_gb": unet["num_bytes"] / 1e9,
        "operators_around": around["num_operators"],
        "launches_by_the_host": launched + around["num_operators"],
        "waits_per_step": around["waits_per_step"],
        "waits_per_image": around["waits_per_image"],
    }


# The U-Net, on no device --------------------------------------------------------------------------


def _count_unet(unet_config: Json, latent: tuple[int, int], rows: int, *, is_fast: bool) -> Json:
    """A forward pass as PyTorch runs it on a GPU, in bfloat16."""
    import torch

    from benchmarks.train_step.traffic_cuda import CudaFunctions, CudaLayouts
    from benchmarks.train_step.traffic_operators import OperatorTraffic
    from benchmarks.train_step.traffic_unet import Setting, build_unet
    from train.step_plan import StepPlan

    plan = StepPlan(
        compile="off",
        channels_last=is_fast,
        fused_update=False,
        fused_norms=is_fast,
        fused_geglu=is_fast,
        batched_projections=is_fast,
        conv_search=False,
        cuda_graph=False,
    )
    setting = Setting(plan=plan, low_weights=True)
    unet = build_unet(unet_config, latent[0], setting)
    sample = torch.empty(
        (rows, unet_config["in_channels"], *latent), dtype=setting.dtype, device="meta"
    )
    states = sample.new_empty(rows, _NUM_TOKENS, unet_config["cross_attention_dim"])
    with torch.no_grad(), ExitStack() as held:
        counter = held.enter_context(OperatorTraffic())
        held.enter_context(CudaLayouts())
        held.enter_context(CudaFunctions())
        unet(sample, torch.zeros(1, device="meta"), states, return_dict=False)
    return {
        "num_operators": counter.num_calls.total(),
        "num_bytes": counter.num_bytes.total(),
    }


# What is around it --------------------------------------------------------------------------------


def _count_around(config: LatencyConfig, *, is_fast: bool) -> Json:
    """Of the denoising loop of the tiny model: what is around a U-Net does not depend on it."""
    few, more = (_watch(config, steps, is_fast=is_fast) for steps in (_FEW, _MORE))
    num_steps = _MORE - _FEW
    waits = (more.num_waits - few.num_waits) / num_steps
    return {
        "num_operators": round((more.num_operators - few.num_operators) / num_steps),
        "waits_per_step": waits,
        "waits_per_image": round(few.num_waits - _FEW * waits) + round(waits * config.steps),
    }


def _watch(config: LatencyConfig, num_steps: int, *, is_fast: bool) -> Any:
    import torch

    from benchmarks.latency.device_watch import DeviceWatch
    from evaluate.schedulers import build_scheduler
    from serve.fast.apply import rebuild
    from serve.fast.plan import FastPlan, Shape

    pipeline = open_pipeline("tiny")
    pipeline.scheduler = build_scheduler(config.scheduler, pipeline.scheduler.config)
    unet, size = pipeline.unet, pipeline.unet.config.sample_size
    dim, watch = unet.config.cross_attention_dim, DeviceWatch()
    latents = torch.zeros(1, unet.config.in_channels, size, size)
    states, negative = torch.zeros(1, _NUM_TOKENS, dim), torch.zeros(1, _NUM_TOKENS, dim)
    watch.follow(latents, states, negative)
    if is_fast:  # it keeps its timesteps on the host, and asserts it
        plan = FastPlan(dtype=torch.bfloat16, shapes=(Shape(batch=1, height=64, width=64),))
        rebuild(pipeline, plan, torch.device("cpu"), None)
    else:
        _follow_timesteps(pipeline.scheduler, watch)
    _leave_out(unet, watch)
    with watch:
        pipeline(
            prompt_embeds=states,
            negative_prompt_embeds=negative,
            latents=latents,
            num_inference_steps=num_steps,
            guidance_scale=config.guidance,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
    return watch


def _follow_timesteps(scheduler: Any, watch: Any) -> None:
    own = scheduler.set_timesteps

    def set_timesteps(*args: Any, **settings: Any) -> None:
        own(*args, **settings)
        watch.follow(scheduler.timesteps)

    scheduler.set_timesteps = set_timesteps


def _leave_out(unet: Any, watch: Any) -> None:
    own = unet.forward

    def forward(*args: Any, **settings: Any) -> Any:
        with watch.unwatched():
            return own(*args, **settings)

    unet.forward = forward


# FLOPs --------------------------------------------------------------------------------------------


def _count_flops(parts: ModelParts, latent: tuple[int, int], rows: int) -> Json:
    """FLOPs (2 per multiply-add) of text encoder, one U-Net step and VAE, for one image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        unet, vae, text = parts.build()
        sample = torch.empty(rows, parts.unet["in_channels"], *latent)
        states = torch.empty(rows, _NUM_TOKENS, parts.unet["cross_attention_dim"])
        ids = torch.zeros(rows, _NUM_TOKENS, dtype=torch.long)
        found = {}
        for name, run in (
            ("text", lambda: text(ids)),
            ("unet_step", lambda: unet(sample, torch.zeros(1), states)),
            ("vae", lambda: vae.decode(sample[:1])),
        ):
            with FlopCounterMode(display=False) as counter:
                run()
            found[name] = counter.get_total_flops()
    return found
