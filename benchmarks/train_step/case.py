"""One case of the training step, and how it is timed: the real reader, the loop as it is used."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from benchmarks.result import gpu_state
from shards.column import Json
from shards.stop import StopOnSignal
from train.config import AttentionChoice, Precision, TrainConfig
from train.main import open_columns, open_latents
from train.metrics import read_metrics
from train.presets import preset

if TYPE_CHECKING:
    from train.trainer import Trainer

CompileMode = Literal["off", "regional", "full"]
Switch = Literal["on", "off"]
Loop = Literal["latentmill", "diffusers", "diffusers+channels-last", "diffusers+xformers"]

_EMA_DECAY = 0.9999  # for presets that keep no average
GPU_FIELDS = ("clocks.sm", "power.draw", "temperature.gpu")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is varied; everything else is the preset's."""

    preset: str
    loop: Loop
    micro_batch: int
    attention: AttentionChoice
    precision: Precision
    compile: CompileMode
    ema: Switch

    def __str__(self) -> str:
        return (
            f"{self.preset}, {self.loop}, batch {self.micro_batch}, attention {self.attention}, "
            f"precision {self.precision}, compile {self.compile}, EMA {self.ema}"
        )

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
        setup_sec: building, choosing kernels, compiling, warming up.
        blocks: rows of metrics as the trainer writes them, one for each timed block. Peak memory
            counts from the start of the visit; on a CPU it is that of the whole process so far.
        flops_per_image: of the U-Net's forward and backward pass.
        matmul_flops_per_sec: of the device, as the trainer measured it for MFU.
        gpu: clock, power and temperature right after the last block, where nvidia-smi tells.
    """

    device: str
    attention: str
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
    if case.loop == "latentmill":
        return _visit_trainer(case, data, run_dir, timing)

    from benchmarks.train_step.baseline import visit_baseline

    return visit_baseline(case, data, run_dir, timing)


def _visit_trainer(case: Case, data: Path, run_dir: Path, timing: Timing) -> Visit:
    from train.compilation import compile_errors

    began = time.perf_counter()
    with contextlib.ExitStack() as held:
        held.enter_context(contextlib.redirect_stdout(io.StringIO()))
        trainer = build_trainer(case.train_config(data, run_dir, timing.num_steps))
        held.callback(trainer.close)
        held.enter_context(compile_errors())
        trainer.run(timing.warmup)
        setup_sec = time.perf_counter() - began
        for until in range(timing.warmup, timing.num_steps, timing.steps):
            trainer.run(until + timing.steps)
        gpu = gpu_state(*GPU_FIELDS)
    assert (trainer.model.average is not None) == (case.ema == "on")
    _, *blocks = read_metrics(run_dir / "metrics.jsonl")  # the first row is the warm-up's
    assert len(blocks) == timing.blocks
    facts = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    return Visit(
        device=trainer.device.type,
        attention=trainer.model.attention,
        setup_sec=setup_sec,
        blocks=blocks,
        flops_per_image=facts["flops_per_image"],
        matmul_flops_per_sec=facts["matmul_flops_per_sec"],
        gpu=gpu,
    )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed; only on a GPU has that an error of its own, and not always."""
    import torch

    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in said for words in ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    )


def release_memory() -> None:
    """Give back what a trainer left that is no longer referred to; the peak counts from here.

    Compiled graphs go too: the compiler's limit of graphs per function counts those of all models.
    """
    import torch

    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
