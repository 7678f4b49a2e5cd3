"""One case of the training step, and how it is timed: the real reader, the loop as it is used."""

from __future__ import annotations

import gc
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.result import gpu_state
from shards.column import Json
from shards.stop import StopOnSignal
from train.config import AttentionChoice, CompileMode, Precision, Switch, TrainConfig
from train.main import open_columns, open_latents
from train.presets import preset

if TYPE_CHECKING:
    from benchmarks.train_step.arm import Arm
    from train.trainer import Trainer

Toggle = Literal["on", "off"]
Loop = Literal["latentmill", "diffusers", "diffusers+channels-last", "diffusers+xformers"]

SWITCHES = (
    *("channels_last", "fused_update", "fused_norms", "fused_geglu"),
    *("batched_projections", "conv_search", "cuda_graph"),
)
ALL_OFF: dict[str, Any] = dict.fromkeys(SWITCHES, "off")
GPU_FIELDS = ("clocks.sm", "power.draw", "temperature.gpu")
_EMA_DECAY = 0.9999  # for presets that keep no average


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is varied; everything else is the preset's.

    The trainer's switches are left to the trainer unless they are what is varied: what they came to
    is found with each visit.
    """

    preset: str
    loop: Loop
    micro_batch: int
    attention: AttentionChoice
    precision: Precision
    compile: CompileMode
    ema: Toggle
    channels_last: Switch = "auto"
    fused_update: Switch = "auto"
    fused_norms: Switch = "auto"
    fused_geglu: Switch = "auto"
    batched_projections: Switch = "auto"
    conv_search: Switch = "auto"
    cuda_graph: Switch = "auto"

    def __str__(self) -> str:
        chosen = [f", {name} {value}" for name, value in self.switches().items() if value != "auto"]
        return (
            f"{self.preset}, {self.loop}, batch {self.micro_batch}, attention {self.attention}, "
            f"precision {self.precision}, compile {self.compile}, EMA {self.ema}{''.join(chosen)}"
        )

    def switches(self) -> dict[str, Any]:
        """The trainer's, beside attention, precision and compiling."""
        return {name: getattr(self, name) for name in SWITCHES}

    def train_config(self, data: Path, run_dir: Path, num_steps: int) -> TrainConfig:
        """A run that only trains, one forward pass per step: each call of `Trainer.run` logs once.

        Args:
            data: latent dataset.
            run_dir: of the run.
            num_steps: updates in all.

        Raises:
            UserError: no such preset.
            ValueError: the batch is not a batch.
        """
        config = preset(self.preset)
        return replace(
            config,
            data=str(data),
            output_dir=str(run_dir),
            max_steps=num_steps,
            global_batch_size=self.micro_batch,
            micro_batch_size=self.micro_batch,
            attention=self.attention,
            mixed_precision=self.precision,
            compile=self.compile,
            **self.switches(),
            ema_decay=(config.ema_decay or _EMA_DECAY) if self.ema == "on" else 0.0,
            ema_start_step=0,
            log_every=num_steps + 1,
            checkpoint_every=num_steps + 1,
            validation_samples=0,
        )


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Steps of one visit to a case."""

    warmup: int
    steps: int
    blocks: int

    @property
    def num_steps(self) -> int:
        """All of them."""
        return self.warmup + self.blocks * self.steps


@dataclass(frozen=True, kw_only=True)
class Visit:
    """What was found in one run of a case.

    Args:
        device: cuda or cpu.
        attention: the kernels that ran.
        plan: what the trainer's switches came to; empty for the plain loop.
        setup_sec: building, choosing kernels, compiling, warming up.
        blocks: rows of metrics as the trainer writes them, one for each timed block. Peak memory
            counts from the start of the visit; on a CPU it is that of the whole process so far.
        flops_per_image: of the U-Net's forward and backward pass.
        matmul_flops_per_sec: of the device, as the trainer measured it for MFU.
        gpu: clock, power and temperature right after the last block, where nvidia-smi tells.
    """

    device: str
    attention: str
    plan: Json
    setup_sec: float
    blocks: list[dict[str, float]]
    flops_per_image: int
    matmul_flops_per_sec: float
    gpu: Json


def build_trainer(config: TrainConfig) -> Trainer:
    """A trainer on its dataset, as `train/main.py` puts it together, without observers.

    Raises:
        UserError: the attention backend does not run here.
    """
    from train.trainer import Trainer, build_accelerator

    accelerator, signals = build_accelerator(config), StopOnSignal()  # Ctrl-C ends the benchmark
    source = open_latents(config, open_columns(config), accelerator, signals)
    return Trainer(config, source.batches, accelerator, signals=signals)


def open_arm(case: Case, data: Path, run_dir: Path, num_steps: int) -> Arm:
    """A case, built and ready to run; to be closed.

    Args:
        case: what to run.
        data: latent dataset.
        run_dir: a new folder for metrics.jsonl.
        num_steps: that it will run at most.

    Raises:
        UserError: it does not run here.
        RuntimeError: among others, see `is_out_of_memory`: it does not fit.
    """
    if case.loop == "latentmill":
        from benchmarks.train_step.arm import TrainerArm

        return TrainerArm(case, data, run_dir, num_steps)

    from benchmarks.train_step.baseline import PlainArm

    return PlainArm(case, data, run_dir, num_steps)


def visit(case: Case, data: Path, run_dir: Path, timing: Timing) -> Visit:
    """Build, warm up and time one case; at the end of a timed block the host waits for the device.

    Args:
        case: what to run.
        data: latent dataset.
        run_dir: a new folder for metrics.jsonl.
        timing: steps.

    Raises:
        UserError: it does not run here, or its loss is not finite.
        RuntimeError: among others, see `is_out_of_memory`: it does not fit.
    """
    began = time.perf_counter()
    with closing(open_arm(case, data, run_dir, timing.num_steps)) as arm:
        arm.run(timing.warmup)
        setup_sec = time.perf_counter() - began
        blocks = [arm.run(timing.steps) for _ in range(timing.blocks)]
        gpu = gpu_state(*GPU_FIELDS)
    return Visit(
        device=arm.device.type,
        attention=arm.attention,
        plan=arm.plan,
        setup_sec=setup_sec,
        blocks=blocks,
        flops_per_image=arm.flops_per_image,
        matmul_flops_per_sec=arm.matmul_flops_per_sec,
        gpu=gpu,
    )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed; only on a GPU has that an error of its own, and not always."""
    import torch

    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in said for words in ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    )


def release_memory(*, forget_graphs: bool = True) -> None:
    """Give back what a trainer left that is no longer referred to; the peak counts from here.

    Args:
        forget_graphs: compiled graphs go too: the compiler's limit of graphs per function counts
            those of all models. Models that are still to run would be compiled once more.
    """
    import torch

    if forget_graphs:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
