"""Shards over a Ray cluster: actors that encode, and tasks that decode wherever there are CPUs.

The same function per shard as everywhere (`encode_shard`), so the bytes are the same. A shard's
samples come to the actor that encodes it as a stream of chunks from a task that reads and decodes
it on any machine; the stream waits when the actor is behind. What a killed actor, or its machine,
had in hand is handed out again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from precompute.decoding import DecodedSample
from precompute.engine import Dispatch, Event, Events, Failed, Finished, Progressed
from precompute.shard_job import DecodedSamples
from precompute.shard_task import ShardTask
from precompute.transform import Crop
from precompute.worker import Worker, open_decoded_here
from precompute.worker_spec import SHARDS_IN_HAND, ShardDone, WorkerSpec
from shards.column import Json
from shards.errors import UnreadableShardError, UserError
from shards.source_shard import SourceShard

_CHUNK = 16  # decoded samples per object
_CHUNKS_AHEAD = 4  # that a decoding task may be in front of its actor
_TICK_SEC = 1.0
_PACKAGES = ("shards", "precompute")


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
        ThreadPoolExecutor(spec.decode_workers) as pool,
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


class _RemoteShard:
    """`DecodedSamples` that a task elsewhere decodes."""

    def __init__(self, spec: WorkerSpec, source: SourceShard, crops: list[Crop]) -> None:
        task = ray.remote(_decode_chunks).options(
            num_cpus=spec.decode_workers,
            num_returns="streaming",
            _generator_backpressure_num_objects=_CHUNKS_AHEAD,
        )
        self._chunks = task.remote(spec, source, crops)
        self._end: _End | None = None

    def __iter__(self) -> Iterator[DecodedSample]:
        for reference in self._chunks:
            chunk = ray.get(reference)
            if isinstance(chunk, _End):
                self._end = chunk
            else:
                yield from chunk

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


class _Actor:
    """A worker somewhere in the cluster."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._num_samples = 0

        def open_decoded(source: SourceShard, crops: list[Crop]) -> DecodedSamples:
            return _RemoteShard(spec, source, crops)

        self._worker = Worker(spec, open_decoded)

    def encode(self, task: ShardTask) -> ShardDone:
        return self._worker.encode(task, self._count)

    def count_samples(self) -> int:
        """Samples read since it began."""
        return self._num_samples

    def _count(self, num_samples: int) -> None:
        self._num_samples += num_samples


def run_ray(spec: WorkerSpec, tasks: Sequence[ShardTask], num_workers: int, address: str) -> Events:
    """Actors on the cluster at `address`; on this machine alone where that is empty.

    Raises:
        UserError: no cluster there, a shard cannot be encoded, or the model not loaded.
    """
    dispatch = Dispatch(tasks)
    running: dict[Any, tuple[str, ShardTask]] = {}
    with _connected(address), _Actors(spec, min(num_workers, len(tasks))) as actors:
        while not dispatch.is_done:
            for name, actor in actors.by_name.items():
                for task in dispatch.hand_out(name):
                    running[actor.encode.remote(task)] = name, task
            yield Progressed(actors.new_samples())
            ready, _ = ray.wait(list(running), num_returns=1, timeout=_TICK_SEC)
            for reference in ready:
                if reference not in running:
                    continue  # of an actor that has just died
                name, task = running.pop(reference)
                try:
                    yield _event_of(reference, dispatch, name, task)
                except RayActorError as error:
                    running = {r: held for r, held in running.items() if held[0] != name}
                    why = str(error).strip().splitlines()[0]
                    yield from dispatch.lose(name, f"{name}: {why}")
                    actors.replace(name)


def _event_of(reference: Any, dispatch: Dispatch, name: str, task: ShardTask) -> Event:
    try:
        done = ray.get(reference)
    except RayTaskError as error:  # it is also of the class of its cause
        cause = error.cause
        if isinstance(cause, UnreadableShardError):
            dispatch.take_back(name, task.source.name)
            return Failed(task, cause)
        if isinstance(cause, UserError):
            raise cause from None
        raise
    dispatch.take_back(name, task.source.name)
    return Finished(task, done)


class _Actors:
    """The actors of a job, by name; one that dies is replaced under a new name."""

    def __init__(self, spec: WorkerSpec, num_workers: int) -> None:
        on_gpu = spec.device.startswith("cuda")
        resources = {"num_gpus": 1} if on_gpu else {"num_cpus": 1}
        self._build = partial(
            ray.remote(_Actor).options(max_concurrency=SHARDS_IN_HAND + 1, **resources).remote,
            # Ray shows an actor the GPU that it gave it alone.
            replace(spec, device="cuda:0") if on_gpu else spec,
        )
        self._next = 0
        self.by_name: dict[str, Any] = {}
        self._asked: dict[str, Any] = {}
        self._counted: dict[str, int] = {}
        for _ in range(num_workers):
            self._add()

    def __enter__(self) -> _Actors:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.by_name.values():
            ray.kill(actor)

    def new_samples(self) -> int:
        """Samples that were read since this was last asked."""
        total = 0
        for name, actor in self.by_name.items():
            if name not in self._asked:
                self._asked[name] = actor.count_samples.remote()
            ready, _ = ray.wait([self._asked[name]], timeout=0)
            if ready:
                del self._asked[name]
                total += self._newly(name, ready[0])
        return total

    def _newly(self, name: str, answer: Any) -> int:
        try:
            count: int = ray.get(answer)
        except RayActorError:
            return 0  # noticed by what it had in hand
        new = count - self._counted.get(name, 0)
        self._counted[name] = count
        return new

    def _add(self) -> None:
        self.by_name[f"actor {self._next}"] = self._build()
        self._next += 1

    def replace(self, name: str) -> None:
        """Start another in the place of one that died."""
        del self.by_name[name]
        self._add()


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """A connection to a cluster; without an address a Ray of our own, for this machine alone."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        # The machines of a cluster have the packages that we need, and not us.
        here = Path(__file__).parent.parent
        packages = [str(here / name) for name in _PACKAGES]
        options |= {"address": address, "runtime_env": {"py_modules": packages}}
    else:
        # Ray listens on all interfaces unless it is told not to.
        options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(
            "--ray-address",
            f"{address or 'this machine'}: no Ray there ({str(error).strip().splitlines()[0]})",
            wanted="auto, or host:port of a running cluster (ray start --head)",
        ) from None
    try:
        yield
    finally:
        ray.shutdown()
