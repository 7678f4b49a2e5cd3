"""The rungs of the ladder: one switch of the trainer each, kernels before the compiler.

In this order few graphs are compiled: of a large U-Net each takes a minute or more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.train_step.case import ALL_OFF, Case, Loop, Toggle
from train.config import Precision

MIN_CHECK_STEPS = 20  # a whole window of losses, and an update that is recomputed
PLAIN_LOOPS: tuple[Loop, ...] = ("diffusers", "diffusers+channels-last", "diffusers+xformers")


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A change of the case that stands when it is reached.

    Args:
        name: of its row.
        changes: of `Case`.
        importance: where time is short, the rungs with the least are left out.
        is_ablation: it is measured; none stands on it.
        switch: of the trainer that it is about; empty where it is about none.
        is_apart: the base has its switch on, and what stands is compared with the same without, in
            a process of its own.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    importance: int
    is_ablation: bool = False
    switch: str = ""
    is_apart: bool = False

    def on(self, case: Case) -> Case:
        """The case with the change."""
        return replace(case, **self.changes)

    def compiles(self, case: Case) -> bool:
        """Whether a graph is compiled for it that no rung before has had compiled."""
        anew = {"compile", "micro_batch"} & self.changes.keys()
        return (bool(anew) or self.is_apart) and self.on(case).compile != "off"


def _switch(name: str, importance: int = 7, **along: Any) -> Rung:
    changes = {name: "on", **along}
    return Rung(name=name.replace("_", "-"), changes=changes, importance=importance, switch=name)


_RUNGS = (
    Rung(name="bf16-weights", changes={"precision": "bf16-weights"}, importance=8),
    _switch("fused_update"),
    _switch("channels_last"),
    Rung(name="attention", changes={"attention": "auto"}, importance=7),
    # Channels-last by itself may not pay, for want of a group norm that keeps it.
    _switch("fused_norms", channels_last="on"),
    _switch("fused_geglu"),
    _switch("batched_projections"),
    replace(_switch("conv_search", importance=6), is_apart=True),
    Rung(
        name="compile",
        changes={"compile": "full", "channels_last": "on"},
        importance=9,
        switch="compile",
    ),
    Rung(
        name="compile-without-kernels",
        changes={
            "compile": "full",
            "channels_last": "on",
            "fused_norms": "off",
            "fused_geglu": "off",
        },
        importance=3,
        is_ablation=True,
    ),
    _switch("cuda_graph", importance=8),
)
RUNG_NAMES = tuple(rung.name for rung in _RUNGS if not rung.is_ablation)


def list_rungs(micro_batches: Sequence[int], stand_on: Sequence[str]) -> list[Rung]:
    """What is tried on top of the base, in this order.

    Args:
        micro_batches: the smallest is the base's; the others are the last rungs.
        stand_on: names of rungs that are part of the base.
    """
    larger = [
        Rung(name=f"batch-{size}", changes={"micro_batch": size}, importance=4)
        for size in sorted(set(micro_batches))[1:]
    ]
    return [*(rung for rung in _RUNGS if rung.name not in stand_on), *larger]


def base_case(
    preset: str,
    micro_batches: Sequence[int],
    precision: Precision,
    stand_on: Sequence[str],
    conv_search: Toggle,
) -> Case:
    """Our trainer with everything off that can be, but for what it is to stand on and the search.

    cuDNN keeps the first plan that it ran for a shape until the process ends. A rung that turned
    the search on after others would find their plans, and look as if a search changed nothing.
    """
    case = Case(
        preset=preset,
        loop="latentmill",
        micro_batch=min(micro_batches),
        attention="sdpa",
        precision=precision,
        compile="off",
        ema="on",
        **{**ALL_OFF, "conv_search": conv_search},
    )
    for rung in _RUNGS:
        if rung.name in stand_on:
            case = rung.on(case)
    return case


def plain_case(base: Case, loop: Loop, micro_batch: int) -> Case:
    """A variant of the plain diffusers loop, under autocast where the base is."""
    return replace(
        base,
        loop=loop,
        micro_batch=micro_batch,
        attention="xformers" if loop == "diffusers+xformers" else "sdpa",
        precision="bf16" if base.precision == "bf16-weights" else base.precision,
        compile="off",
        **ALL_OFF,
    )
