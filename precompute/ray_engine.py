"""Shards over a Ray cluster: actors that encode, and tasks that decode wherever there are CPUs.

The same function per shard as everywhere (`encode_shard`), so the bytes are the same. A shard's
samples come to the actor that encodes it as a stream of chunks from a task that reads and decodes
it on any machine; the stream waits when the actor is behind. What a killed actor, or its machine,
had in hand is handed out again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from precompute.engine import Dispatch, Event, Events, Failed, Finished, Progressed
from precompute.ray_actor import Actor, DecoderDiedError, first_line
from precompute.shard_task import ShardTask
from precompute.worker_spec import SHARDS_IN_HAND, WorkerSpec
from shards.errors import UnreadableShardError, UserError

_TICK_SEC = 1.0


def run_actors(spec: WorkerSpec, tasks: Sequence[ShardTask], num_workers: int) -> Events:
    """Actors on the cluster that this process is connected to. One that dies is replaced.

    Raises:
        UserError: a shard cannot be encoded, or the model not loaded.
    """
    # A task that asks for more CPUs than any machine has would wait for ever.
    spec = replace(spec, decode_workers=min(spec.decode_workers, _most_cpus()))
    dispatch, num_samples = Dispatch(tasks), 0
    with _Actors(spec, min(num_workers, len(tasks))) as actors:
        while not dispatch.is_done:
            for name in actors.ready:
                for task in dispatch.hand_out(name):
                    actors.encode(name, task)
            yield Progressed(actors.new_samples())
            for reference, name, shard in actors.wait():
                if shard is None:
                    yield from _began(reference, dispatch, name, actors)
                    continue
                for event in _ended(reference, dispatch, name, shard, actors):
                    num_samples += event.done.num_samples if isinstance(event, Finished) else 0
                    yield event
        # What was read since they were last asked.
        yield Progressed(max(0, num_samples - actors.num_samples))


def _most_cpus() -> int:
    """Of the machine that has most."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return max(1, *(int(node["Resources"].get("CPU", 0)) for node in nodes))


def _began(reference: Any, dispatch: Dispatch, name: str, actors: _Actors) -> list[Event]:
    try:
        ray.get(reference)
    except RayActorError as error:
        actors.replace(name)
        return dispatch.lose_worker(name, f"{name}: {first_line(error)}", was_ready=False)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    actors.ready.append(name)
    return []


def _ended(
    reference: Any, dispatch: Dispatch, name: str, task: ShardTask, actors: _Actors
) -> list[Event]:
    shard = task.source.name
    try:
        done = ray.get(reference)
    except RayActorError as error:
        actors.replace(name)
        return dispatch.lose_worker(name, f"{name}: {first_line(error)}", was_ready=True)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, DecoderDiedError):
            return dispatch.lose_shard(name, shard, f"decoding {shard}: {cause}")
        if isinstance(cause, UnreadableShardError):
            return [Failed(dispatch.take_back(name, shard), cause)]
        if isinstance(cause, UserError):
            raise cause from None
        raise
    return [Finished(dispatch.take_back(name, shard), done)]


class _Actors:
    """The actors of a job, by name; one that dies is replaced under a new name.

    They ask for no CPUs: those are for the tasks that decode, without which an actor waits.

    Args:
        spec: of each.
        num_workers: how many; those that find no room in the cluster are no loss.
    """

    def __init__(self, spec: WorkerSpec, num_workers: int) -> None:
        on_gpu = spec.device.startswith("cuda")
        # Ray shows an actor the GPU that it gave it alone.
        self._spec = replace(spec, device="cuda:0") if on_gpu else spec
        self._build = (
            ray.remote(Actor)
            .options(
                num_cpus=0,
                num_gpus=int(on_gpu),
                max_concurrency=SHARDS_IN_HAND + 1,
                scheduling_strategy="SPREAD",
            )
            .remote
        )
        self.ready: list[str] = []
        self._actors: dict[str, Any] = {}
        self._calls: dict[Any, tuple[str, ShardTask | None]] = {}
        self._asked: dict[str, Any] = {}
        self._counted: dict[str, int] = {}
        self._numbers = itertools.count()
        self.num_samples = 0  # of which `new_samples` has told
        for _ in range(num_workers):
            self._add()

    def __enter__(self) -> _Actors:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors.values():
            ray.kill(actor)

    def encode(self, name: str, task: ShardTask) -> None:
        """Hand over a shard."""
        self._calls[self._actors[name].encode.remote(task)] = name, task

    def wait(self) -> Iterator[tuple[Any, str, ShardTask | None]]:
        """A call that has ended, if any does soon: its result, its actor, and its shard.

        None in place of the shard: the actor has loaded its model.
        """
        ready, _ = ray.wait(list(self._calls), timeout=_TICK_SEC)
        for reference in ready:
            name, task = self._calls.pop(reference)
            yield reference, name, task

    def new_samples(self) -> int:
        """Samples that were read since this was last asked."""
        total = 0
        for name in self.ready:
            if name not in self._asked:
                self._asked[name] = self._actors[name].count_samples.remote()
            ready, _ = ray.wait([self._asked[name]], timeout=0)
            if ready:
                del self._asked[name]
                total += self._newly(name, ready[0])
        self.num_samples += total
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
        name = f"actor {next(self._numbers)}"
        self._actors[name] = self._build()
        self._calls[self._actors[name].load.remote(self._spec)] = name, None

    def replace(self, name: str) -> None:
        """Start another in the place of one that died, and forget what it was asked."""
        ray.kill(self._actors.pop(name))  # it may be out of reach alone
        self.ready = [other for other in self.ready if other != name]
        self._calls = {call: held for call, held in self._calls.items() if held[0] != name}
        self._add()
