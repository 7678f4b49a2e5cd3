"""What training consumes: latent batches, and the sources that they come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, kw_only=True)
class LatentBatch:
    """One rank's rows of one step's global batch.

    Args:
        step: the step that the batch belongs to; -1: none, held-out samples.
        samples: [B] int64, each sample's number in the dataset.
        moments: [B, 2C, h, w], mean and log-variance, or [B, C, h, w], the mean alone;
            **unscaled**.
        states: [B, T, D], the caption's `encoder_hidden_states`; None where the dataset has token
            ids alone.
        input_ids: [B, T] uint16, only where the dataset has token ids alone.

    Moments and states are float16 arrays or `Quantized` from the reader of latent shards, and
    torch tensors that already are on the device from an encoder that runs along.
    """

    step: int
    samples: np.ndarray
    moments: Any
    states: Any
    input_ids: np.ndarray | None = None


class BatchSource(Protocol):
    """Where batches come from; online and offline training differ by this one argument.

    Attributes:
        latent_shape: [C, h, w] of one sample.
        scaling_factor: of the VAE.
        identity: what the sequence of samples depends on; a resumed run must find the same.
    """

    latent_shape: tuple[int, int, int]
    scaling_factor: float
    identity: str

    @property
    def null_states(self) -> np.ndarray:
        """[T, D], the states of the empty caption."""
        ...

    def epoch_at(self, step: int) -> float:
        """Epochs completed when `step` steps are done."""
        ...

    def keys_of(self, samples: np.ndarray) -> list[str]:
        """Who they are: `<shard>/<key>` of samples given by `LatentBatch.samples`."""
        ...

    def iter_batches(self, first_step: int, positions: range) -> Iterator[LatentBatch]:
        """Batches of `first_step`, `first_step + 1`, … without end.

        Args:
            first_step: where to begin; nothing before it is read.
            positions: the rank's positions of each global batch.
        """
        ...
