"""Small runs to generate from: a U-Net that fits `model_folder`, and pictures to compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_train import flags, run_on_memory, small_config, write_unet

from train.main import main


def untrained_run(folder: Path) -> Path:
    """A run of one step on random numbers: it has no dataset."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("helpers_train.DIM", 128)
        unet = write_unet(folder / "unet.json")
        data = str(folder / "no-dataset")
        run_on_memory(small_config(folder, unet=unet, max_steps=1, data=data))
    return folder / "run"


def run_on_dataset(folder: Path, data: Path, **changes: Any) -> Path:
    """A run of the command on `latent_dataset`, with an average and 3 samples held out."""
    unet = write_unet(folder / "unet.json", cross_attention_dim=128)
    settings: dict[str, Any] = {"data": data, "output_dir": folder / "run", "unet": unet}
    settings |= {"resolution": 32, "global_batch_size": 4, "max_steps": 2, "ema_decay": 0.5}
    settings |= {"num_samples": 0, "validation_samples": 3, "learning_rate": 0.01}
    main(["tiny", *flags(**(settings | changes))])
    return folder / "run"


def difference(first: np.ndarray, second: np.ndarray) -> int:
    """The largest between two pictures, in levels of 256."""
    return int(np.abs(first.astype(int) - second.astype(int)).max())


def wait_for(condition: Callable[[], bool], timeout_sec: float = 120.0) -> None:
    """Poll what another process does; fails when it never comes."""
    import time

    deadline = time.monotonic() + timeout_sec
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.005)
