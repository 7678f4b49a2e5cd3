"""The training step of stage 2 beside the plain diffusers loop: images per second, MFU, memory.

Latent shards of random numbers in full size, through the real reader and each loop as it is used;
each step is one forward pass, backward pass and update. Every micro-batch runs with and without
EMA; then, at the largest that fits, one setting is varied at a time, or with `--product` all of
them. What does not run here, or does not fit, is a row that says so. All rows are gone through in
turns, as often as time allows. Before any time counts, both loops must train alike.

`--ladder` turns on one switch of the trainer after another instead: `--preset sd2-base-512 --ladder
--profile` is the whole of it. Each rung must compute what diffusers' U-Net computes in float32, or
the exit status is 1, and is timed in turns with the rung before; one that does not pay is left out
of those after it.

The tables of micro-batches with and without EMA that others publish, and what xFormers does, come
from `--presets sd2-base-512 --micro-batches 4 8 12 16 20 32 --attentions auto flash cudnn xformers
--precisions bf16 bf16-weights --compiles off full`.

On a CPU, `--presets sd2-base-256 --loops latentmill --micro-batches 1 --emas off --rounds 1
--blocks 1 --steps 2 --warmup 1` takes minutes and 14 GiB.
"""

from __future__ import annotations

import tempfile
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks.result import NOWHERE, output_file, publish, result, spread
from benchmarks.train_step import ladder_table, table
from benchmarks.train_step.case import (
    Case,
    Timing,
    Visit,
    is_out_of_memory,
    open_arm,
    release_memory,
    visit,
)
from benchmarks.train_step.config import TrainStepConfig, check_config
from benchmarks.train_step.data import columns_for, write_latents
from benchmarks.train_step.host_room import check_host_room
from benchmarks.train_step.parity import check_parity
from benchmarks.train_step.plan import count_cases, iter_cases
from benchmarks.train_step.summary import compare_loops, ema_costs
from benchmarks.train_step.table import HEADER, line
from shards.column import Json
from shards.errors import UserError
from train.presets import preset

OUT_OF_MEMORY = "out of memory"
_SHARDS = 4
_LADDER = "train-step-ladder"
_FIGURES = {
    "iters_per_sec": "perf/iters_per_sec",
    "images_per_sec": "perf/images_per_sec",
    "mfu": "perf/mfu",
    "data_wait_frac": "perf/data_wait_frac",
}


def run(config: TrainStepConfig) -> None:
    """Measure, print, write; exit status 1 if a rung of the ladder failed."""
    if config.out not in ("", NOWHERE):
        output_file(config.out)  # a mistake is told before anything takes time
    document = measure(config)
    print_table(document)
    publish(document, config.out)
    if document.get("failed"):
        raise SystemExit(1)


def measure(config: TrainStepConfig) -> dict[str, Any]:
    """Run all rows and return the result document.

    Raises:
        UserError: settings that make no row.
    """
    import torch

    check_config(config)
    on_gpu = torch.cuda.is_available()
    config = config.with_micro_batches(on_gpu=on_gpu)
    if config.ladder and not on_gpu:
        check_host_room(preset(config.presets[0]))
    torch.set_flush_denormal(True)  # both as train/main.py sets them
    torch.set_float32_matmul_precision("high")
    Path(config.scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.scratch, prefix="train-step-") as folder:
        scratch = Path(folder).resolve()
        if not config.ladder:
            return result("train-step", config, **_sweep(config, scratch))

        from benchmarks.train_step.ladder import measure_ladder

        figures = measure_ladder(config, scratch)
    return result(_LADDER, config, variant=config.presets[0], **figures)


def print_table(document: dict[str, Any]) -> None:
    """The result for people."""
    printer = ladder_table if document["theme"] == _LADDER else table
    printer.print_table(document)


def _sweep(config: TrainStepConfig, scratch: Path) -> Json:
    sweep = Sweep(config, scratch)
    sweep.run()
    rows = [row.to_json() for row in sweep.rows]
    return {
        "loss_difference_frac": sweep.loss_difference_frac,
        "rows": rows,
        "comparisons": compare_loops(rows),
        "ema_costs": ema_costs(rows),
        "left_out": sweep.left_out,
        "profile": sweep.profile() if config.profile else None,
    }


@dataclass
class Row:
    """One case: what was found in every round, or why nothing was."""

    case: Case
    visits: list[Visit] = field(default_factory=list)
    last_sec: float = 0.0
    reason: str = ""

    def to_json(self) -> Json:
        """The case, the figures over all blocks with their spread, and every visit as it was."""
        document: Json = {**asdict(self.case), "not_measured": self.reason or None}
        if self.visits:
            blocks = [block for each in self.visits for block in each.blocks]
            document |= {
                name: spread([block[key] for block in blocks]) for name, key in _FIGURES.items()
            }
            document["peak_mem_gib"] = max(block["perf/peak_mem_gib"] for block in blocks)
        return {**document, "visits": [asdict(each) for each in self.visits]}


