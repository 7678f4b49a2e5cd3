"""Which cases of the training step are tried, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from benchmarks.train_step.case import Case, Loop

if TYPE_CHECKING:
    from benchmarks.train_step.train_step import TrainStepConfig

Family = Literal["latentmill", "diffusers"]
T = TypeVar("T")

_VARIANTS: tuple[Loop, ...] = ("diffusers", "diffusers+channels-last", "diffusers+xformers")
# The settings that the others are varied around; where one is not listed, the first that is.
_BASE = {"attention": "auto", "precision": "bf16-weights", "compile": "off", "ema": "on"}


def family(loop: Loop) -> Family:
    """Whose loop it is."""
    return "latentmill" if loop == "latentmill" else "diffusers"


def iter_cases(config: TrainStepConfig, largest_that_ran: Callable[[Case], int]) -> Iterator[Case]:
    """Every case of a sweep; which come later depends on which micro-batches have run by then.

    What compiles comes last: it takes longest.

    Args:
        config: of the sweep.
        largest_that_ran: micro-batch among the rows so far that are else like this case.
    """
    for name in config.presets:
        if config.product:
            yield from sorted(_product(config, name), key=lambda case: case.compile != "off")
            continue
        for micro_batch in _micro_batches(config):
            base = _base(config, name, micro_batch)
            if "latentmill" in config.loops:
                yield from (base, *_changed(config, base, "ema"))
            if "diffusers" in config.loops:
                yield _plain(base)
        if "diffusers" in config.loops:
            largest = largest_that_ran(_plain(base))
            yield from _baselines(config, replace(base, micro_batch=largest))
        if "latentmill" in config.loops:
            base = replace(base, micro_batch=largest_that_ran(base))
            for axis in ("attention", "precision", "compile"):
                yield from _changed(config, base, axis)


def count_cases(config: TrainStepConfig) -> int:
    """How many rows a sweep has, if none is left out."""
    return sum(1 for _ in iter_cases(config, lambda case: case.micro_batch))


def _base(config: TrainStepConfig, name: str, micro_batch: int) -> Case:
    chosen: dict[str, Any] = {
        axis: wanted if wanted in _listed(config, axis) else _listed(config, axis)[0]
        for axis, wanted in _BASE.items()
    }
    return Case(preset=name, loop="latentmill", micro_batch=micro_batch, **chosen)


def _changed(config: TrainStepConfig, base: Case, axis: str) -> list[Case]:
    """The base with each other value of one setting."""
    changes: list[dict[str, Any]] = [{axis: value} for value in _listed(config, axis)]
    return [case for change in changes if (case := replace(base, **change)) != base]


def _product(config: TrainStepConfig, name: str) -> Iterator[Case]:
    ours = [
        replace(_base(config, name, micro_batch), **dict(zip(_BASE, values, strict=True)))
        for values in product(*(_listed(config, axis) for axis in _BASE))
        for micro_batch in _micro_batches(config)
    ]
    if "latentmill" in config.loops:
        yield from ours
    if "diffusers" in config.loops:
        yield from _distinct(_plain(case, loop) for loop in _VARIANTS for case in ours)


# The plain loop -----------------------------------------------------------------------------------


def _baselines(config: TrainStepConfig, base: Case) -> list[Case]:
    """What else the plain loop is tried with, so that it gets its best settings too."""
    precisions = [_plain(case) for case in _changed(config, base, "precision")]
    variants = [_plain(base, loop) for loop in _VARIANTS[1:]]
    return [case for case in _distinct([*precisions, *variants]) if case != _plain(base)]


def _plain(case: Case, loop: Loop = "diffusers") -> Case:
    """What the plain loop has instead of a case of ours: no kernel of its choice, no compiler.

    Its weights are float32: under autocast where ours may be bfloat16 themselves.
    """
    return replace(
        case,
        loop=loop,
        attention="xformers" if loop == "diffusers+xformers" else "sdpa",
        precision="bf16" if case.precision == "bf16-weights" else case.precision,
        compile="off",
    )


def _micro_batches(config: TrainStepConfig) -> list[int]:
    return sorted(set(config.micro_batches))


def _listed(config: TrainStepConfig, axis: str) -> tuple[Any, ...]:
    return _distinct(getattr(config, f"{axis}s"))


def _distinct(values: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(values))
