"""Bytes that an update of the weights reads and writes for each parameter."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import nn

from benchmarks.train_step.traffic_operators import OperatorTraffic
from train.config import TrainConfig
from train.fused.adamw import bytes_per_parameter
from train.master_weights import MasterWeights
from train.precision import resolve_precision
from train.update import Update

_WIDTH = 1000  # of a square layer: large enough for the bytes of scalars to vanish
_FUSED_KERNEL = "latentmill::update_chunks"


def update_bytes_per_parameter(*, low_weights: bool, fused: bool) -> dict[str, int]:
    """Bytes per parameter of clipping, AdamW and the average, with those of the weights' copy.

    Counted from the operators that `train.update` dispatches on a CPU; what the fused kernel reads
    and writes is its own account.

    Args:
        low_weights: bfloat16 weights with float32 masters; else float32 weights.
        fused: by our kernel; else by torch's, one after the other.

    Returns:
        by operator.
    """
    dtype = torch.bfloat16 if low_weights else torch.float32
    module = nn.Linear(_WIDTH, _WIDTH, bias=False)
    weights = MasterWeights(module, dtype)
    counter = OperatorTraffic()
    if fused:
        _leave_gradients(module)
        with counter:
            weights.norm_of(weights.collect_gradients(accumulated=False, in_float32=False))
    else:
        update = _update_past_its_start(module, weights, low_weights=low_weights)
        _leave_gradients(module)
        with counter:
            update.apply(1, torch.zeros(()), accumulated=False)
    per_parameter = {name: round(n / _WIDTH**2) for name, n in counter.num_bytes.items()}
    found = Counter({name: n for name, n in per_parameter.items() if n})
    if fused:
        found[_FUSED_KERNEL] = bytes_per_parameter(dtype, dtype if low_weights else None, True)
    return dict(found)


def _update_past_its_start(
    module: nn.Module, weights: MasterWeights, *, low_weights: bool
) -> Update:
    """After the first step the optimizer has its state, and the average has started."""
    config = replace(TrainConfig(), ema_decay=0.9999, ema_start_step=0, max_grad_norm=1.0)
    device = torch.device("cpu")
    precision = resolve_precision("bf16-weights" if low_weights else "bf16", device)
    update = Update(config, weights, precision, device)
    _leave_gradients(module)
    update.apply(0, torch.zeros(()), accumulated=False)
    return update


def _leave_gradients(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
