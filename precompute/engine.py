"""What an engine is: it hands out shards to workers and says what becomes of them.

An engine is a generator of events. Shards are handed out one by one as workers get free, so nothing
has to be divisible by anything; what a dead worker had in hand is handed out again. Closing the
generator ends all workers; shards in hand are abandoned, and nothing of them is visible.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from precompute.shard_task import ShardTask
from precompute.worker_spec import SHARDS_IN_HAND, ShardDone
from shards.errors import UnreadableShardError, UserError

MAX_ATTEMPTS = 3  # of a shard whose worker dies, and of workers to begin


@dataclass(frozen=True)
class Progressed:
    """Source samples were read; 0 of them is a sign of life."""

    num_samples: int


@dataclass(frozen=True)
class Finished:
    """A shard is written."""

    task: ShardTask
    done: ShardDone


@dataclass(frozen=True)
class Failed:
    """A shard could not be read; the job goes on without it."""

    task: ShardTask
    error: UnreadableShardError


@dataclass(frozen=True)
class WorkerDied:
    """A worker is gone, and what it had in hand goes to others."""

    why: str
    num_shards: int


Event: TypeAlias = Progressed | Finished | Failed | WorkerDied
Events: TypeAlias = Iterator[Event]


@dataclass
class Dispatch:
    """Which shards wait, and which worker has which in hand.

    A shard whose worker died is handed out alone from then on: one that kills its workers does not
    take others with it, and is known by it.
    """

    tasks: Iterable[ShardTask]
    _waiting: deque[ShardTask] = field(init=False)
    _in_hand: dict[Hashable, dict[str, ShardTask]] = field(default_factory=dict)
    _deaths: Counter[str] = field(default_factory=Counter)
    _failed_starts: int = 0

    def __post_init__(self) -> None:
        self._waiting = deque(self.tasks)

    @property
    def is_done(self) -> bool:
        """Whether nothing waits and nothing is in hand."""
        return not self._waiting and not any(self._in_hand.values())

    def hand_out(self, worker: Hashable) -> Iterator[ShardTask]:
        """Fill a worker's hands."""
        held = self._in_hand.setdefault(worker, {})
        while self._waiting and self._has_room(held):
            task = self._waiting.popleft()
            held[task.source.name] = task
            yield task

    def _has_room(self, held: dict[str, ShardTask]) -> bool:
        if any(self._deaths[shard] for shard in (*held, self._waiting[0].source.name)):
            return not held
        return len(held) < SHARDS_IN_HAND

    def take_back(self, worker: Hashable, shard: str) -> ShardTask:
        """A worker is done with a shard, well or not."""
        return self._in_hand[worker].pop(shard)

    def lose_worker(self, worker: Hashable, why: str, *, was_ready: bool) -> list[Event]:
        """A worker died; what it had in hand waits again, but for what has killed too many.

        Raises:
            UserError: several died one after the other while they loaded the model.
        """
        self._failed_starts = 0 if was_ready else self._failed_starts + 1
        if self._failed_starts == MAX_ATTEMPTS:
            raise UserError(
                "workers",
                f"died {MAX_ATTEMPTS} times while they loaded the model, at last {why}",
                remedy="memory is the usual cause: fewer --workers",
            )
        return self._retry(list(self._in_hand.pop(worker, {}).values()), why)

    def lose_shard(self, worker: Hashable, shard: str, why: str) -> list[Event]:
        """What helped a worker with one shard died; the worker goes on."""
        return self._retry([self.take_back(worker, shard)], why)

    def _retry(self, tasks: list[ShardTask], why: str) -> list[Event]:
        events: list[Event] = [WorkerDied(why, len(tasks))]
        for task in reversed(tasks):
            self._deaths[task.source.name] += 1
            if self._deaths[task.source.name] < MAX_ATTEMPTS:
                self._waiting.appendleft(task)
                continue
            error = UnreadableShardError(
                task.source.url,
                f"its worker died {MAX_ATTEMPTS} times, at last {why}",
                remedy="memory is the usual cause (a smaller --batch-size, fewer --workers); the "
                "same command again tries it again",
            )
            events.append(Failed(task, error))
        return events
