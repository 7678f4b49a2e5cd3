"""What is searched: `learning_rate=1e-5:1e-2:log global_batch_size=16,32,64` as distributions."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from shards.errors import UserError
from train.config import TrainConfig

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution

Settings = Mapping[str, Any]
Space = dict[str, "BaseDistribution"]

_ANOTHER_LOSS = "changes what the validation loss measures: trials could not be compared"
_ANOTHER_DATA = "changes the held-out samples: trials could not be compared"
_OWN = "is what the sweep sets for each trial"
NOT_SEARCHABLE = {
    **dict.fromkeys(
        ("prediction_type", "min_snr_gamma", "zero_terminal_snr", "snr_shift"), _ANOTHER_LOSS
    ),
    **dict.fromkeys(
        ("data", "resolution", "image_column", "text_column", "validation_samples"), _ANOTHER_DATA
    ),
    **dict.fromkeys(("online", "follow"), _ANOTHER_DATA),
    **dict.fromkeys(("output_dir", "validation_every", "checkpoint_every"), _OWN),
}


def default_search(config: TrainConfig, max_steps: int) -> dict[str, str]:
    """Ranges that make sense around a preset, in the words of `--search`.

    The learning rate a decade to either side; half and twice the batch; a warm-up of up to a fifth
    of the run; the published recipes' 10% of dropped captions and its neighbours; where an average
    is kept, one over a fortieth to a fifth of the run: a longer one would not leave its beginning.

    Args:
        config: what is not searched.
        max_steps: length of a trial at the preset's batch.
    """
    rate, batch = config.learning_rate, config.global_batch_size
    ranges = {
        "learning_rate": f"{rate / 10:.3g}:{rate * 10:.3g}:log",
        "global_batch_size": f"{max(1, batch // 2)},{batch},{batch * 2}",
        "warmup_steps": f"0:{max(1, max_steps // 5)}",
        "caption_drop_prob": "0.05:0.2",
        "weight_decay": "0.001:0.1:log",
    }
    spans = [max_steps // part for part in (40, 20, 10, 5)]
    if config.ema_decay and config.ema_start_step < max_steps and spans[0] > 1:
        ranges["ema_decay"] = ",".join(f"{1 - 1 / span:.6g}" for span in spans)
    if batch == 1:
        ranges["global_batch_size"] = "1,2"
    return ranges


def parse_space(
    words: Iterable[str], config: TrainConfig, fixed: Iterable[str], max_steps: int
) -> Space:
    """The distributions to draw settings from.

    Args:
        words: of `--search`; none: those of `default_search` that are not fixed.
        config: what is not searched; each end of a range is tried in its place.
        fixed: names of settings that the command line fixes.
        max_steps: length of a trial at the preset's batch.

    Raises:
        UserError: a name is unknown, cannot be searched, or is fixed as well; a range or a choice
            is none.
    """
    defaults = default_search(config, max_steps)
    fixed = set(fixed)
    words = list(words) or [name for name in defaults if name not in fixed]
    space: Space = {}
    for word in words:
        name, has_range, text = word.partition("=")
        name = name.replace("-", "_")
        where = f"--search {word}"
        _refuse_name(where, name, fixed, space)
        if not has_range and name not in defaults:
            raise UserError(
                where,
                "no range, and this setting has no usual one",
                wanted=f"{name}=LOW:HIGH, {name}=LOW:HIGH:log or {name}=A,B,C; "
                f"usual ranges: {', '.join(defaults)}",
            )
        space[name] = _distribution(where, name, text if has_range else defaults[name])
        for value in ends(name, space[name]):
            _refuse_value(where, config, name, value)
    return space


def _refuse_name(where: str, name: str, fixed: set[str], space: Space) -> None:
    known = [field.name for field in fields(TrainConfig)]
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        remedy = f"--search {nearest[0]}=..." if nearest else "train/main.py --help has them all"
        raise UserError(where, f"the trainer has no setting {name!r}", remedy=remedy)
    if name in NOT_SEARCHABLE:
        raise UserError(where, f"{name} {NOT_SEARCHABLE[name]}")
    if name in fixed:
        flag = f"--{name.replace('_', '-')}"
        raise UserError(where, f"{flag} fixes it", wanted="one of the two")
    if name in space:
        raise UserError(where, f"{name} is there twice")


def _refuse_value(where: str, config: TrainConfig, name: str, value: Any) -> None:
    try:
        replace(config, **{name: value})
    except ValueError as error:
        raise UserError(where, f"{value} is not allowed: {error}") from None


def _distribution(where: str, name: str, text: str) -> BaseDistribution:
    kind = _kinds()[name]
    if ":" in text and _numeric(kind):
        return _range(where, kind, text)
    from optuna.distributions import CategoricalDistribution

    choices = [choice.strip() for choice in text.split(",")]
    values = [_value(where, kind, choice) for choice in choices]
    if len(values) < 2:
        raise UserError(
            where,
            "one value, nothing to search",
            wanted="LOW:HIGH or several with commas",
            remedy=f"--{name.replace('_', '-')} {text}, without --search, fixes it",
        )
    if len(set(values)) < len(values):
        raise UserError(where, "a value is there twice")
    return CategoricalDistribution(choices)


def _range(where: str, kind: Any, text: str) -> BaseDistribution:
    from optuna.distributions import FloatDistribution, IntDistribution

    low_text, high_text, *scale = text.split(":")
    if scale not in ([], ["log"]):
        raise UserError(where, f"{':'.join(scale)!r}", wanted="LOW:HIGH or LOW:HIGH:log")
    number = int if int in _alternatives(kind) else float
    low, high = (_value(where, number, end) for end in (low_text, high_text))
    if not low < high:
        raise UserError(where, f"{low_text} is not below {high_text}")
    if scale and low <= 0:
        raise UserError(where, f"{low_text} has no logarithm", wanted="a lower end above 0")
    if number is int:
        return IntDistribution(low, high, log=bool(scale))
    return FloatDistribution(low, high, log=bool(scale))


def ends(name: str, distribution: BaseDistribution) -> list[Any]:
    """Both ends of a range, or all choices, as the trainer's values."""
    choices = getattr(distribution, "choices", None)
    if choices is None:
        return [getattr(distribution, end) for end in ("low", "high")]
    return [value_of(name, choice) for choice in choices]