class Sweep:
    """All rows, over one dataset for each preset.

    Attributes:
        loss_difference_frac: of the two loops, by preset; see `check_parity`.
        rows: in the order in which they were first tried.
        left_out: cases and repeats that the time did not allow.
    """

    def __init__(self, config: TrainStepConfig, scratch: Path) -> None:
        self._config, self._scratch = config, scratch
        self._timing = Timing(warmup=config.warmup, steps=config.steps, blocks=config.blocks)
        self._started = monotonic()
        self._num_visits = 0
        self.loss_difference_frac: dict[str, float] = {}
        self.rows: list[Row] = []
        self.left_out: list[str] = []

    def run(self) -> None:
        """Every case once; then those that ran again, in turns, while there is time.

        Raises:
            UserError: the loops do not train alike.
        """
        self._announce()
        if len(set(self._config.loops)) > 1:
            for name in self._config.presets:
                self.loss_difference_frac[name] = check_parity(name, self._scratch)
        print(HEADER)
        for case in iter_cases(self._config, self._largest_that_ran):
            longest_sec = max((row.last_sec for row in self.rows), default=0.0)
            if self._is_time_for(str(case), longest_sec):
                self.rows.append(row := Row(case, reason=self._too_large(case)))
                self._visit(row)
        for number in range(2, self._config.rounds + 1):
            for row in self.rows:
                if not row.reason and self._is_time_for(
                    f"{row.case}, round {number}", row.last_sec
                ):
                    self._visit(row)

    def profile(self) -> Json | None:
        """Where the time of our fastest row goes; None where none of them ran."""
        from benchmarks.train_step.step_profile import NUM_STEPS, profile_steps

        ours = [row for row in self.rows if row.case.loop == "latentmill" and not row.reason]
        best = max(ours, key=lambda row: row.to_json()["images_per_sec"]["median"], default=None)
        if best is None:
            return None
        release_memory()
        data, trace = self._data_for(best.case), self._config.trace
        arm = open_arm(best.case, data, self._scratch / "run-profiled", 10 * self._timing.num_steps)
        with closing(arm):
            arm.run(self._timing.warmup)
            path = Path(trace) if trace else self._scratch / "trace.json"
            found = profile_steps(arm.run, NUM_STEPS, arm.device.type, path)
        return {"rung": str(best.case), **found}

    def _announce(self) -> None:
        config = self._config
        num_others = count_cases(replace(config, product=not config.product))
        other = "one setting at a time would be" if config.product else "--product would be"
        print(
            f"{count_cases(config)} rows ({other} {num_others}), gone through {config.rounds} "
            f"times, or as often as {config.max_minutes:g} minutes allow"
        )

    def _is_time_for(self, what: str, expected_sec: float) -> bool:
        """Whether a visit would end in time; notes what would not, and all that comes after it."""
        spent_sec = monotonic() - self._started
        is_time = not self.left_out and spent_sec + expected_sec < 60 * self._config.max_minutes
        if not is_time:
            self.left_out.append(what)
        return is_time

    def _visit(self, row: Row) -> None:
        began = monotonic()
        if not row.reason:
            self._num_visits += 1
            release_memory()
            data, run_dir = self._data_for(row.case), self._scratch / f"run-{self._num_visits}"
            try:
                row.visits.append(visit(row.case, data, run_dir, self._timing))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                row.reason = OUT_OF_MEMORY
            except UserError as error:
                row.reason = str(error)
        row.last_sec = monotonic() - began
        print(line(row.to_json()), flush=True)

    def _too_large(self, case: Case) -> str:
        """Why there is no point in trying, if there is none."""
        for row in self._other_batches_of(case):
            if row.reason == OUT_OF_MEMORY and row.case.micro_batch < case.micro_batch:
                return f"not tried: {OUT_OF_MEMORY} at {row.case.micro_batch}"
        return ""

    def _data_for(self, case: Case) -> Path:
        """The preset's dataset, written on first use."""
        path = self._scratch / f"latents-{case.preset}"
        if not path.exists():
            columns = columns_for(preset(case.preset))
            write_latents(path, *columns, self._config.num_samples, _SHARDS)
        return path

    def _largest_that_ran(self, case: Case) -> int:
        ran = [row.case.micro_batch for row in self._other_batches_of(case) if not row.reason]
        return max(ran, default=min(self._config.micro_batches))

    def _other_batches_of(self, case: Case) -> list[Row]:
        """The rows so far that differ from a case in the micro-batch alone."""
        size = case.micro_batch
        return [row for row in self.rows if replace(row.case, micro_batch=size) == case]
