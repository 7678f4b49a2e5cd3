"""What runs on a Ray cluster: an actor that encodes, and tasks that decode for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import ray
from ray.exceptions import RayError, RayTaskError

from precompute.decoding import DecodedSample, DecodePool
from precompute.shard_job import DecodedSamples
from precompute.shard_task import ShardTask
from precompute.transform import Crop
from precompute.worker import Worker, open_decoded_here
from precompute.worker_spec import ShardDone, WorkerSpec
from shards.column import Json
from shards.errors import UserError
from shards.source_shard import SourceShard

_CHUNK = 16  # decoded samples per object
_CHUNKS_AHEAD = 4  # that a decoding task may be in front of its actor


class DecoderDiedError(Exception):
    """The process, or the machine, of a decoding task is gone."""


@dataclass(frozen=True)
class _End:
    """What comes behind the last chunk of a shard."""

    source: Json
    seconds: dict[str, float]


def _decode_chunks(
    spec: WorkerSpec, source: SourceShard, crops: list[Crop]
) -> Iterator[list[DecodedSample] | _End]:
    """Read and decode a shard, somewhere in the cluster."""
    with (
        DecodePool(spec.decode_workers) as pool,
        closing(open_decoded_here(spec, pool, source, crops)) as decoded,
    ):
        chunk: list[DecodedSample] = []
        for sample in decoded:
            chunk.append(sample)
            if len(chunk) == _CHUNK:
                yield chunk
                chunk = []
        yield chunk
        yield _End(decoded.source, decoded.seconds)


class RemoteShard:
    """`DecodedSamples` that a task elsewhere decodes.

    It returns when the first chunk is there. Whoever waits for an encoder so has a task that runs:
    tasks that wait for the encoder keep their CPUs, and one that has the encoder and waits for a
    CPU would wait for ever. So Ray must not try a task again either; `Dispatch` does.
    """

    def __init__(self, spec: WorkerSpec, source: SourceShard, crops: list[Crop]) -> None:
        task = ray.remote(_decode_chunks).options(
            num_cpus=spec.decode_workers,
            num_returns="streaming",
            max_retries=0,
            _generator_backpressure_num_objects=_CHUNKS_AHEAD,
        )
        self._chunks = task.remote(spec, source, crops)
        self._end: _End | None = None
        self._first = self._take()

    def __iter__(self) -> Iterator[DecodedSample]:
        chunk = self._first
        while not isinstance(chunk, _End):
            yield from chunk
            chunk = self._take()
        self._end = chunk

    def _take(self) -> list[DecodedSample] | _End:
        try:
            chunk: list[DecodedSample] | _End = ray.get(next(self._chunks))
        except RayTaskError as error:  # it is also of the class of its cause
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        except RayError as error:
            raise DecoderDiedError(first_line(error)) from None
        return chunk

    def close(self) -> None:
        """End the task; one that is done is left alone."""
        if self._end is None:
            ray.cancel(self._chunks)

    @property
    def source(self) -> Json:
        """`url`, `bytes` and `sha256` of the shard."""
        assert self._end is not None
        return self._end.source

    @property
    def seconds(self) -> dict[str, float]:
        """Of the thread that read."""
        assert self._end is not None
        return self._end.seconds


class Actor:
    """A worker somewhere in the cluster."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._num_samples = 0

    def load(self, spec: WorkerSpec) -> None:
        """Load the model; apart from the beginning of the process, so that its errors arrive."""

        def open_decoded(source: SourceShard, crops: list[Crop]) -> DecodedSamples:
            return RemoteShard(spec, source, crops)

        self._worker = Worker(spec, open_decoded)

    def encode(self, task: ShardTask) -> ShardDone:
        """Write what a shard lacks."""
        assert self._worker is not None
        return self._worker.encode(task, self._count)

    def count_samples(self) -> int:
        """Samples read since it began."""
        return self._num_samples

    def _count(self, num_samples: int) -> None:
        self._num_samples += num_samples


def first_line(error: Exception) -> str:
    """What Ray says of an error, without its traceback."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
