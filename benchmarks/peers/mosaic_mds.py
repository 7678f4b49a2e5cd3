"""mosaicml-streaming: MDS shards with columns of fixed shape."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from .samples import SAMPLE_BYTES, SHAPES, Batch, Sample, stack

# The library's vision data sets import torchvision, whose wheels on the package index are built for
# CUDA and fail beside a torch for CPUs. Nothing of them is used here.
sys.modules["streaming.vision"] = ModuleType("streaming.vision")

DISTRIBUTION = "mosaicml-streaming"
SETTINGS: dict[str, Any] = {
    "shuffle": True,
    "shuffle_algo": "py1e",  # as fast as py1s and py1br, and mixes best
    "num_canonical_nodes": 1,
}
_SLACK_BYTES = 64  # of a shard's index for one sample, and more


def write(samples: Iterable[Sample], folder: Path, samples_per_shard: int) -> None:
    """Write the samples, numbered from 0, as this peer's shards."""
    from streaming import MDSWriter

    columns = {"sample": "int"}
    for name, shape in SHAPES.items():
        columns[name] = "ndarray:float16:" + ",".join(map(str, shape))
    limit = (samples_per_shard + 1) * (sum(SAMPLE_BYTES.values()) + _SLACK_BYTES)
    with MDSWriter(out=str(folder), columns=columns, size_limit=limit) as writer:
        for number, sample in enumerate(samples):
            writer.write({"sample": number, **sample})


def build_loader(folder: Path, batch_size: int) -> Iterable[Batch]:
    """Shuffled batches of one epoch, another one each time it is iterated.

    A killed process leaves shared memory behind that bars its folder; a benchmark's folder is new
    every time. (The library's own remedy would also take it from other people's running jobs.)
    """
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    dataset = StreamingDataset(local=str(folder), batch_size=batch_size, **SETTINGS)
    loader: Iterable[Batch] = DataLoader(dataset, batch_size, collate_fn=stack)
    return loader
