"""A worker process of the local engine: shards come in, what became of them goes out."""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait

from precompute.shard_task import ShardTask
from precompute.worker import Worker
from precompute.worker_spec import SHARDS_IN_HAND, WorkerSpec
from shards.errors import UnreadableShardError, UserError

_Say = Callable[[str, str, object], None]  # kind of message, shard, content


def work(spec: WorkerSpec, connection: Connection) -> None:
    """Say `(kind, shard, content)` of what happens; never returns while the job lives.

    Kinds: `ready`; `samples`, so many more were read; `done`; `unreadable`; `error`, which ends the
    job; `bug`, a traceback that does so too.
    """
    threading.Thread(target=_die_with_job, name="die-with-job", daemon=True).start()
    sending = threading.Lock()

    def say(kind: str, shard: str, content: object) -> None:
        try:
            with sending:
                connection.send((kind, shard, content))
        except OSError:
            os._exit(0)  # the job is gone; all that was written is whole

    with _told_errors(say, ""):
        _share_cpus(spec)
        worker = Worker(spec)
        say("ready", "", None)
        _serve(worker, connection, say)


def _serve(worker: Worker, connection: Connection, say: _Say) -> None:
    def encode(task: ShardTask) -> None:
        shard, counted = task.source.name, _Counted(say)
        with _told_errors(say, shard):
            done = worker.encode(task, counted)
            counted.flush()
            say("done", shard, done)

    with ThreadPoolExecutor(SHARDS_IN_HAND, thread_name_prefix="shard") as pool:
        while True:
            try:
                task = connection.recv()
            except (EOFError, OSError):
                os._exit(0)
            pool.submit(encode, task)


@contextmanager
def _told_errors(say: _Say, shard: str) -> Iterator[None]:
    """What goes wrong goes to the job."""
    try:
        yield
    except UnreadableShardError as error:
        say("unreadable", shard, error)
    except UserError as error:
        say("error", shard, error)
    except Exception:  # the job shows it, and ends
        say("bug", shard, traceback.format_exc())


def _die_with_job() -> None:
    """A worker whose job was killed may load a model for minutes before it listens again."""
    job = multiprocessing.parent_process()
    assert job is not None
    wait([job.sentinel])
    os._exit(0)


class _Counted:
    """Says how many samples were read, in portions."""

    def __init__(self, say: _Say, portion: int = 16) -> None:
        self._say, self._portion, self._count = say, portion, 0

    def __call__(self, num_samples: int) -> None:
        self._count += num_samples
        if self._count >= self._portion:
            self.flush()

    def flush(self) -> None:
        """Say what was not said yet."""
        self._say("samples", "", self._count)
        self._count = 0


def _share_cpus(spec: WorkerSpec) -> None:
    """Workers on CPUs share them; each would otherwise take them all."""
    import torch

    if spec.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(spec.decode_workers)
