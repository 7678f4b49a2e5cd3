"""From a request to its images: submitted, awaited, and given up when nobody wants them."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

from fastapi import Request

from serve.engine import Engine
from serve.job import ImageRequest, Job, ServedImage
from serve.refusal import RefusedError


class ClientGoneError(Exception):
    """Nobody is there to answer to."""


class Deadline:
    """Until when a request must be answered, its body included.

    Args:
        timeout_sec: from now on.
    """

    def __init__(self, timeout_sec: float) -> None:
        self.timeout_sec = timeout_sec
        self._ends_at = time.monotonic() + timeout_sec

    @property
    def left_sec(self) -> float:
        """What is left of it; not less than 0."""
        return max(0.0, self._ends_at - time.monotonic())


async def images_of(
    engine: Engine, http: Request, request: ImageRequest, deadline: Deadline
) -> tuple[Job, list[ServedImage]]:
    """Submit a request and wait for its images.

    Whatever ends the wait early also ends the job: its places in the queue are free at once, and
    a batch that nobody waits for stops at the end of its step.

    Raises:
        RefusedError: the queue is full, the time is up, or the images cannot be made.
        ClientGoneError: the client closed the connection.
    """
    job = engine.submit(request)
    images = asyncio.wrap_future(job.future)
    gone = asyncio.create_task(_disconnect(http))
    try:
        either: tuple[asyncio.Future[Any], ...] = (images, gone)
        left_sec = deadline.left_sec
        await asyncio.wait(either, timeout=left_sec, return_when=asyncio.FIRST_COMPLETED)
        if not images.done():
            raise _client_gone(engine) if gone.done() else _timed_out(engine, job, deadline)
        made = images.result()
        engine.metrics.observe_answer(job.queued_sec, job.generated_sec)
        return job, made
    except (RefusedError, ClientGoneError):
        raise
    except Exception as error:  # the worker has logged it
        raise RefusedError(500, "internal", "the images could not be generated") from error
    finally:
        job.fail(ClientGoneError())  # before the next line, which must not cancel a future in use
        images.cancel()
        gone.cancel()
        with suppress(asyncio.CancelledError):
            await gone


async def _disconnect(http: Request) -> None:
    """Return when the client has closed the connection; the body has been read before."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _client_gone(engine: Engine) -> ClientGoneError:
    engine.metrics.count_cancelled()
    return ClientGoneError()


def _timed_out(engine: Engine, job: Job, deadline: Deadline) -> RefusedError:
    engine.metrics.count_timed_out()
    stage = "in the queue" if job.started_at is None else "while it was generated"
    return RefusedError(
        504, "timed_out", f"no answer within {deadline.timeout_sec:g} seconds: {stage}"
    )
