"""The training step of stage 2: images per second, share of the device, memory, waiting for data.

Latent shards of random numbers in full size, through the real reader and the real loop; each step
is one forward pass, backward pass and update. One setting is varied at a time: first the
micro-batch; then, at the largest that fits, every other. What does not run here, or does not fit,
is a row that says so. All rows are gone through in turns, as often as time allows.

On a CPU, `--presets sd2-base-256 --micro-batches 1 --emas off --rounds 1 --blocks 1 --steps 2
--warmup 1` takes minutes and 14 GiB.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks.result import environment, spread
from benchmarks.train_step_case import (
    Case,
    CompileMode,
    Switch,
    Timing,
    Visit,
    is_out_of_memory,
    release_memory,
    visit,
)
from benchmarks.train_step_data import columns_for, write_latents
from shards.column import Json
from shards.errors import UserError
from shards.order import DEFAULT_MAX_PARTITIONS
from train.config import AttentionChoice, Precision
from train.presets import preset

OUT_OF_MEMORY = "out of memory"
_SHARDS = 4
# The settings that the others are varied around; where one is not listed, the first that is.
_BASE = {"attention": "auto", "precision": "bf16-weights", "compile": "off", "ema": "on"}
_DATA_WAIT_AIM = 0.02
_FIGURES = {
    "iters_per_sec": "perf/iters_per_sec",
    "images_per_sec": "perf/images_per_sec",
    "mfu": "perf/mfu",
    "data_wait_frac": "perf/data_wait_frac",
}


@dataclass(frozen=True, kw_only=True)
class TrainStepConfig:
    """Measure the training step of the U-Net, one setting varied at a time."""

    presets: tuple[str, ...] = ("tiny",)
    """Training presets: U-Net, resolution, objective, optimizer."""
    micro_batches: tuple[int, ...] = (16, 32)
    """Samples of a forward pass, and here of the whole step."""
    attentions: tuple[AttentionChoice, ...] = ("auto",)
    """Attention backends; auto is the one that the others are compared with."""
    precisions: tuple[Precision, ...] = ("auto",)
    """Precisions; the others are compared with bf16-weights, or with the first one."""
    compiles: tuple[CompileMode, ...] = ("off",)
    """torch.compile; its time counts as setup."""
    emas: tuple[Switch, ...] = ("off", "on")
    """With and without a moving average of the weights."""
    steps: int = 10
    """Steps of a timed block."""
    warmup: int = 5
    """Steps before the first timed block of a row; more than the reader runs ahead."""
    blocks: int = 3
    """Timed blocks of a row in each round."""
    rounds: int = 2
    """How often all rows are gone through."""
    max_minutes: float = 10.0
    """No row is begun that would probably end later; what is left out is said."""
    num_samples: int = 1024
    """Distinct samples; 223 kB each at 512 px with the states of SD 2."""
    scratch: str = "data"
    """Folder for a temporary folder, which is removed at the end."""
    out: str = ""
    """Also write the result to this file."""


def measure(config: TrainStepConfig) -> dict[str, Any]:
    """Run all rows and return the result document.

    Raises:
        UserError: settings that make no row.
    """
    import torch

    check_config(config)
    torch.set_flush_denormal(True)  # both as train/main.py sets them
    torch.set_float32_matmul_precision("high")
    Path(config.scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.scratch, prefix="train-step-") as folder:
        sweep = Sweep(config, Path(folder).resolve())
        sweep.run()
    return {
        "theme": "train_step",
        "protocol": asdict(config),
        "rows": [row.to_json() for row in sweep.rows],
        "left_out": sweep.left_out,
        "environment": environment(),
    }


def check_config(config: TrainStepConfig) -> None:
    """Refuse settings that make no row, before anything takes time."""
    for name in ("presets", "micro_batches", "attentions", "precisions", "compiles", "emas"):
        if not getattr(config, name):
            raise UserError(f"--{name.replace('_', '-')}", "names nothing")
    for name in ("steps", "warmup", "blocks", "rounds", "max_minutes"):
        if getattr(config, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')}", f"{getattr(config, name)}")
    if min(config.micro_batches) < 1:
        raise UserError("--micro-batches", f"{min(config.micro_batches)}", wanted="at least 1")
    if config.num_samples < DEFAULT_MAX_PARTITIONS:
        raise UserError(
            "--num-samples", f"{config.num_samples}", wanted=f"at least {DEFAULT_MAX_PARTITIONS}"
        )
    for name in config.presets:
        preset(name)


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
    """All rows, one setting at a time around a base, over one dataset for each preset.

    Attributes:
        rows: in the order in which they were first tried.
        left_out: cases and repeats that the time did not allow.
    """

    def __init__(self, config: TrainStepConfig, scratch: Path) -> None:
        self._config, self._scratch = config, scratch
        self._timing = Timing(warmup=config.warmup, steps=config.steps, blocks=config.blocks)
        self._started = monotonic()
        self._num_visits = 0
        self.rows: list[Row] = []
        self.left_out: list[str] = []

    def run(self) -> None:
        """Every case once; then those that ran again, in turns, while there is time."""
        print(_HEADER)
        for case in self._cases():
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
        print(_line(row.to_json()), flush=True)

    def _too_large(self, case: Case) -> str:
        """Why there is no point in trying, if there is none."""
        for row in self.rows:
            alike = replace(row.case, micro_batch=case.micro_batch) == case
            if alike and row.reason == OUT_OF_MEMORY and row.case.micro_batch < case.micro_batch:
                return f"not tried: {OUT_OF_MEMORY} at {row.case.micro_batch}"
        return ""

    def _data_for(self, case: Case) -> Path:
        """The preset's dataset, written on first use."""
        path = self._scratch / f"latents-{case.preset}"
        if not path.exists():
            columns = columns_for(preset(case.preset))
            write_latents(path, *columns, self._config.num_samples, _SHARDS)
        return path

    # What is tried -------------------------------------------------------------------------------

    def _cases(self) -> Iterator[Case]:
        """Which come later depends on which micro-batches have run by then."""
        for name in self._config.presets:
            for micro_batch in sorted(set(self._config.micro_batches)):
                yield self._base(name, micro_batch)
            yield from self._variations(self._base(name, self._largest_that_ran(name)))

    def _base(self, name: str, micro_batch: int) -> Case:
        chosen: dict[str, Any] = {
            axis: wanted if wanted in self._listed(axis) else self._listed(axis)[0]
            for axis, wanted in _BASE.items()
        }
        return Case(preset=name, micro_batch=micro_batch, **chosen)

    def _variations(self, base: Case) -> Iterator[Case]:
        """What compiles comes last: it takes longest."""
        for axis in ("ema", "attention", "precision", "compile"):
            for value in self._listed(axis):
                change: dict[str, Any] = {axis: value}
                if replace(base, **change) != base:
                    yield replace(base, **change)

    def _listed(self, axis: str) -> tuple[str, ...]:
        values: tuple[str, ...] = getattr(self._config, f"{axis}s")
        return tuple(dict.fromkeys(values))

    def _largest_that_ran(self, name: str) -> int:
        ran = [r.case.micro_batch for r in self.rows if r.case.preset == name and not r.reason]
        return max(ran, default=min(self._config.micro_batches))


