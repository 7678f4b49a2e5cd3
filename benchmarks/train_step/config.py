"""What the benchmark of the training step is told. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from benchmarks.train_step.case import Toggle
from benchmarks.train_step.plan import Family
from benchmarks.train_step.rungs import MIN_CHECK_STEPS, RUNG_NAMES
from shards.errors import UserError
from shards.order import DEFAULT_MAX_PARTITIONS
from train.config import AttentionChoice, CompileMode, Precision
from train.presets import preset

AXES = ("attentions", "precisions", "compiles", "emas")
_MICRO_BATCHES = (16, 32)
# Of the ladder on a GPU, by resolution: the first is what published runs take, the others what
# 140 GiB may hold.
_LADDER_MICRO_BATCHES: dict[int, tuple[int, ...]] = {256: (256, 512), 512: (64, 96, 128)}


@dataclass(frozen=True, kw_only=True)
class TrainStepConfig:
    """Measure the training step of the U-Net beside the plain diffusers loop's."""

    presets: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--preset"])] = ("tiny",)
    """Training presets: U-Net, resolution, objective, optimizer."""
    loops: tuple[Family, ...] = ("latentmill", "diffusers")
    """Our trainer; the plain text-to-image loop of diffusers, also channels-last and with xFormers,
    in float32 or under autocast, in every micro-batch."""
    micro_batches: tuple[int, ...] = ()
    """Samples of a forward pass, and here of the whole step. Default: 16 and 32; of the ladder on a
    GPU 64, 96 and 128 at 512 px, 256 and 512 at 256 px."""
    attentions: tuple[AttentionChoice, ...] = ("auto",)
    """Attention backends; auto is the one that the others are compared with."""
    precisions: tuple[Precision, ...] = ("auto",)
    """Precisions; the others are compared with bf16-weights, or with the first one."""
    compiles: tuple[CompileMode, ...] = ("off",)
    """torch.compile; its time counts as setup."""
    emas: tuple[Toggle, ...] = ("off", "on")
    """With and without a moving average of the weights; every micro-batch is tried with each."""
    product: bool = False
    """Try every combination of all of these, and not one setting at a time around a base."""
    ladder: bool = False
    """Turn on one of the trainer's switches at a time instead, each held to the float32 U-Net of
    diffusers and timed in turns with what was the fastest before; EMA on."""
    stand_on: tuple[str, ...] = ()
    """Rungs of the ladder that are on from the start, as an earlier run found them to pay."""
    check_steps: int = 200
    """Steps of the tiny U-Net whose losses are held to float32's before a rung is timed."""
    profile: bool = False
    """Run the fastest of our rows a few steps more and say where the time goes."""
    trace: str = ""
    """File for the profile's trace, for chrome://tracing or Perfetto."""
    steps: int = 10
    """Steps of a timed block; of the ladder at most, its blocks take about a second."""
    warmup: int = 5
    """Steps before the first timed block of a row; more than the reader runs ahead."""
    blocks: int = 2
    """Timed blocks of a row in each round."""
    rounds: int = 3
    """How often all rows are gone through; a rung of the ladder has all its blocks at once."""
    max_minutes: float = 9.0
    """No row is begun that would probably end later; what is left out is said."""
    num_samples: int = 1024
    """Distinct samples; 223 kB each at 512 px with the states of SD 2."""
    scratch: str = "data"
    """Folder for a temporary folder, which is removed at the end."""
    out: str = ""
    """File of the result; default: its place in benchmarks/results; `-`: none."""

    def with_micro_batches(self, *, on_gpu: bool) -> TrainStepConfig:
        """The same, its micro-batches named."""
        if self.micro_batches:
            return self
        chosen: tuple[int, ...] = _MICRO_BATCHES
        if self.ladder and on_gpu:
            chosen = _LADDER_MICRO_BATCHES.get(preset(self.presets[0]).resolution, chosen)
        return replace(self, micro_batches=chosen)


def check_config(config: TrainStepConfig) -> None:
    """Refuse settings that make no row, before anything takes time."""
    for name in ("presets", "loops", *AXES):
        if not getattr(config, name):
            raise UserError(f"--{name.replace('_', '-')}", "names nothing")
    for name in ("steps", "warmup", "blocks", "rounds", "max_minutes"):
        if getattr(config, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')}", f"{getattr(config, name)}")
    if min(config.micro_batches, default=1) < 1:
        raise UserError("--micro-batches", f"{min(config.micro_batches)}", wanted="at least 1")
    if config.num_samples < DEFAULT_MAX_PARTITIONS:
        raise UserError(
            "--num-samples", f"{config.num_samples}", wanted=f"at least {DEFAULT_MAX_PARTITIONS}"
        )
    for name in config.presets:
        preset(name)
    if config.ladder:
        _check_ladder(config)


def _check_ladder(config: TrainStepConfig) -> None:
    if len(config.presets) > 1:
        raise UserError("--ladder", f"{len(config.presets)} presets", wanted="one")
    if "latentmill" not in config.loops:
        raise UserError("--loops", "leaves our trainer out", wanted="latentmill with --ladder")
    if config.check_steps < MIN_CHECK_STEPS:
        raise UserError(
            "--check-steps", f"{config.check_steps}", wanted=f"at least {MIN_CHECK_STEPS}"
        )
    if unknown := set(config.stand_on) - set(RUNG_NAMES):
        raise UserError(
            "--stand-on",
            f"{', '.join(sorted(unknown))} is unknown",
            wanted=f"some of {', '.join(RUNG_NAMES)}",
        )
