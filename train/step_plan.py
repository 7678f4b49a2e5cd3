"""Which of the switches that make a step fast are on here, and why the others are not.

None of them changes what is trained, but for rounding; so a run may go on with other ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from train.compilation import compile_failure
from train.config import TrainConfig
from train.fused.triton_runtime import missing
from train.precision import Precision
from train.tuned import read_tuned

Mode = Literal["off", "regional", "full"]

_KERNELS: dict[str, Literal["update", "norms", "geglu"]] = {
    "fused_update": "update",
    "fused_norms": "norms",
    "fused_geglu": "geglu",
}
SWITCHES = ("channels_last", *_KERNELS, "batched_projections", "conv_search", "cuda_graph")


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What is on; the fields are those of `TrainConfig`.

    Attributes:
        notes: a line for each switch that is off though nobody asked for that, for the log.
    """

    compile: Mode
    channels_last: bool
    fused_update: bool
    fused_norms: bool
    fused_geglu: bool
    batched_projections: bool
    conv_search: bool
    cuda_graph: bool
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As the log has it: `channels_last, fused_update`."""
        return ", ".join(name for name in SWITCHES if getattr(self, name)) or "none"


def plan_step(
    config: TrainConfig, precision: Precision, device: torch.device, num_processes: int
) -> StepPlan:
    """Resolve every `auto`, and turn off what cannot run here.

    `auto` is the fastest that is known: all of it, but for what the ladder of the training step
    found to cost time on such a device (`train.tuned`). A kernel counts as one that runs only once
    it has agreed with torch on this very device, on random input (`train.fused.self_check`).

    Args:
        config: the switches.
        precision: of the run; kernels are tried in it.
        device: of this process.
        num_processes: of the run.
    """
    mode, reason = resolve_compile(config, device)
    resolver = _Resolver(config, precision, device, num_processes, mode)
    switches = {name: resolver.is_on(name) for name in SWITCHES}
    notes = [*([f"compile off: {reason}"] if reason else []), *resolver.notes]
    return StepPlan(compile=mode, **switches, notes=tuple(notes))


def agreed(plans: Sequence[StepPlan]) -> StepPlan:
    """What all processes can have: they must compute alike, on whatever machine each is.

    Args:
        plans: of all processes, this one's first.
    """
    own, modes = plans[0], ("off", "regional", "full")
    common = {name: all(getattr(plan, name) for plan in plans) for name in SWITCHES}
    mode: Mode = min((plan.compile for plan in plans), key=modes.index)
    lost = [name for name in SWITCHES if getattr(own, name) and not common[name]]
    lost += ["compile"] if own.compile != mode else []
    notes = [f"{name} off: it is on another process" for name in lost]
    return StepPlan(compile=mode, **common, notes=(*own.notes, *notes))


def resolve_compile(config: TrainConfig, device: torch.device) -> tuple[Mode, str | None]:
    """What `--compile` comes to on a device, and why it is off though a GPU might have it."""
    if config.compile != "auto":
        return config.compile, None
    if device.type != "cuda":
        return "off", None
    reason = read_tuned(config, device).get("compile") or missing(device)
    if reason := reason or compile_failure(device):
        return "off", reason
    return "regional" if config.sharding != "off" else "full", None


class _Resolver:
    def __init__(
        self,
        config: TrainConfig,
        precision: Precision,
        device: torch.device,
        num_processes: int,
        mode: Mode,
    ) -> None:
        self._config, self._precision, self._device = config, precision, device
        self._num_processes, self._mode = num_processes, mode
        self._is_sharded = config.sharding != "off"
        self._tuned = read_tuned(config, device)
        self.notes: list[str] = []

    def is_on(self, name: str) -> bool:
        choice = getattr(self._config, name)
        if choice == "off":
            return False
        is_wanted = choice == "on" or self._device.type == "cuda" or name == "channels_last"
        if not is_wanted:
            return False
        reason = self._drawback(name) if choice == "auto" else None
        if reason := reason or self._obstacle(name):
            self.notes.append(f"{name} off: {reason}")
        return not reason

    def _drawback(self, name: str) -> str | None:
        """Why a switch is better left off here."""
        if name == "batched_projections" and self._mode == "regional":
            return "with it each block would be compiled for itself; --compile full is one graph"
        return self._tuned.get(name)

    def _obstacle(self, name: str) -> str | None:
        """Why a switch cannot be on here."""
        if name == "batched_projections" and self._is_sharded:
            return "--sharding zero2 splits weights along their first dimension"
        if name in _KERNELS:
            return missing(self._device) or self._disagreement(name)
        if name in ("conv_search", "cuda_graph") and self._device.type != "cuda":
            return "no CUDA device"
        if name == "cuda_graph" and self._num_processes > 1:
            return "it records one process's step, without what the others add to it"
        return None

    def _disagreement(self, name: str) -> str | None:
        from train.fused.self_check import failure_of

        return failure_of(_KERNELS[name], self._device, self._precision.dtype)
