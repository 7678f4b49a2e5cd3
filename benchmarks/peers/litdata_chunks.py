"""litdata: chunks of torch tensors, mapped into memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .samples import Batch, Sample

DISTRIBUTION = "litdata"
SETTINGS: dict[str, Any] = {
    "shuffle": True,
    # The whole chunk; the default mixes 256 neighbours. Chunks are never mixed with each other, so
    # a chunk is as large as our window (3.7 GB; its offsets have 32 bits). As fast as small ones.
    "item_shuffle_window": "full",
    "chunk_size": 16_384,
    # One item at a time: by default 16 neighbours are decoded for each, 20 times as slow.
    "batch_decode": 0,
}


def write(samples: Iterable[Sample], folder: Path, samples_per_shard: int) -> None:
    """Write the samples, numbered from 0, as this peer's shards.

    As tensors: they are delivered as views of the map, numpy arrays are copied once more.
    """
    import torch
    from litdata.streaming.writer import BinaryWriter

    del samples_per_shard  # see SETTINGS
    writer = BinaryWriter(str(folder), chunk_size=SETTINGS["chunk_size"])
    for number, sample in enumerate(samples):
        tensors = {name: torch.from_numpy(array) for name, array in sample.items()}
        writer[number] = {"sample": number, **tensors}
    writer.done()
    writer.merge()


def build_loader(folder: Path, batch_size: int) -> Iterable[Batch]:
    """Shuffled batches of one epoch, another one each time it is iterated."""
    from litdata import StreamingDataLoader, StreamingDataset

    cache = folder.with_name(folder.name + "-cache")  # not in the home folder
    settings = {name: value for name, value in SETTINGS.items() if name != "chunk_size"}
    dataset = StreamingDataset(str(folder), cache_dir=str(cache), **settings)
    return _NumpyBatches(StreamingDataLoader(dataset, batch_size=batch_size))


class _NumpyBatches:
    """The loader's tensors as arrays of the same memory."""

    def __init__(self, loader: Iterable[dict[str, Any]]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            yield {name: tensor.numpy() for name, tensor in batch.items()}
