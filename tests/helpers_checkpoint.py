"""Snapshots for the tests of checkpoints, whole and in pieces, and a writer that tells all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from helpers_train import assert_same_bits
from torch import Tensor

from shards.storage import Location
from train.checkpoint import Checkpoint, Snapshot, checkpoint_path
from train.checkpoint_writer import CheckpointWriter

PARTS = ("unet", "unet_ema", "optimizer")


def snapshot_of(step: int = 100, **changes: Any) -> Snapshot:
    """A run whose every number is its step."""
    number = torch.full((3,), float(step))
    fields: dict[str, Any] = {
        "step": step,
        "state": {"config": {"seed": step}},
        "unet_config": {"_class_name": "UNet2DConditionModel"},
        "scheduler_config": {"beta_start": 0.1},
        "weights": {"weight": number},
        "average": {"weight": number.clone()},
        "optimizer": {"weight.exp_avg": number.clone()},
    }
    return Snapshot(**(fields | changes))


def odd_snapshot(step: int = 100) -> Snapshot:
    """Tensors of every kind: channels-last, few rows, one row, no dimension, odd numbers."""
    generator = torch.Generator().manual_seed(step)
    weights = {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator).to(
            memory_format=torch.channels_last
        ),
        "conv.bias": torch.tensor([torch.nan, -0.0, torch.inf, 1e-45, 1.0, 2.0, 3.0]),
        "few.weight": torch.randn(2, 5, generator=generator),
        "one": torch.randn(1, generator=generator),
    }
    moments = {
        f"{name}.{key}": torch.rand(weight.shape, generator=generator)
        for name, weight in weights.items()
        for key in ("exp_avg", "exp_avg_sq")
    }
    counters = {f"{name}.step": torch.tensor(float(step)) for name in weights}
    return snapshot_of(
        step,
        weights=weights,
        average={name: weight * 0.5 for name, weight in weights.items()},
        optimizer=moments | counters,
    )


def split(whole: Snapshot, num_processes: int, *, counters_in_all: bool = True) -> list[Snapshot]:
    """What each process holds of a run that `fully_shard` has cut up."""
    return [
        replace(
            whole,
            weights=_rows(whole.weights, process, num_processes),
            average=_rows(whole.average or {}, process, num_processes),
            optimizer=_rows(
                {
                    name: tensor
                    for name, tensor in whole.optimizer.items()
                    if tensor.ndim or counters_in_all or process == 0
                },
                process,
                num_processes,
            ),
            pieces={
                name: (_span(len(weight), process, num_processes)[0], list(weight.shape))
                for name, weight in whole.weights.items()
            },
            process=process,
            num_processes=num_processes,
        )
        for process in range(num_processes)
    ]


def _span(num_rows: int, process: int, num_processes: int) -> tuple[int, int]:
    size = -(-num_rows // num_processes)
    return min(process * size, num_rows), min((process + 1) * size, num_rows)


def _rows(tensors: dict[str, Tensor], process: int, num_processes: int) -> dict[str, Tensor]:
    return {
        name: tensor[slice(*_span(len(tensor), process, num_processes))] if tensor.ndim else tensor
        for name, tensor in tensors.items()
    }


class Told(list[str]):
    """What a writer has said."""

    def writer(
        self, run: Location, *, keep: int = 2, keep_every: int = 0, in_background: bool = False
    ) -> CheckpointWriter:
        return CheckpointWriter(
            run, keep=keep, keep_every=keep_every, in_background=in_background, say=self.append
        )


def save(run: Location, snapshot: Snapshot, **options: Any) -> Checkpoint:
    """Write a checkpoint that nothing keeps from being written."""
    told = Told()
    writer = told.writer(run, **options)
    writer.save(snapshot)
    writer.wait(final=True)
    assert told == []
    return Checkpoint(checkpoint_path(run, snapshot.step))


def save_pieces(run: Location, snapshots: list[Snapshot], **options: Any) -> Checkpoint:
    """Write a sharded checkpoint: process 0, who makes it count, after the others."""
    told = Told()
    writers = [told.writer(run, **options) for _ in snapshots]
    writers[0].prepare(snapshots[0].step)
    for writer, snapshot in reversed(list(zip(writers, snapshots, strict=True))):
        writer.save(snapshot)
        writer.wait(final=True)
    assert told == []
    return Checkpoint(checkpoint_path(run, snapshots[0].step))


def steps_of(checkpoints: list[Checkpoint]) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoints]


def assert_holds(checkpoint: Checkpoint, snapshot: Snapshot) -> None:
    """All of it came back to the bit."""
    for part, tensors in snapshot.parts.items():
        assert_same_bits(
            checkpoint.tensors(part), {name: t.contiguous() for name, t in tensors.items()}
        )
    assert checkpoint.read_state() == {**snapshot.state, "step": snapshot.step}
    checkpoint.verify()
