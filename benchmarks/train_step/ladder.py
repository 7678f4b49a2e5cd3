"""One switch of the trainer after another, each held to float32 and timed beside the rung before.

A rung that does not pay is recorded and left out of those after it; so is one that cannot run here,
that fails its checks, or that brings an error of a kernel, a compiler or the device.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from time import monotonic
from typing import Any

from accelerate import PartialState
from torch._dynamo import config as dynamo

from benchmarks.train_step.case import is_out_of_memory
from benchmarks.train_step.checks import Checks, NotTheSameError, refuse_problems
from benchmarks.train_step.config import TrainStepConfig
from benchmarks.train_step.data import columns_for, write_latents
from benchmarks.train_step.ladder_row import RungRow, judge
from benchmarks.train_step.ladder_table import HEADER, line
from benchmarks.train_step.remember import remember
from benchmarks.train_step.resolved import (
    base_conv_search,
    base_precision,
    obstacle,
    recommended_flags,
)
from benchmarks.train_step.rungs import PLAIN_LOOPS, Rung, base_case, list_rungs, plain_case
from benchmarks.train_step.runner import Check, Runner, Runners, take_turns
from benchmarks.train_step.step_profile import NUM_STEPS, profile_steps
from shards.column import Json
from shards.errors import UserError
from train.presets import preset

OUT_OF_MEMORY = "out of memory"
BASE = "base"
APART = "the same without, in a process of its own"
_MAX_GRAPHS = 64
_SHARDS = 4
# Until it was measured once, what a rung is taken to need, and what compiling a U-Net adds; what
# a process of its own adds, always.
_FIRST_GUESS_SEC, _COMPILE_GUESS_SEC, _PROCESS_GUESS_SEC = 15.0, 100.0, 15.0
_PROFILE_SEC = 20.0
_BASE, _PLAIN, _PLAIN_VARIANT, _PLAIN_OTHER_BATCH = 9, 8, 5, 2  # importance; see `Rung`


class Ladder:
    """All rungs, over one dataset.

    Args:
        config: with its micro-batches named.
        scratch: folder that exists.

    Attributes:
        rows: the plain loop's, then ours, in the order in which they were tried.
        standing: the last row that was kept.
        final: what stands at the end once more, in turns with the plain loop at its best.
    """

    def __init__(self, config: TrainStepConfig, scratch: Path) -> None:
        self._config, self._started = config, monotonic()
        (name,) = config.presets
        data = write_latents(
            scratch / "latents", *columns_for(preset(name)), config.num_samples, _SHARDS
        )
        self._runners = Runners(data, scratch, warmup=config.warmup, max_block_steps=config.steps)
        self._checks = Checks(scratch, config.check_steps)
        self._base = base_case(
            name, config.micro_batches, base_precision(), config.stand_on, base_conv_search()
        )
        self._rung_sec, self._compile_sec = _FIRST_GUESS_SEC, _COMPILE_GUESS_SEC
        # To the compiler all models are one function; its graphs are those of every rung.
        dynamo.recompile_limit = max(dynamo.recompile_limit, _MAX_GRAPHS)
        self.rows: list[RungRow] = []
        self.standing: RungRow | None = None
        self.final: RungRow | None = None

    def run(self) -> None:
        """Every rung for which there is time, from the least important on; then the plain loop."""
        print(HEADER)
        agenda = [
            *(self._plain_rungs() if "diffusers" in self._config.loops else []),
            Rung(name=BASE, importance=_BASE),
            *list_rungs(self._config.micro_batches, self._config.stand_on),
        ]
        for number, rung in enumerate(agenda):
            self._climb(rung, agenda[number + 1 :])
        if self.standing and self.best_plain:
            self._time_final(self.standing, self.best_plain)

    def profile(self, trace: Path) -> Json | None:
        """Where the time of what stands goes; None, and a row more, where that goes wrong.

        After all timing: a profiler may slow down what comes after it.
        """
        assert self.standing
        row, found = RungRow("profile", self.standing.case), None
        with self._recorded(row):
            runner = self._runners.open(self.standing.name, self.standing.case)
            device = runner.arm.device.type
            found = {"rung": self.standing.name}
            found |= profile_steps(runner.arm.run, NUM_STEPS, device, trace)
        self.rows += [row] if row.reason else []
        return None if row.reason else found

    def close(self) -> None:
        """Close whatever is alive; a device that is lost cannot."""
        row = RungRow("close", self._base)
        with self._recorded(row):
            self._runners.close_all()
        self.rows += [row] if row.reason else []

    @property
    def best_plain(self) -> RungRow | None:
        """The fastest row of the plain loop."""
        rows = [row for row in self.rows if row.case.loop != "latentmill" and row.is_measured]
        return max(rows, key=lambda row: row.speed, default=None)

    def _plain_rungs(self) -> list[Rung]:
        """The plain loop in every batch; what else it is tried with in the one that was best."""
        return [
            Rung(
                name=f"{loop}, batch {size}",
                changes=asdict(plain_case(self._base, loop, size)),
                importance=_PLAIN if loop == PLAIN_LOOPS[0] else _PLAIN_VARIANT,
            )
            for loop in PLAIN_LOOPS
            for size in sorted(set(self._config.micro_batches))
        ]

    # One rung ------------------------------------------------------------------------------------

    def _climb(self, rung: Rung, rest: Sequence[Rung]) -> None:
        case = rung.on(self.standing.case if self.standing else self._base)
        self.rows.append(row := RungRow(rung.name, case, rung.switch))
        began = monotonic()
        with self._recorded(row):
            row.reason = self._why_not(row, rung, rest)
            if not row.reason:
                self._measure(row, rung)
        with self._recorded(row):
            if row is not self.standing:
                self._runners.close(row.name)
        is_like_others = row.is_measured and not rung.is_apart
        if is_like_others and case.compile == "off":
            self._rung_sec = monotonic() - began
        elif is_like_others and rung.compiles(case):
            self._compile_sec = max(monotonic() - began - self._rung_sec, 0.0)
        print(line(row.to_json()), flush=True)

    def _measure(self, row: RungRow, rung: Rung) -> None:
        if row.case.loop != "latentmill":
            self._time(row, None)
            row.verdict = "measured"
            return
        if rung.is_apart:
            self._measure_search(row)
            return
        row.checks["short_training"] = found = self._checks.short_training(row.case)
        refuse_problems([found])
        self._time(row, self.standing, self._same_function(row))
        row.verdict = judge(row, is_ablation=rung.is_ablation)
        if row.verdict in ("base", "kept"):
            former, self.standing = self.standing, row
            if former:
                self._runners.close(former.name)

    def _measure_search(self, row: RungRow) -> None:
        """What stands, and was checked, beside the same without cuDNN's search.

        What stands has it already: it is left off only if it was slower. Shapes that were searched
        keep their plans even then, in this process: for all rungs that come after alike.
        """
        assert self.standing
        former, without = self.standing, replace(row.case, conv_search="off")
        self._runners.rename(former.name, row.name)
        try:
            self._time(row, RungRow(APART, without))
        finally:
            self._runners.close(APART)
        row.verdict = judge(row, is_ablation=False)
        self.standing = replace(former, case=without) if row.verdict == "slower" else row

    def _open(self, row: RungRow, check: Check | None = None) -> Runner:
        """A row's runner; in a process of its own if it must neither find nor leave cuDNN's plans.

        The plain loop does not search: after it neither would ours, of the same shapes.
        """
        is_plain = row.case.loop != "latentmill"
        is_apart = row.name == APART or (is_plain and self._base.conv_search == "on")
        return self._runners.open(row.name, row.case, check, is_apart=is_apart)

    def _same_function(self, row: RungRow) -> Check:
        def check(arm: Any) -> None:
            row.checks["same_function"] = found = self._checks.same_function(arm.trainer)
            refuse_problems(found)

        return check

    def _why_not(self, row: RungRow, rung: Rung, rest: Sequence[Rung]) -> str:
        """Why a rung is not tried, if it is not."""
        is_ours = row.case.loop == "latentmill"
        if is_ours and rung.name != BASE and self.standing is None:
            return "not tried: there is nothing to stand on"
        for other in self.rows[:-1]:
            if other.case == row.case and not rung.is_apart:
                return f"the same as {other.name}"
            smaller = other.case.micro_batch < row.case.micro_batch
            alike = replace(other.case, micro_batch=row.case.micro_batch) == row.case
            if other.reason == OUT_OF_MEMORY and smaller and alike:
                return f"not tried: {OUT_OF_MEMORY} at {other.case.micro_batch}"
        if is_ours and (reason := obstacle(rung, row.case)):
            return reason
        return "" if self._is_time_for(rung, rest) else "left out: no time"

    # Time ----------------------------------------------------------------------------------------

    def _is_time_for(self, rung: Rung, rest: Sequence[Rung]) -> bool:
        """Whether it is among those that fit, of all that are left, the most important first."""
        left_sec = 60 * self._config.max_minutes - (monotonic() - self._started)
        left_sec -= self._rung_sec + (_PROFILE_SEC if self._config.profile else 0.0)  # at the end
        for each in sorted([rung, *rest], key=self._importance, reverse=True):
            fits = self._expected_sec(each) <= left_sec
            if each is rung:
                return fits
            if fits:
                left_sec -= self._expected_sec(each)
        raise AssertionError("it is one of them")

    def _importance(self, rung: Rung) -> int:
        """Variants of the plain loop in other batches than its best one can be done without."""
        best = self.best_plain
        is_variant = rung.changes.get("loop", PLAIN_LOOPS[0]) != PLAIN_LOOPS[0]
        if is_variant and best and rung.changes["micro_batch"] != best.case.micro_batch:
            return _PLAIN_OTHER_BATCH
        return rung.importance

    def _expected_sec(self, rung: Rung) -> float:
        compiles = rung.compiles(self.standing.case if self.standing else self._base)
        more_sec = _PROCESS_GUESS_SEC if rung.is_apart else 0.0
        return self._rung_sec + more_sec + (self._compile_sec if compiles else 0.0)

    def _time(self, row: RungRow, other: RungRow | None, check: Check | None = None) -> None:
        """In turns with another row's case; one after the other where both do not fit."""
        try:
            self._interleave(row, other, check)
        except RuntimeError as error:
            if not is_out_of_memory(error) or other is None:
                raise
            fits = False
        else:
            fits = True
        if other and not fits:  # the error is gone by now, and with it what it held
            self._runners.close_all()
            self._one_after_the_other(row, other, check)

    def _interleave(self, row: RungRow, other: RungRow | None, check: Check | None) -> None:
        # Ours first: the plain loop has Accelerate in a state in which ours cannot be built.
        runner = self._open(row, check)
        beside = [self._open(other)] if other else []
        row.blocks, *others = take_turns([runner, *beside], self._num_blocks)
        row.note(runner)
        if other:
            row.before, (row.before_blocks,) = other.name, others

    def _one_after_the_other(self, row: RungRow, other: RungRow, check: Check | None) -> None:
        row.is_interleaved = False
        runner = self._open(row, check)
        (row.blocks,) = take_turns([runner], self._num_blocks)
        row.note(runner)
        self._runners.close(row.name)
        row.before, runner = other.name, self._open(other)
        (row.before_blocks,) = take_turns([runner], self._num_blocks)

    def _time_final(self, standing: RungRow, plain: RungRow) -> None:
        """Both once more, in turns."""
        row = RungRow(standing.name, standing.case)
        with self._recorded(row):
            self._time(row, plain)
            row.verdict = judge(row, is_ablation=True)
        with self._recorded(row):
            self._runners.close(plain.name)
        if row.is_measured:
            self.final = row
        else:
            self.rows.append(replace(row, name=f"{row.name}, again"))

    @property
    def _num_blocks(self) -> int:
        return self._config.blocks * self._config.rounds

    # Failures ------------------------------------------------------------------------------------

    @contextmanager
    def _recorded(self, row: RungRow) -> Iterator[None]:
        """What goes wrong inside becomes the row's reason.

        Whatever a kernel, a compiler or the device throws is a finding about this rung, and the
        others are still to be measured; so nothing but an interrupt passes.
        """
        try:
            yield
        except UserError as error:
            row.reason = row.reason or str(error)
            row.is_failure = isinstance(error, NotTheSameError)
        except Exception as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                row.reason = row.reason or OUT_OF_MEMORY
                return
            traceback.print_exc(file=sys.stderr)
            first = next(filter(str.strip, str(error).splitlines()), "without a word")
            row.reason, row.is_failure = row.reason or f"{type(error).__name__}: {first}", True


def measure_ladder(config: TrainStepConfig, scratch: Path) -> Json:
    """All rungs, and where the time of the one goes that stands at the end.

    Args:
        config: with its micro-batches named.
        scratch: folder that exists.

    Returns:
        the figures of the result document; `failed` names the rows that went wrong.
    """
    ladder, profile = Ladder(config, scratch), None
    try:
        ladder.run()
        if config.profile and ladder.standing:
            profile = ladder.profile(Path(config.trace) if config.trace else scratch / "trace.json")
    finally:
        ladder.close()
    plain, standing = ladder.best_plain, ladder.standing
    kept = remember(ladder.rows, standing.case, PartialState().device) if standing else None
    if kept:
        print(f"kept for later runs on such a device: {kept}")
    plain_speed = plain.speed if plain else None
    return {
        "rows": [row.to_json(plain_speed) for row in ladder.rows],
        "final": ladder.final.to_json() if ladder.final else None,
        "recommended_flags": recommended_flags(standing.case) if standing else [],
        "profile": profile,
        "failed": [row.name for row in ladder.rows if row.is_failure],
    }
