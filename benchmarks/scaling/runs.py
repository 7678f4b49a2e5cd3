"""The runs of the scaling benchmark: which there are, each in processes of its own, in turns."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.result import spread
from benchmarks.scaling.launch import launch
from benchmarks.scaling.model import Sharding
from benchmarks.scaling.worker import Task
from benchmarks.train_step.data import columns_for, write_latents
from shards.column import Json
from train.presets import preset

if TYPE_CHECKING:
    from benchmarks.scaling.scaling import ScalingConfig

_SHARDS = 4


@dataclass
class Row:
    """One world size: what was found in every round, or why nothing was."""

    num_processes: int
    sharding: Sharding
    micro_batch: int
    global_batch_size: int
    reason: str = ""
    visits: list[Json] = field(default_factory=list)

    def __str__(self) -> str:
        return f"--processes {self.num_processes}, sharding {self.sharding}"

    def to_json(self, base: Row) -> Json:
        """The row with its figures.

        Args:
            base: one process; a round's efficiency is against the median of its blocks in it.
        """
        facts = asdict(self)
        reason, visits = facts.pop("reason"), facts.pop("visits")
        document: Json = {**facts, "not_measured": reason or None}
        if not visits:
            return document
        rates = [rate for visit in visits for rate in visit["images_per_sec"]]
        waits = [wait for visit in visits for wait in visit["data_wait_frac"]]
        efficiencies = [
            rate / self.num_processes / spread(alone["images_per_sec"])["median"]
            for visit, alone in zip(visits, base.visits, strict=True)
            for rate in visit["images_per_sec"]
        ]
        return document | {
            "images_per_sec": spread(rates),
            "efficiency": spread(efficiencies),
            "data_wait_frac": spread(waits),
            "samples": rates,
            "efficiency_samples": efficiencies,
            "visits": visits,
        }


def plan_rows(config: ScalingConfig, num_devices: int, kind: str) -> list[Row]:
    """One process, then every other world size and sharding; with a reason where it cannot run.

    Args:
        config: the benchmark.
        num_devices: of this machine: GPUs, or CPUs.
        kind: what they are, for the reason.
    """
    if not config.processes:
        return []
    sizes = sorted({1, *config.processes})
    cases: list[tuple[int, Sharding]] = [(1, "none")]
    cases += [
        (size, sharding) for sharding in dict.fromkeys(config.shardings) for size in sizes[1:]
    ]
    rows = []
    for size, sharding in cases:
        batch = config.micro_batch_size * (sizes[-1] if config.strong else size)
        row = Row(size, sharding, config.micro_batch_size, batch)
        if size > num_devices:
            row.reason = f"{size} processes want {size} {kind}; {num_devices} here"
        elif batch % (size * config.micro_batch_size):
            row.reason = f"{batch} samples do not divide into {size} x {config.micro_batch_size}"
        rows.append(row)
    return rows


def run_in_turns(
    config: ScalingConfig, rows: list[Row], num_threads: int, gradient_bytes: int, *, on_gpu: bool
) -> None:
    """Every row in every round, each in processes of its own."""
    if not rows:
        return
    Path(config.scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.scratch, prefix="scaling-") as folder:
        scratch = Path(folder).resolve()
        columns = columns_for(preset(config.preset))
        data = write_latents(scratch / "latents", *columns, config.num_samples, _SHARDS)
        for number in range(config.rounds):
            for index, row in enumerate(rows):
                if row.reason:
                    continue
                task = Task(
                    preset=config.preset,
                    data=str(data),
                    run_dir=str(scratch / f"run-{number}-{index}"),
                    num_processes=row.num_processes,
                    sharding=row.sharding,
                    precision=config.precision,
                    micro_batch=row.micro_batch,
                    global_batch_size=row.global_batch_size,
                    warmup=config.warmup,
                    steps=config.steps,
                    blocks=config.blocks,
                    gradient_bytes=gradient_bytes,
                )
                row.visits.append(_run(task, num_threads, on_gpu=on_gpu))
                rate = spread(row.visits[-1]["images_per_sec"])["median"]
                print(f"round {number + 1}: {row}: {rate:.1f} img/s", flush=True)


def _run(task: Task, num_threads: int, *, on_gpu: bool) -> Json:
    """What the processes of one task found."""
    path = Path(f"{task.run_dir}.json")
    path.write_text(json.dumps(asdict(task)), encoding="utf-8")
    log = path.with_suffix(".log")
    script = ["-m", "benchmarks.scaling.worker", str(path)]
    launch(script, task.num_processes, num_threads, on_gpu=on_gpu, log=log)
    found: Json = json.loads(task.found_path.read_text(encoding="utf-8"))
    return found
