"""webdataset: tars of .npy members, streamed through a shuffle buffer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .samples import SAMPLE_BYTES, SHAPES, Batch, Sample, stack

DISTRIBUTION = "webdataset"
SETTINGS = {
    # Whole samples wait in it: 0.9 GB. A window as wide as ours would take 3.7 GB per process.
    "shuffle_buffer": 4096,
    # An endless stream keeps the buffer full; an epoch's end would drain it without reading.
    "resampled": True,
    # Twice as fast as `.decode()`, which tries every decoder on every member.
    "decode": "frombuffer",
}


def write(samples: Iterable[Sample], folder: Path, samples_per_shard: int) -> None:
    """Write the samples, numbered from 0, as this peer's shards."""
    from webdataset import ShardWriter

    pattern = str(folder / "%05d.tar")
    with ShardWriter(pattern, maxcount=samples_per_shard, maxsize=2**60, verbose=0) as writer:
        for number, sample in enumerate(samples):
            members = {f"{name}.npy": array for name, array in sample.items()}
            writer.write({"__key__": f"{number:08d}", **members})


def build_loader(folder: Path, batch_size: int) -> Iterable[Batch]:
    """Shuffled batches; endless."""
    from webdataset import WebDataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    buffer = SETTINGS["shuffle_buffer"]
    dataset = WebDataset(urls, resampled=True, shardshuffle=False)
    shuffled = dataset.shuffle(buffer, initial=buffer)
    batches: Iterable[Batch] = shuffled.map(_decode).batched(batch_size, collation_fn=stack)
    return batches


def _decode(members: dict[str, Any]) -> Sample:
    """Views of a sample's members; the shapes are known, so the .npy header is passed over."""
    sample: dict[str, Any] = {"sample": np.int64(members["__key__"])}
    for name, shape in SHAPES.items():
        data = members[f"{name}.npy"]
        header = len(data) - SAMPLE_BYTES[name]
        sample[name] = np.frombuffer(data, np.float16, offset=header).reshape(shape)
    return sample
