"""What each process of the scaling benchmark runs: the real trainer, timed, and an all-reduce.

`torchrun -m benchmarks.scaling.worker task.json`; the main process writes what was found.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.scaling.model import Sharding
from shards.column import Json
from shards.stop import StopOnSignal
from shards.storage import write_text_whole
from train.config import Precision, TrainConfig
from train.launcher import follow_launcher
from train.main import open_columns, open_latents
from train.metrics import read_metrics
from train.presets import preset

if TYPE_CHECKING:
    from accelerate import Accelerator

_ALL_REDUCES = 5
_FLOAT32_BYTES = 4
# The collectives of torch, and which of their arguments is the whole payload.
_PAYLOADS = {
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::_allgather_base_": ("all_gather", 0),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run of so many processes.

    Args:
        preset: of the training.
        data: latent dataset.
        run_dir: a new folder, in which `found.json` is left.
        num_processes: of the run.
        sharding: see `payload_of`.
        precision: see `TrainConfig.mixed_precision`.
        micro_batch: samples of a process's forward pass.
        global_batch_size: samples of a step.
        warmup: steps before the first block.
        steps: of a timed block.
        blocks: that are timed.
        gradient_bytes: size of the all-reduce that is timed alone.
    """

    preset: str
    data: str
    run_dir: str
    num_processes: int
    sharding: Sharding
    precision: Precision
    micro_batch: int
    global_batch_size: int
    warmup: int
    steps: int
    blocks: int
    gradient_bytes: int

    @property
    def num_timed(self) -> int:
        """Steps up to the end of the last block."""
        return self.warmup + self.blocks * self.steps

    @property
    def found_path(self) -> Path:
        """Where the main process writes."""
        return Path(self.run_dir) / "found.json"

    def train_config(self) -> TrainConfig:
        """A run that only trains; each call of `Trainer.run` logs once."""
        last = self.num_timed + 1  # after the blocks one step more, in which collectives count
        return replace(
            preset(self.preset),
            data=self.data,
            output_dir=self.run_dir,
            max_steps=last,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch,
            num_partitions=self.num_processes,
            mixed_precision=self.precision,
            sharding="off" if self.sharding == "none" else self.sharding,
            log_every=last + 1,
            checkpoint_every=last + 1,
            validation_samples=0,
        )


def main() -> None:
    """Run the task of the file that is named."""
    follow_launcher()
    run(Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))


def run(task: Task) -> None:
    """Time the all-reduce, train, count; the main process writes what was found."""
    import torch
    import torch.distributed

    from train.trainer import Trainer, build_accelerator

    torch.set_flush_denormal(True)  # both as train/main.py sets them
    torch.set_float32_matmul_precision("high")
    config = task.train_config()
    accelerator = build_accelerator(config)
    assert accelerator.num_processes == task.num_processes
    all_reduce_sec = _time_all_reduce(accelerator, task.gradient_bytes)
    signals = StopOnSignal()  # a signal ends the benchmark
    source = open_latents(config, open_columns(config), accelerator, signals)
    trainer = Trainer(config, source.batches, accelerator, signals=signals)
    try:
        for until in range(task.warmup, task.num_timed + 1, task.steps):
            trainer.run(until)
        payload_bytes = _count_payload(lambda: trainer.run(task.num_timed + 1))
    finally:
        trainer.close()
    if accelerator.is_main_process:
        # The first row is the warm-up's, the last that of the step in which collectives counted.
        _, *blocks, _ = read_metrics(Path(task.run_dir) / "metrics.jsonl")
        assert len(blocks) == task.blocks
        found: Json = {
            "device": accelerator.device.type,
            "attention": trainer.model.attention,
            "precision": trainer.model.precision.name,
            "images_per_sec": [block["perf/images_per_sec"] for block in blocks],
            "data_wait_frac": [block["perf/data_wait_frac"] for block in blocks],
            "backend": torch.distributed.get_backend() if task.num_processes > 1 else None,
            "all_reduce_sec": all_reduce_sec,
            "payload_bytes": payload_bytes,
        }
        write_text_whole(task.found_path, json.dumps(found))
    accelerator.end_training()


def _time_all_reduce(accelerator: Accelerator, num_bytes: int) -> list[float]:
    """Seconds of each of some all-reduces; before there is a model, so that there is room."""
    import torch
    import torch.distributed

    if accelerator.num_processes == 1:
        return []
    tensor = torch.zeros(num_bytes // _FLOAT32_BYTES, device=accelerator.device)
    samples = []
    for number in range(_ALL_REDUCES + 1):
        accelerator.wait_for_everyone()
        began = time.perf_counter()
        torch.distributed.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        if number:  # the first one opens the connections
            samples.append(time.perf_counter() - began)
    return samples


def _count_payload(run: Callable[[], object]) -> dict[str, int]:
    """Bytes of all collectives that `run` calls, by kind, counted from torch's operators."""
    from torch.utils._python_dispatch import TorchDispatchMode

    counted = {kind: 0 for kind, _ in _PAYLOADS.values()}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if named := _PAYLOADS.get(func.name().partition(".")[0]):
                kind, argument = named
                payload = args[argument]
                tensors = payload if isinstance(payload, (list, tuple)) else [payload]
                counted[kind] += sum(tensor.nbytes for tensor in tensors)
            return func(*args, **(kwargs or {}))

    with Watch():
        run()
    return counted


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record

    record(main)()
