"""The samples that every arm reads: a function of their number, so anyone can check any of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

# What Stable Diffusion 2 at 512 pixels trains on: VAE moments and text encoder states, float16.
SHAPES = {"moments": (8, 64, 64), "states": (77, 1024)}
SAMPLE_BYTES = {name: 2 * int(np.prod(shape)) for name, shape in SHAPES.items()}

Sample = Mapping[str, np.ndarray]
Batch = dict[str, np.ndarray]  # the arrays [B, ...] float16, and their numbers: "sample" [B] int64

_FINITE = np.uint16(0x3FFF)  # these bits of a float16 are a number in [0, 2)


def draw_sample(number: int) -> dict[str, np.ndarray]:
    """Sample `number` as arrays of `SHAPES`, float16, incompressible.

    From raw generator bits, which are the same in every release of numpy: the environments that
    write and check have different ones.
    """
    words = np.random.Philox(key=number).random_raw(sum(SAMPLE_BYTES.values()) // 8)
    values = (words.view(np.uint16) & _FINITE).view(np.float16)
    length = SAMPLE_BYTES["moments"] // 2
    flat = {"moments": values[:length], "states": values[length:]}
    return {name: flat[name].reshape(shape) for name, shape in SHAPES.items()}


def stack(samples: Sequence[Sample]) -> Batch:
    """Samples with their `sample` numbers as one batch: every array is copied, once."""
    batch = {name: np.stack([sample[name] for sample in samples]) for name in SHAPES}
    return {"sample": np.array([sample["sample"] for sample in samples], np.int64), **batch}


def digest(sample: Sample) -> str:
    """Hash of a sample's bytes, over those arrays that it has."""
    state = hashlib.sha256()
    for name in SHAPES:
        if name in sample:
            state.update(np.ascontiguousarray(sample[name]).data)
    return state.hexdigest()[:16]