# For people ---------------------------------------------------------------------------------------

_HEADER = (
    f"{'preset':<15}{'batch':>6}  {'attention':<10}{'precision':<13}{'compile':<9}{'EMA':<4}"
    f"{'it/s':>8}{'img/s':>8}{'p10-p90':>16}{'MFU':>7}{'GiB':>7}{'data':>7}{'setup s':>9}  ran"
)


def _line(row: Json) -> str:
    case = (
        f"{row['preset']:<15}{row['micro_batch']:>6}  {row['attention']:<10}"
        f"{row['precision']:<13}{row['compile']:<9}{row['ema']:<4}"
    )
    if row["not_measured"]:
        return f"{case}  {row['not_measured']}"
    speed, last = row["images_per_sec"], row["visits"][-1]
    between = f"{_rate(speed['p10'])}-{_rate(speed['p90'])}"
    return (
        f"{case}{_rate(row['iters_per_sec']['median']):>8}{_rate(speed['median']):>8}{between:>16}"
        f"{row['mfu']['median']:>7.1%}{row['peak_mem_gib']:>7.1f}"
        f"{row['data_wait_frac']['median']:>7.1%}{last['setup_sec']:>9.1f}  {last['attention']}"
    )


def _rate(per_sec: float) -> str:
    """Of a laptop's large U-Net as of a GPU's tiny one."""
    return f"{per_sec:.1f}" if per_sec >= 10 else f"{per_sec:.3g}"


def print_table(result: dict[str, Any]) -> None:
    """The result for people."""
    env, protocol = result["environment"], result["protocol"]
    print(
        f"\n{env['device']}, torch {env['versions']['torch']}; medians over blocks of "
        f"{protocol['steps']} steps, {protocol['blocks']} in each of up to {protocol['rounds']} "
        f"rounds; data from the page cache"
    )
    print(_HEADER)
    for row in result["rows"]:
        print(_line(row))
    visits = [visit for row in result["rows"] for visit in row["visits"]]
    peaks = sorted({visit["matmul_flops_per_sec"] / 1e12 for visit in visits})
    if peaks:
        shown = ", ".join(f"{peak:.3g}" for peak in peaks)
        print(f"MFU: of {shown} TFLOP/s in matrix products, measured once for each precision")
    if any(visit["device"] == "cpu" for visit in visits):
        print("GiB: of the whole process so far; a CPU's memory is not counted by row")
    waits = [row["data_wait_frac"]["median"] for row in result["rows"] if row["visits"]]
    if waits:
        print(f"waiting for data: at most {max(waits):.1%} (aim: at most {_DATA_WAIT_AIM:.0%})")
    for what in result["left_out"]:
        print(f"left out after {protocol['max_minutes']:g} minutes: {what}")
