"""Cached and online training on the same draws: one loop, one U-Net, two sources of batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_train import reader_of, small_config, write_unet

from precompute.online import OnlineBatches, open_online
from precompute.online_encoders import online_columns
from shards.batch import LatentBatch
from shards.order import choose_partitions
from train.config import TrainConfig
from train.metrics import read_metrics
from train.trainer import train

NUM_STEPS = 200
TOLERANCE = 1e-4


class StoredInFloat16:
    """An online source whose numbers have gone through what stage 1 stores them in."""

    def __init__(self, online: OnlineBatches) -> None:
        self._online = online
        self.null_states = online.null_states.astype(np.float16)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._online, name)

    def iter_batches(self, first_step: int, positions: range) -> Iterator[LatentBatch]:
        for batch in self._online.iter_batches(first_step, positions):
            yield replace(batch, moments=batch.moments.half(), states=batch.states.half())


def open_source(config: TrainConfig, model: Path) -> OnlineBatches:
    device = torch.device("cpu")
    return open_online(
        config.online,
        *online_columns(str(model), config.resolution, device),
        device=device,
        num_workers=2,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        num_partitions=choose_partitions(config.global_batch_size),
        window=config.shuffle_window,
    )


@pytest.fixture(scope="module")
def losses(
    tmp_path_factory: pytest.TempPathFactory,
    model_folder: Path,
    image_shards: Path,
    latent_dataset: Path,
) -> dict[str, np.ndarray]:
    """The loss of every step: `cached`, `online`, and `rounded` (online through float16)."""
    folder = tmp_path_factory.mktemp("runs")
    config = small_config(
        folder,
        unet=write_unet(
            folder / "unet.json",
            cross_attention_dim=128,
            block_out_channels=[32],
            down_block_types=["CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D"],
        ),
        data=str(latent_dataset),
        online=str(image_shards),
        resolution=32,
        global_batch_size=4,
        max_steps=NUM_STEPS,
        checkpoint_every=10 * NUM_STEPS,
        learning_rate=1e-4,  # the presets' for Stable Diffusion
        mixed_precision="no",
    )
    online = open_source(config, model_folder)
    sources = {"cached": reader_of(config), "online": online, "rounded": StoredInFloat16(online)}
    losses = {}
    for name, source in sources.items():
        run = folder / name
        train(replace(config, output_dir=str(run)), source)  # type: ignore[arg-type]
        losses[name] = np.array([row["train/loss"] for row in read_metrics(run / "metrics.jsonl")])
    return losses


def difference(losses: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Of each step's loss from that of the cached run, relative."""
    return np.abs(losses[name] / losses["cached"] - 1)


def test_the_loss_of_each_step_is_that_of_the_cached_run(losses):
    assert len(losses["cached"]) == len(losses["online"]) == NUM_STEPS
    assert losses["cached"][-20:].mean() < 0.8 * losses["cached"][:20].mean()  # it trains
    assert difference(losses, "online").max() < TOLERANCE
    assert difference(losses, "online").max() > 0  # two sources, not one twice


def test_what_differs_is_the_rounding_of_what_is_stored(losses):
    assert difference(losses, "rounded").max() < difference(losses, "online").max() / 20
