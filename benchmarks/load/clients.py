"""Clients that keep a server busy: so many at a time, or so many a second.

A closed loop's clients wait for their answer before they ask again, so a slow server is asked less.
An open loop's requests arrive at a fixed rate whatever the server does, as users do. Their time
counts from when they were to arrive, so that what the clients themselves are late with counts too.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from serve.client import Client, ServerError

OK = "ok"


@dataclass(frozen=True)
class Sample:
    """One request."""

    kind: int
    """Which of the requests that are sent in turn."""
    due_sec: float
    """When it was to be sent, since the first."""
    latency_sec: float
    """From then to the end of its answer."""
    outcome: str
    """`ok`, the status of HTTP, or `none` where there was no answer."""
    num_images: int
    queued_sec: float
    """In the server; 0 where it was not accepted."""
    generated_sec: float
    """In the server; 0 where it was not accepted."""
    batch_size: int


def closed_loop(
    client: Client,
    bodies: Sequence[dict[str, Any]],
    *,
    num_clients: int,
    max_requests: int,
    duration_sec: float,
) -> list[Sample]:
    """Clients that ask again as soon as they are answered.

    Args:
        client: of the server.
        bodies: requests, sent in turn.
        num_clients: at a time.
        max_requests: altogether.
        duration_sec: no request is sent later than this.
    """
    numbers = itertools.count()
    begin = time.monotonic()

    def ask_again_and_again() -> list[Sample]:
        samples = []
        while (number := next(numbers)) < max_requests:
            due_sec = time.monotonic() - begin
            if due_sec > duration_sec:
                break
            samples.append(_ask(client, bodies, number, begin, due_sec))
        return samples

    with ThreadPoolExecutor(num_clients) as pool:
        loops = [pool.submit(ask_again_and_again) for _ in range(num_clients)]
        return [sample for loop in loops for sample in loop.result()]


def open_loop(
    client: Client,
    bodies: Sequence[dict[str, Any]],
    *,
    rate_per_sec: float,
    num_requests: int,
    max_in_flight: int,
) -> list[Sample]:
    """Requests that arrive at a fixed rate.

    Args:
        client: of the server.
        bodies: requests, sent in turn.
        rate_per_sec: requests a second.
        num_requests: altogether.
        max_in_flight: of them at a time; those over it are sent late, which their times show.
    """
    begin = time.monotonic()

    def ask(number: int) -> Sample:
        return _ask(client, bodies, number, begin, number / rate_per_sec)

    with ThreadPoolExecutor(max_in_flight) as pool:
        asked = []
        for number in range(num_requests):
            time.sleep(max(0.0, begin + number / rate_per_sec - time.monotonic()))
            asked.append(pool.submit(ask, number))
        return [one.result() for one in asked]


def _ask(
    client: Client, bodies: Sequence[dict[str, Any]], number: int, begin: float, due_sec: float
) -> Sample:
    kind = number % len(bodies)
    outcome, num_images, timings = OK, 0, {}
    try:
        reply = client.post({**bodies[kind], "seed": number})
        num_images, timings = len(reply.images), reply.timings
    except ServerError as error:
        outcome = str(error.status) if error.status else "none"
    return Sample(
        kind=kind,
        due_sec=due_sec,
        latency_sec=time.monotonic() - begin - due_sec,
        outcome=outcome,
        num_images=num_images,
        queued_sec=timings.get("queued_sec", 0.0),
        generated_sec=timings.get("generated_sec", 0.0),
        batch_size=int(timings.get("batch_size", 0)),
    )


class MemoryWatch:
    """Resident memory of a process and its children, looked at while entered.

    Args:
        pid: of the process; None: of a server elsewhere, whose memory is not seen.
        every_sec: between two looks.
    """

    def __init__(self, pid: int | None, every_sec: float = 0.25) -> None:
        self._pid, self._every_sec = pid, every_sec
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.samples_mib: list[float] = []

    def __enter__(self) -> MemoryWatch:
        if self._pid is not None:
            self.samples_mib.append(resident_mib(self._pid))
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._pid is not None:
            self._over.set()
            self._thread.join()
            self.samples_mib.append(resident_mib(self._pid))

    def _look(self) -> None:
        assert self._pid is not None
        while not self._over.wait(self._every_sec):
            self.samples_mib.append(resident_mib(self._pid))


def resident_mib(pid: int) -> float:
    """Of a process and of those below it; 0 when it has ended."""
    import psutil

    total_bytes = 0
    try:
        process = psutil.Process(pid)
        members = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for member in members:
        try:
            total_bytes += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue  # it has ended meanwhile
    return total_bytes / 2**20
