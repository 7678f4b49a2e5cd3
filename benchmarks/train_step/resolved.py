"""What the trainer's switches come to on this device, before anything is built."""

from __future__ import annotations

from pathlib import Path

from accelerate import PartialState

from benchmarks.train_step.case import SWITCHES, Case, Toggle
from benchmarks.train_step.rungs import Rung
from train.config import Precision
from train.precision import resolve_precision
from train.step_plan import StepPlan, plan_step

_NOWHERE = Path("nowhere")


def base_precision() -> Precision:
    """What a plain step computes in: autocast on a GPU that has bfloat16, else float32."""
    resolved = resolve_precision("auto", PartialState().device)
    return "bf16" if resolved.name == "bf16-weights" else "no"


def base_conv_search() -> Toggle:
    """Whether the base has cuDNN search: wherever there is one."""
    return "on" if PartialState().device.type == "cuda" else "off"


def obstacle(rung: Rung, case: Case) -> str:
    """Why a rung cannot be on here; empty if it can.

    Args:
        rung: what is to be turned on.
        case: with it.
    """
    if rung.changes.get("attention") == "auto" and PartialState().device.type != "cuda":
        return "attention off: measured on a GPU alone, elsewhere torch chooses"
    plan = _plan(case)
    for name, value in rung.changes.items():
        if value == "on" and not getattr(plan, name):
            return next((note for note in plan.notes if note.startswith(name)), f"{name} off")
    return ""


def recommended_flags(case: Case) -> list[str]:
    """Flags of train/main.py with which it runs a case here; its defaults need none.

    Args:
        case: what was found to be the fastest.
    """
    default = Case(
        preset=case.preset,
        loop=case.loop,
        micro_batch=case.micro_batch,
        attention="auto",
        precision="auto",
        compile="auto",
        ema=case.ema,
    )
    device = PartialState().device
    own, wanted = _plan(default), _plan(case)
    flags = ["--micro-batch-size", str(case.micro_batch)]
    if resolve_precision("auto", device).name != resolve_precision(case.precision, device).name:
        flags += ["--mixed-precision", case.precision]
    if case.attention != "auto" and device.type == "cuda":
        flags += ["--attention", case.attention]
    if own.compile != wanted.compile:
        flags += ["--compile", wanted.compile]
    for name in SWITCHES:
        if getattr(own, name) != getattr(wanted, name):
            value = "on" if getattr(wanted, name) else "off"
            flags += [f"--{name.replace('_', '-')}", value]
    return flags


def _plan(case: Case) -> StepPlan:
    device = PartialState().device
    precision = resolve_precision(case.precision, device)
    return plan_step(case.train_config(_NOWHERE, _NOWHERE, 1), precision, device, 1)
