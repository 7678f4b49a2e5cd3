"""Whole runs with the fused kernels, interpreted: kernels, U-Net and trainer together."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_interpreter import Call, child_process
from helpers_train import MemoryBatches, metrics_of, small_config, write_unet
from torch import Tensor

from train.trainer import Trainer, build_accelerator

STEPS = 4
KERNELS = {"fused_update": "on", "fused_norms": "on", "fused_geglu": "on"}
SETTINGS: dict[str, Any] = {
    "global_batch_size": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "max_grad_norm": 0.5,
    "ema_decay": 0.8,
    "ema_start_step": 1,
    "max_steps": STEPS,
    "checkpoint_every": 2,
    "keep_checkpoints": 9,
}
Found = dict[str, dict[str, Tensor]]


def train_up_to(folder: Path, until: int, settings: dict[str, Any]) -> Found:
    """What a run holds after `until` steps, and which switches it had on."""
    folder.mkdir(parents=True, exist_ok=True)
    unet = write_unet(folder / "unet.json", block_out_channels=[16, 32])  # interpreting is slow
    config = small_config(folder, **(SETTINGS | {"unet": unet} | settings))
    trainer = Trainer(config, MemoryBatches(), build_accelerator(config))
    wanted = {name for name in KERNELS if settings.get(name) == "on"}
    assert {name for name in KERNELS if getattr(trainer.model.plan, name)} == wanted
    before = {name: weight.clone() for name, weight in trainer.model.weights.tensors.items()}
    trainer.run(until)
    trainer.finish()
    trainer.close()
    model = trainer.model
    assert model.average is not None
    return {
        "before": before,
        "masters": dict(model.weights.tensors),
        "averages": dict(model.average.weights),
        "in module": {name: weight.float() for name, weight in model.weights.in_module.items()},
    }


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Call]:
    with child_process(interprets=True) as call:
        yield call


def change_of(found: Found) -> Tensor:
    """Of all weights, from the first step of the process on."""
    changes = [weight - found["before"][name] for name, weight in found["masters"].items()]
    return torch.cat([change.flatten() for change in changes])


def cosine(first: Tensor, second: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=0))


def assert_near(found: Found, expected: Found, tolerance: float) -> None:
    for kind in ("masters", "averages", "in module"):
        tensors = expected[kind]
        assert found[kind].keys() == tensors.keys()
        for name, tensor in tensors.items():
            error = (found[kind][name] - tensor).norm() / tensor.norm().clamp(min=1e-3)
            assert error <= tolerance, f"{kind} {name}: {error:.1e}"


@pytest.mark.parametrize(
    ("precision", "micro_batch_size", "tolerance"), [("no", 0, 2e-4), ("bf16-weights", 1, 0.02)]
)
def test_a_run_with_all_kernels_trains_as_one_without(
    tmp_path, interpreted, precision, micro_batch_size, tolerance
):
    settings = {"mixed_precision": precision, "micro_batch_size": micro_batch_size}
    plain = train_up_to(tmp_path / "plain", STEPS, settings)
    rebuilt = settings | KERNELS | {"batched_projections": "on"}
    fused = interpreted(train_up_to, tmp_path / "fused", STEPS, rebuilt)
    if precision == "no":
        assert_near(fused, plain, tolerance)
    # AdamW's first steps are as long for a gradient that is all rounding as for any other.
    assert cosine(change_of(fused), change_of(plain)) > (0.9999 if precision == "no" else 0.97)
    rows = zip(metrics_of(tmp_path / "fused/run"), metrics_of(tmp_path / "plain/run"), strict=True)
    for ours, expected in rows:
        for name in ("train/loss", "train/grad_norm"):
            assert ours[name] == pytest.approx(expected[name], rel=max(tolerance, 1e-4))
    if precision == "bf16-weights":
        for name, master in fused["masters"].items():
            assert torch.equal(fused["in module"][name], master.bfloat16().float()), name


def test_a_run_goes_on_with_the_kernels_where_it_stopped_without_and_back(tmp_path, interpreted):
    whole = train_up_to(tmp_path / "whole", STEPS, {})
    for first, second in ((False, True), (True, False)):
        folder = tmp_path / f"{first}-{second}"
        for until, fused in ((2, first), (STEPS, second)):
            call: Call = interpreted if fused else lambda function, *args: function(*args)
            found = call(train_up_to, folder, until, KERNELS if fused else {})
        assert_near(found, whole, 2e-4)
