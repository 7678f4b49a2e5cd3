"""What the trials of a sweep share: settings, data, length, and the command of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.held_out import choose_held_out
from shards.order import choose_partitions, positions_of_rank
from train.config import TrainConfig
from train.main import fitting_preset, open_columns, parse
from train.presets import preset
from train.sweep.config import SweepConfig
from train.sweep.space import Settings, Space, ends, flag_names, flags_of, parse_space

Json = dict[str, Any]

_OWN_FLAGS = ("output_dir", "validation_every")
_PRESET_LENGTH_OVER_TRIAL_LENGTH = 10


@dataclass(frozen=True)
class Length:
    """How long a trial runs.

    Args:
        steps: updates.
        validation_every: steps between two measurements; the last is at the end.
    """

    steps: int
    validation_every: int


@dataclass(frozen=True)
class Plan:
    """A sweep, checked.

    Args:
        config: what was asked for.
        preset: name of the trainer's preset.
        flags: of the trainer, as the command line gave them, the same in all trials.
        base: the trainer's settings that flags and preset make.
        space: what differs.
        max_steps: of a trial at the base's batch.
        data: what of the dataset the losses depend on.
    """

    config: SweepConfig
    preset: str
    flags: list[str]
    base: TrainConfig
    space: Space
    max_steps: int
    data: Json

    @property
    def prunes(self) -> bool:
        """Trials of different lengths have no points in common to be compared at."""
        return self.config.pruner != "none" and "max_steps" not in self.space

    def batch_of(self, settings: Settings) -> int:
        """Samples per step of a trial."""
        return int(settings.get("global_batch_size", self.base.global_batch_size))

    def length_of(self, settings: Settings) -> Length:
        """Steps of a trial, and of the time between two validations."""
        steps = settings.get("max_steps", self.max_steps)
        if self.config.compare == "samples" and "max_steps" not in settings:
            steps = round(steps * self.base.global_batch_size / self.batch_of(settings))
        steps = max(1, steps)
        return Length(steps, -(-steps // self.config.validations))

    def point_of(self, step: int, length: Length) -> int:
        """Which of a trial's validations a step is, from 1.

        They are equal shares of its length: trials of different batches meet at equal samples.
        """
        return round(step * self.config.validations / length.steps)

    def trial_arguments(self, settings: Settings, run_dir: Path) -> list[str]:
        """What train/main.py is called with for a trial."""
        length = self.length_of(settings)
        unless_given: Json = {
            "checkpoint_every": length.validation_every,
            "keep_checkpoints": 1,
            "log_every": min(self.base.log_every, length.validation_every),
            "num_samples": 0,
        }
        given = flag_names(self.flags)
        own = {name: value for name, value in unless_given.items() if name not in given}
        own |= {
            "output_dir": run_dir,
            "max_steps": length.steps,
            "validation_every": length.validation_every,
        }
        searched = {name: value for name, value in settings.items() if name != "max_steps"}
        return [*self._shared_arguments, *flags_of(own), *flags_of(searched)]

    def full_size_arguments(self, settings: Settings, run_dir: Path) -> list[str]:
        """What train/main.py is called with for a run of the preset's own length."""
        settings = dict(settings)
        is_equal_samples = self.config.compare == "samples" and "max_steps" not in settings
        settings["max_steps"] = preset(self.preset).max_steps
        if is_equal_samples:
            samples = settings["max_steps"] * self.base.global_batch_size
            settings["max_steps"] = max(1, round(samples / self.batch_of(settings)))
        return [*self._shared_arguments, *flags_of({"output_dir": run_dir}), *flags_of(settings)]

    @property
    def _shared_arguments(self) -> list[str]:
        return [self.preset, "--data", self.config.data, *self.flags]

    def identity(self, device: str) -> Json:
        """What must not change when a sweep goes on: else its losses or costs are of two kinds."""
        from optuna.distributions import distribution_to_json

        free = {"data", "out", "trials", "workers", "usd_per_gpu_hour", "search", "preset"}
        asked = {name: value for name, value in asdict(self.config).items() if name not in free}
        return {
            **asked,
            "preset": self.preset,
            "flags": " ".join(self.flags),
            "max_steps": self.max_steps,
            "search": {name: distribution_to_json(one) for name, one in self.space.items()},
            "data": self.data,
            "device": device,
        }


def build_plan(config: SweepConfig, passed: Sequence[str]) -> Plan:
    """Check everything that can be checked before the first trial.

    Args:
        config: of the sweep.
        passed: the trainer's flags.

    Raises:
        UserError: the sweep sets one of these flags itself, the data has no held-out samples or
            does not fit, or what is to be searched makes no sense.
    """
    given = flag_names(passed)
    for name in _OWN_FLAGS:
        if name in given:
            raise UserError(
                f"--{name.replace('_', '-')}",
                "is what the sweep sets for each trial",
                remedy={"output_dir": "--out", "validation_every": "--validations"}[name],
            )
    flags = ["--data", config.data, *passed]
    name = config.preset or fitting_preset(flags)
    base = parse([name, *flags])
    max_steps = config.max_steps or max(1, base.max_steps // _PRESET_LENGTH_OVER_TRIAL_LENGTH)
    data = _held_out_data(base)
    plan = Plan(
        config=config,
        preset=name,
        flags=list(passed),
        base=base,
        space=parse_space(config.search, base, given, max_steps),
        max_steps=max_steps,
        data=data,
    )
    for batch in _batches(plan):
        _refuse_batch(plan, batch)
    return plan


def _held_out_data(base: TrainConfig) -> Json:
    """What identifies the samples that validation measures.

    Raises:
        UserError: there are none, or not the same in all trials.
    """
    for flag, is_on in (("--online", base.online), ("--follow", base.follow)):
        if is_on:
            raise UserError(
                flag,
                "a sweep compares losses of the same held-out samples",
                wanted="a latent dataset that is complete",
            )
    columns = open_columns(base)
    held_out = choose_held_out(columns.dataset, columns.image, base.validation_samples)
    if not len(held_out):
        raise UserError(
            base.data,
            "no held-out samples, so no validation loss",
            wanted=f"--validation-samples above 0 and a dataset of more than 20 images at "
            f"{base.resolution} px",
        )
    return {
        "image_column": columns.image.column_id,
        "text_column": columns.text.column_id,
        "shards": len(columns.image.shards),
        "rows": columns.image.num_rows,
        "held_out": len(held_out),
        "held_out_identity": held_out.identity,
    }


def _batches(plan: Plan) -> list[int]:
    searched = plan.space.get("global_batch_size")
    return ends("global_batch_size", searched) if searched else [plan.base.global_batch_size]


def _refuse_batch(plan: Plan, batch: int) -> None:
    """The trainer's own refusals of a batch, before the first trial."""
    partitions = choose_partitions(batch, plan.base.num_partitions)
    positions_of_rank(batch, partitions, 0, plan.config.devices_per_trial)
    kept = plan.data["rows"] - plan.data["held_out"]
    if partitions > kept:
        raise UserError(
            "--global-batch-size",
            f"{batch} takes at least {partitions} samples, the dataset has {kept} to train on",
            remedy="smaller batches: --search global_batch_size=...",
        )
