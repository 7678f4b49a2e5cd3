"""All that makes a worker of stage 1. Without torch: a job with nothing to do ends at once."""

from __future__ import annotations

import os
from dataclasses import dataclass

from precompute.model_folder import ModelFolder
from shards.column import ColumnSpec

# While one encodes, the next decodes, and the one before is written.
SHARDS_IN_HAND = 3


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """All that makes a worker; it travels to other processes and machines.

    Args:
        dataset: folder or URL.
        model: name or path of the model, as `ModelFolder` has them.
        columns: that the job writes.
        device: `cpu`, `cuda:1`, …
        dtype: precision of the encoders.
        wanted: the filter's expression.
        caption_field: see `ShardStream`.
        batch_size: images per call of the VAE.
        decode_workers: threads that decode.
        compiled: whether the encoders are compiled.
    """

    dataset: str
    model: ModelFolder
    columns: list[ColumnSpec]
    device: str
    dtype: str
    wanted: str
    caption_field: str
    batch_size: int
    decode_workers: int
    compiled: bool

    @property
    def decode_ahead(self) -> int:
        """Samples of a shard that are decoded before they are asked for."""
        return 2 * self.batch_size + self.decode_workers


@dataclass(frozen=True)
class ShardDone:
    """What a worker says of a shard that it has written: its samples, and busy seconds by stage."""

    num_samples: int
    seconds: dict[str, float]


def default_decode_workers(num_workers: int) -> int:
    """One thread for each CPU, over all workers of this machine."""
    return max(1, (os.cpu_count() or 1) // num_workers)
