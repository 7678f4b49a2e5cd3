"""The study: which trials there are, what is known of each, and which settings come next.

An Optuna study in SQLite, in the sweep's folder. One sweep at a time works on it: it holds the
folder, so a trial that is marked as running when a sweep starts was interrupted, and goes on.
SQLite's locks do not hold on network file systems, so a sweep is one machine's.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from shards.errors import StorageError, UserError
from train.sweep.space import Space, suggest

if TYPE_CHECKING:
    from optuna import Study as OptunaStudy
    from optuna.pruners import BasePruner
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial, Trial

Json = dict[str, Any]

FILE = "study.sqlite"
_NAME = "sweep"
_IDENTITY = "identity"
# Before these there is nothing to learn from; random settings, and no pruning.
_RANDOM_TRIALS = 5
_UNPRUNED_TRIALS = 3


def import_optuna() -> ModuleType:
    """Optuna, without its log lines: the sweep has its own.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        remedy = ".venv/bin/pip install optuna"
        raise UserError("train.sweep", "Optuna is not installed", remedy=remedy) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class Study:
    """The trials of a sweep, on disk.

    Args:
        out: the sweep's folder, held by the caller.
        identity: of the sweep; see `Plan.identity`.
        space: what is searched.
        pruner: `median`, `halving` or `none`.
        sampler_seed: the settings of trial N are a function of it, N and the trials before.

    Raises:
        UserError: the folder has a study of another sweep, or runs without a study.
    """

    def __init__(
        self, out: Path, identity: Json, space: Space, pruner: str, sampler_seed: int
    ) -> None:
        self._space, self._sampler_seed = space, sampler_seed
        is_new = not (out / FILE).exists()
        if is_new and any(out.glob("trial-*")):
            remedy = "another --out, or remove them"
            raise UserError(out, f"has runs of trials, and no {FILE}", remedy=remedy)
        self._storage = _open(out / FILE)
        self._study = _load(self._storage, pruner)
        before = self._study.user_attrs.get(_IDENTITY)
        if before is None:  # new, or killed when it was
            self._study.set_user_attr(_IDENTITY, identity)
        else:
            _refuse_another_sweep(out, before, json.loads(json.dumps(identity)))

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials, as they are on disk."""
        return self._study.get_trials(deepcopy=False)

    def interrupted(self) -> list[Trial]:
        """Trials that were under way when the last sweep ended."""
        running = [trial.number for trial in self.trials if trial.state.name == "RUNNING"]
        return [self._trial(number) for number in running]

    def ask(self) -> Trial:
        """A new trial."""
        return self._study.ask()

    def settings_of(self, trial: Trial) -> dict[str, Any]:
        """What differs in this trial, drawn if it has not been yet."""
        import optuna

        # A sampler that went on drawing would start again with a restarted sweep, and propose the
        # same settings twice: each trial has a seed of its own.
        self._study.sampler = optuna.samplers.TPESampler(
            seed=self._sampler_seed * 1_000_003 + trial.number,
            n_startup_trials=_RANDOM_TRIALS,
            constant_liar=True,  # keeps trials that run at the same time apart
        )
        return suggest(trial, self._space)

    def complete(self, trial: Trial, loss: float) -> None:
        """It ran to its end."""
        self._study.tell(trial, loss)

    def prune(self, trial: Trial) -> None:
        """It was worse than others, and stopped."""
        import optuna

        self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)

    def fail(self, trial: Trial, reason: str) -> None:
        """It cannot be finished."""
        import optuna

        trial.set_user_attr("reason", reason)
        self._study.tell(trial, state=optuna.trial.TrialState.FAIL)

    def importances(self) -> dict[str, float]:
        """Share of the losses' spread that each setting explains; empty with too few trials.

        PED-ANOVA (arXiv:2304.10255) over the complete trials.
        """
        import optuna

        complete = [trial for trial in self.trials if trial.state.name == "COMPLETE"]
        if len(complete) < 2 * _RANDOM_TRIALS or len({trial.value for trial in complete}) < 2:
            return {}
        return optuna.importance.get_param_importances(self._study)

    def _trial(self, number: int) -> Trial:
        import optuna

        study_id = self._storage.get_study_id_from_name(_NAME)
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, number)
        return optuna.trial.Trial(self._study, trial_id)


@contextmanager
def storage_errors(out: Path) -> Iterator[None]:
    """A full disk under the study, told as anywhere else."""
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except StorageInternalError as error:
        found = f"cannot be written ({getattr(error.__cause__, 'orig', error)})"
        remedy = "free space, then the same command again: it continues"
        raise StorageError(out / FILE, found, remedy=remedy) from error


def _open(path: Path) -> RDBStorage:
    optuna = import_optuna()
    from sqlalchemy.exc import DatabaseError

    try:
        # Not in the URL: there `?`, `#`, `%` and `{` mean something else than in a folder's name.
        connect = {"creator": partial(sqlite3.connect, path)}
        storage: RDBStorage = optuna.storages.RDBStorage(f"sqlite:///{FILE}", engine_kwargs=connect)
    except DatabaseError as error:
        found = f"cannot be used as a study ({error.orig})"
        raise UserError(path, found, remedy="another --out") from None
    return storage


def _load(storage: RDBStorage, pruner: str) -> OptunaStudy:
    import optuna

    return optuna.create_study(
        storage=storage,
        study_name=_NAME,
        direction="minimize",
        load_if_exists=True,
        pruner=_pruner(pruner),
    )


def _pruner(name: str) -> BasePruner:
    """Judges a trial at its validations, which are numbered from 1."""
    from optuna.pruners import MedianPruner, NopPruner, SuccessiveHalvingPruner

    if name == "median":  # never at the first: the warm-up still shows
        return MedianPruner(n_startup_trials=_UNPRUNED_TRIALS, n_warmup_steps=2)
    if name == "halving":
        return SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    return NopPruner()


def _refuse_another_sweep(out: Path, before: Json, now: Json) -> None:
    if before == now:
        return
    changed = [
        f"{name} {before.get(name)} -> {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    raise UserError(
        out,
        f"belongs to another sweep: {'; '.join(changed)}",
        wanted="the settings that the sweep was started with (--trials and --workers may change)",
        remedy="another --out",
    )
