"""Small runs for the tests of train/ and evaluate/: a million parameters, 8x8 latents."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from safetensors.torch import load_file
from torch import Tensor

from shards.batch import LatentBatch
from shards.dataset import Dataset
from shards.order import choose_partitions
from shards.reader import LatentReader
from train.checkpoint import checkpoints_of
from train.config import TrainConfig
from train.metrics import read_metrics
from train.trainer import Trainer, train

DIM, NUM_TOKENS, LATENT_SHAPE = 32, 5, (4, 8, 8)


class Killed(BaseException):
    """Ends a run where it stands, as kill -9 would: nothing of ours catches it or cleans up."""


def interrupted_at(
    step: int, by: signal.Signals | type[Killed] = signal.SIGTERM
) -> Callable[[int], None]:
    """For `MemoryBatches`: a signal to ourselves, or the end at once, in the midst of one step."""

    def before_batch(now: int) -> None:
        if now != step:
            return
        if isinstance(by, signal.Signals):
            os.kill(os.getpid(), by)
        else:
            raise by

    return before_batch


def write_unet(path: Path, **changes: Any) -> str:
    """A U-Net configuration that trains in milliseconds; returns its path as --unet takes it."""
    config = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [32, 64],
        "cross_attention_dim": DIM,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "in_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "out_channels": 4,
        "sample_size": 8,
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config | changes), encoding="utf-8")
    return str(path)


class MemoryBatches:
    """A `BatchSource` of a few random samples in memory, in their own order.

    Args:
        num_samples: distinct samples; a step's positions go round them.
        before_batch: is called with each step's number before its batch is handed out.
    """

    def __init__(
        self, num_samples: int = 64, before_batch: Callable[[int], None] | None = None
    ) -> None:
        rng = np.random.default_rng(0)
        self.latent_shape = LATENT_SHAPE
        self.scaling_factor = 0.2
        self.null_states = rng.standard_normal((NUM_TOKENS, DIM)).astype(np.float16)
        self.identity = f"memory-{num_samples}"
        self.states = rng.standard_normal((num_samples, NUM_TOKENS, DIM)).astype(np.float16)
        mean = rng.standard_normal((num_samples, *LATENT_SHAPE)) / self.scaling_factor
        self.moments = np.concatenate([mean, np.full_like(mean, -6.0)], axis=1).astype(np.float16)
        self._before_batch = before_batch or (lambda step: None)

    def epoch_at(self, step: int) -> float:
        return step / 10

    def keys_of(self, samples: np.ndarray) -> list[str]:
        return [f"memory/{number}" for number in samples]

    def iter_batches(self, first_step: int, positions: range) -> Iterator[LatentBatch]:
        step = first_step
        while True:
            self._before_batch(step)
            samples = (np.array(positions) + 5 * step) % len(self.moments)
            yield LatentBatch(
                step=step,
                samples=samples,
                moments=self.moments[samples],
                states=self.states[samples],
            )
            step += 1


def small_config(folder: Path, **changes: Any) -> TrainConfig:
    """A run of a few steps in `folder`/run on a batch of 8."""
    settings: dict[str, Any] = {
        "unet": str(folder / "unet.json"),
        "output_dir": str(folder / "run"),
        "max_steps": 6,
        "global_batch_size": 8,
        "learning_rate": 1e-3,
        "log_every": 1,
        "num_samples": 0,
        "validation_samples": 0,
    }
    if "unet" not in changes and not Path(settings["unet"]).exists():
        write_unet(Path(settings["unet"]))
    return TrainConfig(**(settings | changes))


def run_on_memory(config: TrainConfig, **source: Any) -> Trainer:
    """Train to the end on `MemoryBatches`."""
    return train(config, MemoryBatches(**source))


def reader_of(config: TrainConfig) -> LatentReader:
    """The reader that train/main.py builds."""
    dataset = Dataset(config.data)
    return LatentReader(
        dataset,
        dataset.image_column(config.resolution, config.image_column),
        dataset.text_column(config.text_column),
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        num_partitions=choose_partitions(config.global_batch_size, config.num_partitions),
        window=config.shuffle_window,
    )


def flags(**settings: Any) -> list[str]:
    """`max_steps=3` as `--max-steps 3`."""
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items()]
    return [text for pair in pairs for text in pair]


def newest_checkpoint(run: Path | str) -> Path:
    return Path(checkpoints_of(Path(run))[-1].path)


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """Everything that a checkpoint holds, copied from its files: weights, average, optimizer."""
    return {
        f"{path.relative_to(checkpoint)}:{name}": tensor.clone()
        for path in sorted(checkpoint.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    differ = [name for name, tensor in first.items() if not bitwise_equal(tensor, second[name])]
    assert not differ, f"{len(differ)} of {len(first)} tensors differ, first {differ[0]}"


def bitwise_equal(first: Tensor, second: Tensor) -> bool:
    return bool(
        first.dtype == second.dtype
        and first.shape == second.shape
        and first.numpy().tobytes() == second.numpy().tobytes()
    )


def metrics_of(run: Path | str) -> list[dict[str, float]]:
    """A run's rows without what a clock or the machine decides."""
    rows = read_metrics(Path(run) / "metrics.jsonl")
    return [
        {name: value for name, value in row.items() if not name.startswith("perf/")} for row in rows
    ]


def assert_same_runs(first: Path | str, second: Path | str) -> None:
    """Two runs ended alike to the bit: weights, average, optimizer, state and metrics."""
    one, other = newest_checkpoint(first), newest_checkpoint(second)
    assert one.name == other.name
    assert_same_bits(tensors_of(one), tensors_of(other))
    assert (one / "state.json").read_text() == (other / "state.json").read_text()
    assert metrics_of(first) == metrics_of(second)


def contents_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def start(*args: object, cwd: Path = REPOSITORY, **environment: str) -> subprocess.Popen[str]:
    """Start an interpreter with `args`, output in pipes, as `python <args>` would run here."""
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_torchrun(script: Path, *args: object) -> str:
    """Run a script in two processes; returns what they printed."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    process = start(*launcher, script, *args)
    try:
        out, err = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == 0, err[-4000:]
    return out


def error_line(capsys: pytest.CaptureFixture[str], run: Callable[[], object]) -> str:
    """The one line on stderr of a command that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]
