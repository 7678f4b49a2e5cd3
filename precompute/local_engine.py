"""Shards over this machine: one worker process for each device, or one in this process."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from precompute.engine import Dispatch, Event, Events, Failed, Finished, Progressed
from precompute.shard_task import ShardTask
from precompute.worker import Worker
from precompute.worker_process import work
from precompute.worker_spec import SHARDS_IN_HAND, WorkerSpec
from shards.errors import UnreadableShardError

_TICK_SEC = 0.2  # how long an engine is silent at most
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _AbandonedError(Exception):
    """The job ends; whoever is at a shard drops it."""


def run_here(spec: WorkerSpec, tasks: Sequence[ShardTask]) -> Events:
    """One worker in this process.

    Raises:
        UserError: a shard cannot be encoded, or the model not loaded.
    """
    worker = Worker(spec)
    events: queue.Queue[Event | Exception] = queue.Queue()
    abandoned = threading.Event()

    def count(num_samples: int) -> None:
        if abandoned.is_set():
            raise _AbandonedError
        events.put(Progressed(num_samples))

    def encode(task: ShardTask) -> None:
        if abandoned.is_set():
            return
        try:
            events.put(Finished(task, worker.encode(task, count)))
        except UnreadableShardError as error:
            events.put(Failed(task, error))
        except Exception as error:  # raised again by whoever reads the events
            events.put(error)

    with ThreadPoolExecutor(SHARDS_IN_HAND, thread_name_prefix="shard") as pool:
        for task in tasks:
            pool.submit(encode, task)
        remaining = len(tasks)
        try:
            while remaining:
                try:
                    event = events.get(timeout=_TICK_SEC)
                except queue.Empty:
                    event = Progressed(0)
                if isinstance(event, Exception):
                    raise event
                remaining -= not isinstance(event, Progressed)
                yield event
        finally:
            abandoned.set()
            pool.shutdown(cancel_futures=True)
            worker.close()


def run_local(specs: Sequence[WorkerSpec], tasks: Sequence[ShardTask]) -> Events:
    """A worker process for each spec. One that dies is replaced.

    Raises:
        UserError: a shard cannot be encoded, or the model not loaded.
    """
    dispatch = Dispatch(tasks)
    with _processes() as workers:
        workers.extend(_Process(spec) for spec in specs[: len(tasks)])
        while not dispatch.is_done:
            for worker in workers:
                for task in dispatch.hand_out(worker) if worker.is_ready else ():
                    worker.send(task)
            yield Progressed(0)
            for connection in wait([worker.connection for worker in workers], _TICK_SEC):
                worker = next(w for w in workers if w.connection is connection)
                if message := worker.receive():
                    yield _event_of(message, worker, dispatch)
                else:
                    why = worker.cause_of_death()
                    yield from dispatch.lose_worker(worker, why, was_ready=worker.is_ready)
                    workers.remove(worker)
                    workers.append(_Process(worker.spec))


class _Process:
    """A worker process, as the job sees it."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.is_ready = False
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=work, args=(spec, theirs), name=f"precompute-{spec.device}", daemon=True
        )
        with _held_signals():
            self.process.start()
        theirs.close()

    def send(self, task: ShardTask) -> None:
        """Hand over a shard; a worker that is dead is noticed when it is listened to."""
        try:
            self.connection.send(task)
        except OSError:
            return

    def receive(self) -> Any:
        """What it says; None when it is dead."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None

    def cause_of_death(self) -> str:
        """Which worker died, and how."""
        self.process.join()
        self.connection.close()
        status = self.process.exitcode or 0
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return f"{self.process.name} (process {self.process.pid}): {how}"

    def kill(self) -> None:
        """End it, whatever it does; all that it wrote is whole."""
        self.process.kill()
        self.process.join()
        self.connection.close()


@contextmanager
def _held_signals() -> Iterator[None]:
    """A process that is started meanwhile never sees what asks the job to stop.

    The signals may go to the whole process group, at a time when the process has not even begun to
    import; held signals are inherited, and the job's own are delivered afterwards.
    """
    resource_tracker.ensure_running()  # else the first start does so, and lets the signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _processes() -> Iterator[list[_Process]]:
    workers: list[_Process] = []
    try:
        yield workers
    finally:
        for worker in workers:
            worker.kill()


def _event_of(message: Any, worker: _Process, dispatch: Dispatch) -> Event:
    kind, shard, content = message
    if kind == "ready":
        worker.is_ready = True
        return Progressed(0)
    if kind == "samples":
        return Progressed(content)
    if kind == "error":
        raise content
    if kind == "bug":
        where = f"shard {shard}" if shard else "loading"
        raise RuntimeError(f"in {worker.process.name}, {where}:\n{content}")
    task = dispatch.take_back(worker, shard)
    return Finished(task, content) if kind == "done" else Failed(task, content)
