"""What a sweep is asked to do. No optuna and no torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from shards.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Settings of `python -m train.sweep`; the command line has a flag for each field."""

    data: str = "data/latents"
    """Latent dataset that all trials train on; it must hold samples out (5% of them at most)."""
    preset: str = ""
    """Preset of the trainer that trials start from; default: the one that fits --data."""
    trials: int = 8
    """Trials in the whole study, failed and pruned ones included; a larger number, later, adds to
    a finished one."""
    max_steps: int = 0
    """Length of a trial, in steps of the preset's batch; 0: a tenth of the preset's."""
    out: str = "runs/sweep"
    """Local folder of the study, its trials' runs, sweep.json, trials.csv and pareto.png. The same
    command again continues there."""
    search: tuple[str, ...] = ()
    """What to search, any of the trainer's settings: learning_rate=1e-5:1e-2:log is a range,
    global_batch_size=16,32,64 a choice, a name alone has the range below. Default: all those
    below. Nothing else varies."""
    compare: Literal["samples", "steps"] = "samples"
    """What is the same in all trials: samples seen (a trial of twice the batch makes half the
    steps), or steps (it costs twice as much)."""
    validations: int = 5
    """Measurements of the validation loss in a trial; after each it may be pruned."""
    pruner: Literal["median", "halving", "none"] = "median"
    """Stop a trial whose loss is above the median of the others at the same point, or that is not
    among the best third at points 1, 3, 9, ... (successive halving)."""
    workers: int = 0
    """Trials at a time; 0: as many as the GPUs allow, on a CPU one."""
    devices_per_trial: int = 1
    """GPUs of a trial (processes, on a CPU)."""
    usd_per_gpu_hour: tuple[float, ...] = ()
    """Prices to state costs at, side by side: 3.00 5.12."""
    sampler_seed: int = 0
    """Of the sampler, which proposes settings; --seed is the trainer's, the same in all trials."""

    def __post_init__(self) -> None:
        for name in ("trials", "validations", "devices_per_trial"):
            if getattr(self, name) < 1:
                raise _wrong(name, getattr(self, name), "at least 1")
        for name in ("max_steps", "workers", "sampler_seed"):
            if getattr(self, name) < 0:
                raise _wrong(name, getattr(self, name), "at least 0")
        for price in self.usd_per_gpu_hour:
            if not 0 < price < math.inf:
                raise _wrong("usd_per_gpu_hour", price, "a price above 0")


def _wrong(name: str, found: object, wanted: str) -> UserError:
    return UserError(f"--{name.replace('_', '-')}", f"{found}", wanted=wanted)
