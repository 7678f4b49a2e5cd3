"""Our arms of the loader benchmark as processes: the reader of latent shards, and memcpy.

python -m benchmarks.loader_own read <dataset> <batch size> <arrays>
python -m benchmarks.loader_own memcpy <number of samples> <batch size>
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from functools import partial

import numpy as np

from benchmarks.loader_data import IMAGE
from benchmarks.peers.samples import SAMPLE_BYTES, SHAPES, Batch
from benchmarks.peers.worker import serve
from shards.dataset import Dataset
from shards.order import choose_partitions
from shards.prefetch import prefetch
from shards.reader import PREFETCH_DEPTH, STEPS_AT_A_TIME, LatentReader

# More than the CPU caches hold, and no more of them than a reader that runs ahead has in flight.
_MEMCPY_BUFFERS = 6


def build_reader(dataset: Dataset, batch_size: int) -> LatentReader:
    """The reader as training builds it."""
    return LatentReader(
        dataset,
        dataset.image_column(IMAGE.resolution),
        dataset.text_column(),
        seed=0,
        global_batch_size=batch_size,
        num_partitions=choose_partitions(batch_size),
    )


def read_batches(reader: LatentReader, batch_size: int, arrays: list[str]) -> Iterator[Batch]:
    """What the trainer gets, through the reader's background thread; or one column of it."""
    if len(arrays) == 1:
        yield from _read_column(reader, batch_size, arrays[0])
    for batch in reader.iter_batches(0, range(batch_size)):
        yield {"sample": batch.samples, "moments": batch.moments, "states": batch.states}


def _read_column(reader: LatentReader, batch_size: int, name: str) -> Iterator[Batch]:
    """The same samples of one column alone; here each has a caption of its own, in its own row."""
    gatherer = {"moments": reader.image_rows, "states": reader.text_rows}[name]

    def gather_all() -> Iterator[Batch]:
        for first in itertools.count(0, STEPS_AT_A_TIME):
            located = reader.order.locate_steps(first, STEPS_AT_A_TIME, range(batch_size))
            for shards, rows in zip(*located, strict=True):
                (values,) = gatherer.gather(shards, rows)
                yield {"sample": reader.sample_numbers(shards, rows), name: values}

    return prefetch(gather_all(), PREFETCH_DEPTH)


def copy_batches(num_samples: int, batch_size: int) -> Iterator[Batch]:
    """As many bytes as a batch has, copied in one piece between buffers that stay.

    Reads through an array as large as the dataset, so that nothing comes from the CPU's caches.
    """
    sample_bytes = sum(SAMPLE_BYTES.values())
    source = np.ones((num_samples, sample_bytes), np.uint8)
    buffers = np.ones((_MEMCPY_BUFFERS, batch_size, sample_bytes), np.uint8)
    numbers = np.arange(batch_size)
    turn = 0
    while True:
        for first in range(0, num_samples - batch_size + 1, batch_size):
            target = buffers[turn % _MEMCPY_BUFFERS]
            np.copyto(target, source[first : first + batch_size])
            turn += 1
            yield {"sample": numbers + first, "moments": target}


def main(arguments: list[str]) -> None:
    """Serve one arm."""
    kind, what, batch_size, *rest = arguments
    if kind == "memcpy":
        serve(partial(copy_batches, int(what), int(batch_size)), {})
        return
    arrays = [name for name in SHAPES if name in rest[0].split(",")]
    reader = build_reader(Dataset(what), int(batch_size))
    settings = {"partitions": reader.order.num_partitions, "window": reader.order.window}
    serve(partial(read_batches, reader, int(batch_size), arrays), {"settings": settings})


if __name__ == "__main__":
    main(sys.argv[1:])
