"""What is compared: plain pipelines in several precisions, and ours with some switches on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from benchmarks.latency.config import Baseline, LatencyConfig
from evaluate.schedulers import build_scheduler
from serve.fast_path import FastPath, apply_fast_path

OURS = "fast path"
# The ladder's rungs, each with what it adds; those before it stay on.
_RUNGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("low precision, latents in float32", ("dtype",)),
    ("+ channels-last", ("channels_last", "conv_search")),
    ("+ fused norms and GEGLU", ("fused_norms", "fused_geglu")),
    ("+ batched projections", ("batched_projections",)),
    ("+ attention by measurement", ("attention",)),
    ("+ CUDA graphs", ("cuda_graphs",)),
    ("+ compile", ("compile",)),
)
_ALL_OFF = FastPath(
    dtype="float32",
    channels_last="off",
    attention="sdpa",
    fused_norms="off",
    fused_geglu="off",
    batched_projections="off",
    conv_search="off",
    compile="off",
    cuda_graphs="off",
)


@dataclass(frozen=True, kw_only=True)
class ArmSpec:
    """One way to compute the images.

    Args:
        name: for people.
        baseline: a plain pipeline of that precision; None for ours.
        fast: switches of ours.
    """

    name: str
    baseline: Baseline | None = None
    fast: FastPath | None = None


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A pipeline on the device.

    Attributes:
        setup_sec: what moving, compiling and recording took.
        lines: what the fast path says is on.
    """

    spec: ArmSpec
    pipeline: Any
    setup_sec: float
    lines: tuple[str, ...]

    @contextmanager
    def settings(self) -> Iterator[None]:
        """The process's float32 precision as this arm has it; TF32 but for plain float32."""
        import torch

        precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        is_exact = self.spec.baseline == "float32"
        torch.set_float32_matmul_precision("highest" if is_exact else "high")
        torch.backends.cudnn.allow_tf32 = not is_exact
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.allow_tf32 = cudnn


def list_arms(config: LatencyConfig, shapes: tuple[str, ...]) -> list[ArmSpec]:
    """Baselines first, then ours.

    Args:
        config: with its baselines named.
        shapes: to compile for.
    """
    plain = [ArmSpec(name=f"plain {name}", baseline=name) for name in config.baselines]
    fast = replace(config.fast, compiled_shapes=shapes)
    if not config.ladder:
        return [*plain, ArmSpec(name=OURS, fast=fast)]
    rungs, reached = [], replace(_ALL_OFF, compiled_shapes=shapes, max_graphs=fast.max_graphs)
    for name, switches in _RUNGS:
        reached = replace(reached, **{switch: getattr(fast, switch) for switch in switches})
        rungs.append(ArmSpec(name=name, fast=reached))
    return [*plain, *rungs]


def open_arm(spec: ArmSpec, base: Any, device: Any, scheduler: str) -> Arm:
    """A copy of a pipeline, set up.

    Args:
        spec: how.
        base: float32 pipeline on the CPU, which stays as it is.
        device: where the copy runs.
        scheduler: name of its sampler.
    """
    import torch

    began = perf_counter()
    pipeline = copy.deepcopy(base)
    pipeline.scheduler = build_scheduler(scheduler, base.scheduler.config)
    dtype = torch.float32
    if spec.baseline in ("float16", "bfloat16"):
        dtype = getattr(torch, spec.baseline)
    pipeline.to(device, dtype)
    arm = Arm(spec=spec, pipeline=pipeline, setup_sec=0.0, lines=())
    if spec.fast is not None:
        with arm.settings():
            lines = apply_fast_path(pipeline, spec.fast, device)
        arm = replace(arm, lines=tuple(lines))
    return replace(arm, setup_sec=perf_counter() - began)
