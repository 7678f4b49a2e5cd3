"""Hyperparameters of a training job as flags of train/main.py."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from shards.errors import UserError
from train.config import TrainConfig

PRESET = "preset"


def trainer_flags(hyperparameters: Mapping[str, str]) -> list[str]:
    """`{"preset": "tiny", "max_steps": "300"}` to `["tiny", "--max-steps=300"]`.

    Names are those of the trainer's flags, with dashes or underscores.

    Raises:
        UserError: the trainer has no such flag, or a switch is neither true nor false.
    """
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    flags: list[str] = []
    for given, value in hyperparameters.items():
        name = given.replace("-", "_")
        if name == PRESET:
            flags.insert(0, value)
        elif name in fields:
            flags += _flag(given, fields[name], value)
        else:
            raise _unknown(given, [PRESET, *fields])
    return flags


def _flag(given: str, field: dataclasses.Field[Any], value: str) -> list[str]:
    flag = field.name.replace("_", "-")
    if field.type == "bool":
        if value not in ("true", "false"):
            raise UserError(f"hyperparameter {given}", repr(value), wanted="true or false")
        return [f"--{flag}" if value == "true" else f"--no-{flag}"]
    if isinstance(field.default, tuple):
        return [f"--{flag}", *value.replace(",", " ").split()]
    return [f"--{flag}={value}"]


def _unknown(name: str, known: list[str]) -> UserError:
    nearest = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    return UserError(
        f"hyperparameter {name}",
        "the trainer has no such setting",
        wanted=f"some of {', '.join(known)}",
        remedy=nearest[0] if nearest else "",
    )
