"""The samples of the loader benchmark as a latent dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.peers.samples import SHAPES, draw_sample
from benchmarks.synthetic_latents import Rows, SyntheticLatents, columns_of_shape
from shards.dataset import Dataset

_CHANNELS, _SIZE = SHAPES["moments"][0] // 2, SHAPES["moments"][-1]
_NUM_TOKENS, _DIM = SHAPES["states"]
IMAGE, TEXT = columns_of_shape((_CHANNELS, _SIZE, _SIZE), (_NUM_TOKENS, _DIM))


def write_latent_dataset(path: Path, num_samples: int, num_shards: int) -> Dataset:
    """Samples 0, 1, … in the order of shards and rows; every caption is another one."""
    null = {
        "input_ids": np.zeros(_NUM_TOKENS, np.uint16),
        "states": np.zeros((_NUM_TOKENS, _DIM), np.float16),
    }
    SyntheticLatents(path, IMAGE, TEXT).write(num_samples, num_shards, _draw, null)
    return Dataset(path)


def _draw(numbers: range) -> Rows:
    samples = [draw_sample(number) for number in numbers]
    moments, states = (np.stack([sample[name] for sample in samples]) for name in SHAPES)
    input_ids = np.zeros((len(samples), _NUM_TOKENS), np.uint16)
    texts = {"input_ids": input_ids, "states": states}
    return Rows(moments=moments, texts=texts, latent_std=1.0)  # never trained on
