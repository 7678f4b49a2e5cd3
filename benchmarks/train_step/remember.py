"""What a ladder found, kept for the runs to come on such a device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.result import spread
from benchmarks.train_step.case import SWITCHES, Case
from benchmarks.train_step.ladder_row import RungRow
from train.tuned import read_tuned, write_tuned

_NOWHERE = Path("nowhere")


def remember(rows: Sequence[RungRow], standing: Case, device: torch.device) -> Path | None:
    """Keep which switches did not pay; what this ladder did not try stays as it was found before.

    Args:
        rows: of the ladder.
        standing: what it stood on at the end.
        device: that it ran on; only of a GPU is anything kept.

    Returns:
        where; None where nothing is kept, or can be.
    """
    if device.type != "cuda":
        return None
    config = standing.train_config(_NOWHERE, _NOWHERE, 1)
    off = read_tuned(config, device)
    for name in (*SWITCHES, "compile"):
        if name == "conv_search" and _is_unmeasured(name, rows):
            continue  # the base has it on untried, and a failure is that of the process without it
        if reason := _why_off(name, rows):
            off[name] = reason
        if getattr(standing, name) != "off":
            off.pop(name, None)
    try:
        return write_tuned(config, device, off)
    except (OSError, RuntimeError) as error:  # there is no home, or it is not ours
        print(f"nothing is kept for later runs: {error}")
        return None


def _is_unmeasured(name: str, rows: Sequence[RungRow]) -> bool:
    return any(row.switch == name and not row.is_measured for row in rows)


def _why_off(name: str, rows: Sequence[RungRow]) -> str:
    """What became of the rung that turned a switch on; nothing where it was not tried."""
    for row in rows:
        if row.switch == name and row.is_failure:
            return f"failed in the ladder: {row.reason}"
        if row.switch == name and row.is_measured:
            return f"{row.verdict} in the ladder, {spread(row.ratios)['median']:.3f}x"
    return ""
