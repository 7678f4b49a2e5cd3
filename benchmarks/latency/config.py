"""What the benchmark of latency is told. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from evaluate.schedulers import DEFAULT_SCHEDULER, SCHEDULERS
from serve.fast_path import FastPath
from shards.errors import UserError

Baseline = Literal["float32", "tf32", "float16", "bfloat16"]
RANDOM_MODELS = ("random-sd2", "random-sd15")
_ON_GPU: tuple[Baseline, ...] = ("float32", "tf32", "float16", "bfloat16")
_ON_CPU: tuple[Baseline, ...] = ("float32",)
# What a CPU can do, so that there is something to compare.
_FAST_ON_CPU = FastPath(channels_last="on", batched_projections="on")


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """Measure how long images take, the plain diffusers pipeline beside ours."""

    model: str = "tiny"
    """random-sd2 or random-sd15: in full size, with random weights, for speed and not for pictures;
    tiny: a small one of random weights; else a run, a pipeline folder or a hub id."""
    height: int = 0
    """Pixels; 0: the model's own. random-sd2 and random-sd15 have 512."""
    width: int = 0
    """Pixels; 0: the model's own."""
    steps: int = 50
    """Denoising steps."""
    guidance: float = 7.5
    """Guidance scale; 1 is off, and halves the work."""
    scheduler: str = DEFAULT_SCHEDULER
    """Sampler, for all arms."""
    batch_sizes: tuple[int, ...] = (1, 4)
    """Images of a call."""
    trials: int = 10
    """Timed calls of each arm and batch size, the arms in turns."""
    warmup: int = 2
    """Calls before that are not timed; compiling and recording come before them."""
    baselines: tuple[Baseline, ...] = ()
    """Plain pipelines: float32 as it is loaded, the same with TF32 products, and in half precision.
    Default: all of them on a GPU, float32 without one."""
    ladder: bool = False
    """Turn on one switch of the fast path after another, an arm each, instead of all at once."""
    fast: FastPath = field(default_factory=FastPath)
    """The fast path. Its compiled shapes are those measured. Without a GPU, where auto is off:
    channels-last and batched projections."""
    image_diff: bool = True
    """Write how far each arm's images are from the first arm's."""
    images: str = "data/latency"
    """Folder for the images and their differences."""
    max_minutes: float = 9.0
    """No round of trials is begun after that; three are made in any case."""
    out: str = ""
    """File of the result; default: its place in benchmarks/results; `-`: none."""

    def resolved(self, *, on_gpu: bool) -> LatencyConfig:
        """The same with what the machine decides."""
        chosen = self
        if not self.baselines:
            chosen = replace(chosen, baselines=_ON_GPU if on_gpu else _ON_CPU)
        if not on_gpu and self.fast == FastPath():
            chosen = replace(chosen, fast=_FAST_ON_CPU)
        return chosen


def check_config(config: LatencyConfig) -> None:
    """Refuse what cannot be measured, before anything takes time."""
    for name in ("steps", "trials", "max_minutes"):
        if getattr(config, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')}", f"{getattr(config, name)}")
    for name in ("height", "width"):
        if getattr(config, name) < 0 or getattr(config, name) % 8:
            raise UserError(f"--{name}", f"{getattr(config, name)}", wanted="a multiple of 8")
    if config.warmup < 0:
        raise UserError("--warmup", f"{config.warmup}", wanted="0 or more")
    if min(config.batch_sizes, default=0) < 1:
        raise UserError("--batch-sizes", f"{config.batch_sizes}", wanted="at least 1 each")
    if config.guidance < 1:
        raise UserError("--guidance", f"{config.guidance}", wanted="at least 1")
    if config.scheduler not in SCHEDULERS:
        found, wanted = f"{config.scheduler!r}", f"one of {', '.join(SCHEDULERS)}"
        raise UserError("--scheduler", found, wanted=wanted)