def suggest(trial: Trial, space: Space) -> dict[str, Any]:
    """Draw a trial's settings, or read those that it has already."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    settings: dict[str, Any] = {}
    for name, of in space.items():
        drawn: Any
        if isinstance(of, CategoricalDistribution):
            drawn = trial.suggest_categorical(name, of.choices)
        elif isinstance(of, IntDistribution):
            drawn = trial.suggest_int(name, of.low, of.high, log=of.log)
        else:
            assert isinstance(of, FloatDistribution)
            drawn = trial.suggest_float(name, of.low, of.high, log=of.log)
        settings[name] = value_of(name, drawn)
    return settings


# Settings as text ---------------------------------------------------------------------------------


def value_of(name: str, drawn: Any) -> Any:
    """What the study keeps of a setting as the trainer's value: choices are kept as text."""
    return _value(name, _kinds()[name], drawn) if isinstance(drawn, str) else drawn


def flags_of(settings: Settings) -> list[str]:
    """Settings as the trainer's flags."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, (tuple, list)):  # a list: read back from JSON
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}", str(value)]
    return words


def flag_names(words: Iterable[str]) -> list[str]:
    """Names of the settings that flags of the trainer fix; `--no-follow` fixes `follow`."""
    known = {field.name for field in fields(TrainConfig)}
    given = [word[2:].partition("=")[0].replace("-", "_") for word in words if word[:2] == "--"]
    return [name if name in known else name.removeprefix("no_") for name in given]


def _kinds() -> dict[str, Any]:
    return get_type_hints(TrainConfig)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _numeric(kind: Any) -> bool:
    return bool({int, float} & set(_alternatives(kind)))


def _value(where: str, kind: Any, text: str) -> Any:
    """A text as a value of a type that `TrainConfig` has.

    Raises:
        UserError: it is none.
    """
    for one in _alternatives(kind):
        try:
            return _converted(one, text)
        except ValueError:
            continue
    raise UserError(where, f"{text!r}", wanted=_described(kind))


def _converted(kind: Any, text: str) -> Any:
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError(text)
        return text
    if get_origin(kind) is tuple:
        parts, kinds = text.split("/"), get_args(kind)
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(parts)
        if len(parts) != len(kinds):
            raise ValueError(text)
        return tuple(map(_converted, kinds, parts))
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    value = kind(text)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(text)
    return value


def _described(kind: Any) -> str:
    if len(_alternatives(kind)) > 1:
        return " or ".join(map(_described, _alternatives(kind)))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return "/".join("..." if one is Ellipsis else _described(one) for one in get_args(kind))
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "a text")
