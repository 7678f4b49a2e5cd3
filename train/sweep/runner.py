"""The sweep: children in slots, their losses to the study, until there are enough trials."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

from shards.errors import UserError
from shards.lock import sole_writer
from shards.stop import StopOnSignal
from shards.storage import is_remote, location
from train.sweep.child import LOG, TRAINER, Child
from train.sweep.config import SweepConfig
from train.sweep.devices import Slot, deal_out, visible_gpus
from train.sweep.losses import Loss, read_losses
from train.sweep.plan import Length, Plan, build_plan
from train.sweep.progress import Progress
from train.sweep.report import write_report
from train.sweep.study import Study, import_optuna, storage_errors

if TYPE_CHECKING:
    from optuna.trial import Trial

_POLL_SEC = 0.25
# Of a trial, by signals from outside: the operating system short of memory, an operator. Deaths
# that come back are the trial's own.
_MAX_RESTARTS = 2
# The trainer of a sweep that was killed may still be writing its checkpoint.
_LOCK_WAIT_SEC = 120.0


def sweep(
    config: SweepConfig, passed: Sequence[str] = (), trainer: Sequence[str] = TRAINER
) -> None:
    """Run trials until the study has `config.trials`, and write the report.

    Args:
        config: of the sweep.
        passed: flags of the trainer that hold in all trials.
        trainer: the script that a trial runs.

    Raises:
        UserError: something is wrong with the settings, the data or the folder; or no trial at all
            could be finished.
    """
    import_optuna()
    out = location(config.out)
    if is_remote(out) or not isinstance(out, Path):
        raise UserError("--out", f"{config.out} is remote", wanted="a local folder, for SQLite")
    plan = build_plan(config, passed)
    slots = deal_out(gpus := visible_gpus(), config.workers, config.devices_per_trial)
    device = "GPU" if gpus else "device"
    if config.usd_per_gpu_hour and not gpus:
        raise UserError("--usd-per-gpu-hour", "there is no GPU here: hours of a CPU are none")
    with ExitStack() as held:
        signals = held.enter_context(StopOnSignal())
        held.enter_context(sole_writer(out))
        held.enter_context(storage_errors(out))
        pruner = config.pruner if plan.prunes else "none"
        study = Study(out, plan.identity(device), plan.space, pruner, config.sampler_seed)
        progress = Progress(plan, study, len(slots), device)
        progress.announce()
        Runner(plan, study, slots, out, progress, signals, trainer).run()
        write_report(plan, study, out, device)
        progress.finish(out)


@dataclass
class Running:
    """A trial under way.

    Args:
        trial: as the study has it.
        length: of its run.
        run_dir: of its run.
        child: its trainer.
        points: that the study knows the loss at.
    """

    trial: Trial
    length: Length
    run_dir: Path
    child: Child
    points: set[int]


class Runner:
    """Trials in progress.

    Args:
        plan: of the sweep.
        study: its trials.
        slots: where they run.
        out: folder with a run folder for each.
        progress: is told what happens.
        signals: ask for a stop.
        trainer: the script that a trial runs.
    """

    def __init__(
        self,
        plan: Plan,
        study: Study,
        slots: list[Slot],
        out: Path,
        progress: Progress,
        signals: StopOnSignal,
        trainer: Sequence[str],
    ) -> None:
        self._plan, self._study, self._out = plan, study, out
        self._progress, self._signals, self._trainer = progress, signals, trainer
        self._free = list(slots)
        self._running: list[Running] = []
        self._waiting = study.interrupted()

    def run(self) -> None:
        """Until there are enough trials, or a signal asks for a stop."""
        try:
            while True:
                self._fill_slots()
                if self._signals.requested:
                    self._stop()
                if not self._running:
                    return
                self._poll()
        finally:  # whatever went wrong, nothing that we started stays
            for running in self._running:
                running.child.kill()

    def _fill_slots(self) -> None:
        while self._free and not self._signals.requested:
            if self._waiting:
                trial = self._waiting.pop(0)
            elif len(self._study.trials) < self._plan.config.trials:
                trial = self._study.ask()
            else:
                return
            self._start(trial)

    def _start(self, trial: Trial) -> None:
        settings = self._study.settings_of(trial)
        run_dir = self._out / f"trial-{trial.number:04d}"
        _stop_clock(trial, run_dir)
        if _attribute(trial, "pruned_at") is not None:  # killed before it was told
            self._prune(trial, run_dir)
            self._progress.ended(trial.number)
            return
        with sole_writer(run_dir, _LOCK_WAIT_SEC):
            pass
        slot = self._free.pop(0)
        length = self._plan.length_of(settings)
        run = {
            "settings": {name: _plain(value) for name, value in settings.items()},
            "steps": length.steps,
            "samples": length.steps * self._plan.batch_of(settings),
            "num_threads": slot.num_threads,
        }
        trial.set_user_attr("run", run)
        _start_clock(trial)
        arguments = self._plan.trial_arguments(settings, run_dir)
        child = Child(self._trainer, arguments, run_dir, slot)
        points = set(self._study.trials[trial.number].intermediate_values)
        self._running.append(Running(trial, length, run_dir, child, points))
        self._progress.started(trial.number, settings, length)

    def _poll(self) -> None:
        time.sleep(_POLL_SEC)
        for running in list(self._running):
            status = running.child.status()  # first: what is read then is all there is
            losses = read_losses(running.run_dir)
            self._report(running, losses)
            if status is not None:
                self._free.append(running.child.slot)
                self._running.remove(running)
                _stop_clock(running.trial, running.run_dir, time.time())
                self._judge(running, losses, status)

    def _report(self, running: Running, losses: list[Loss]) -> None:
        """Tell the study what is new, and end a trial that is not worth going on."""
        trial, points = running.trial, running.points
        finite = [loss for loss in losses if math.isfinite(loss.best)]
        by_point = {self._plan.point_of(loss.step, running.length): loss for loss in finite}
        new = sorted(by_point.keys() - points)
        for point in new:
            loss = by_point[point]
            trial.report(loss.best, point)
            trial.set_user_attr("val", {"val_loss": loss.raw, "val_ema_loss": loss.average})
            points.add(point)
        if len(finite) < len(losses):
            running.child.stop()
        elif new and losses[-1].step < running.length.steps and trial.should_prune():
            trial.set_user_attr("pruned_at", losses[-1].step)
            running.child.stop()

    def _judge(self, running: Running, losses: list[Loss], status: int) -> None:
        """What became of a trial whose trainer has ended."""
        trial, study = running.trial, self._study
        broken = [loss.step for loss in losses if not math.isfinite(loss.best)]
        at_end = [loss.best for loss in losses if loss.step == running.length.steps]
        if broken:
            study.fail(trial, f"the validation loss is not finite at step {broken[0]}")
        elif status == 0 and at_end:  # even if it was to be pruned: it was faster
            study.complete(trial, at_end[0])
        elif _attribute(trial, "pruned_at") is not None:
            self._prune(trial, running.run_dir)
        elif self._signals.requested:
            return  # it goes on with the next sweep
        elif status <= 0 and self._restarts(trial) < _MAX_RESTARTS:
            trial.set_user_attr("restarts", self._restarts(trial) + 1)
            self._waiting.append(trial)
            return
        else:
            study.fail(trial, _reason(status, running.child.last_words()))
        self._progress.ended(trial.number)

    def _prune(self, trial: Trial, run_dir: Path) -> None:
        """Nobody goes on from there: its checkpoints would only fill the disk."""
        self._study.prune(trial)
        rmtree(run_dir / "checkpoints", ignore_errors=True)

    def _restarts(self, trial: Trial) -> int:
        return int(_attribute(trial, "restarts") or 0)

    def _stop(self) -> None:
        """Let all trainers write a checkpoint and end; their trials stay under way."""
        self._progress.stopping(len(self._running))
        for running in self._running:
            running.child.stop()
        while self._running:
            self._poll()


def _attribute(trial: Trial, name: str) -> Any:
    return trial.user_attrs.get(name)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _reason(status: int, last_words: str) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}, {_MAX_RESTARTS + 1} times (SIGKILL: out of memory?)"
    if status == 0:
        return f"it ended {_MAX_RESTARTS + 1} times before its last step; {last_words}"
    return f"exit status {status}: {last_words}"


def _start_clock(trial: Trial) -> None:
    clock = _attribute(trial, "clock") or {"spent_sec": 0.0}
    trial.set_user_attr("clock", {**clock, "started_unix": time.time()})


def _stop_clock(trial: Trial, run_dir: Path, now: float | None = None) -> None:
    """Add the time since a trial's trainer was started to what it took.

    Args:
        trial: the trial.
        run_dir: of its run.
        now: default: nobody saw it end; its last sign of life counts.
    """
    clock = _attribute(trial, "clock") or {}
    started = clock.get("started_unix")
    if started is None:
        return
    if now is None:
        files = [path for name in ("metrics.jsonl", LOG) if (path := run_dir / name).exists()]
        now = max([started, *(path.stat().st_mtime for path in files)])
    trial.set_user_attr("clock", {"spent_sec": clock["spent_sec"] + now - started})
