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
from shards.errors import UnreadableShardError

MAX_ATTEMPTS = 3  # of a shard whose worker dies


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
    """Which shards wait, and which worker has which in hand."""

    tasks: Iterable[ShardTask]
    _waiting: deque[ShardTask] = field(init=False)
    _in_hand: dict[Hashable, dict[str, ShardTask]] = field(default_factory=dict)
    _attempts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._waiting = deque(self.tasks)

    @property
    def is_done(self) -> bool:
        """Whether nothing waits and nothing is in hand."""
        return not self._waiting and not any(self._in_hand.values())

    def hand_out(self, worker: Hashable) -> Iterator[ShardTask]:
        """Fill a worker's hands."""
        held = self._in_hand.setdefault(worker, {})
        while self._waiting and len(held) < SHARDS_IN_HAND:
            task = self._waiting.popleft()
            held[task.source.name] = task
            yield task

    def take_back(self, worker: Hashable, shard: str) -> ShardTask:
        """A worker is done with a shard, well or not."""
        return self._in_hand[worker].pop(shard)

    def lose(self, worker: Hashable, why: str) -> list[Event]:
        """A worker died; what it had in hand waits again, but for what has killed too many."""
        lost = self._in_hand.pop(worker, {})
        events: list[Event] = [WorkerDied(why, len(lost))]
        for shard, task in reversed(lost.items()):
            self._attempts[shard] += 1
            if self._attempts[shard] < MAX_ATTEMPTS:
                self._waiting.appendleft(task)
                continue
            error = UnreadableShardError(
                task.source.url,
                f"its worker died {MAX_ATTEMPTS} times",
                remedy="see the worker's own message above; memory is the usual cause "
                "(a smaller --batch-size, fewer --workers)",
            )
            events.append(Failed(task, error))
        return events
