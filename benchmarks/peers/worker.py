"""One arm of the loader benchmark as a process that answers commands, one JSON line each.

A command is a line `<name> <skip> <count>`: pass over `skip` batches, then measure `count`.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from .samples import SHAPES, Batch, digest

OpenBatches = Callable[[], Iterator[Batch]]


def serve(open_batches: OpenBatches, facts: dict[str, Any]) -> None:
    """Say that the arm is ready, then answer until the commands end.

    Args:
        open_batches: starts an endless stream of batches.
        facts: the arm's version and settings, its first line.
    """
    # Libraries print; what they print must not land between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    batches = open_batches()
    print(json.dumps(facts), file=answers)
    for line in sys.stdin:
        name, skip, count = line.split()
        if name == "calls":  # a thread is profiled from its start on: these batches are new ones
            answer = count_calls(open_batches, int(skip), int(count))
        else:
            measure = {"block": time_block, "digest": digest_block}[name]
            answer = measure(batches, int(skip), int(count))
        print(json.dumps(answer), file=answers)


def time_block(batches: Iterator[Batch], skip: int, count: int) -> dict[str, Any]:
    """Seconds for `count` batches, of the clock and of all threads, and what was in them."""
    _pass_over(batches, skip)
    num_samples = num_bytes = 0
    cpu_began, began = time.process_time(), time.perf_counter()
    for batch in itertools.islice(batches, count):
        num_samples += len(batch["sample"])
        num_bytes += sum(batch[name].nbytes for name in SHAPES if name in batch)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    counts = {"samples": num_samples, "bytes": num_bytes}
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, **counts}


def digest_block(batches: Iterator[Batch], skip: int, count: int) -> dict[str, Any]:
    """Number and hash of every sample in `count` batches, in the order of delivery."""
    _pass_over(batches, skip)
    numbers: list[int] = []
    digests: list[str] = []
    for batch in itertools.islice(batches, count):
        arrays = {name: batch[name] for name in SHAPES if name in batch}
        if not all(array.flags.c_contiguous for array in arrays.values()):
            raise ValueError("a batch must be one contiguous array for each of its fields")
        numbers += batch["sample"].tolist()
        rows = zip(*arrays.values(), strict=True)
        digests += [digest(dict(zip(arrays, row, strict=True))) for row in rows]
    return {"numbers": numbers, "digests": digests}


def count_calls(open_batches: OpenBatches, skip: int, count: int) -> dict[str, Any]:
    """Calls of Python and C functions, in all threads, while `count` batches are delivered."""
    calls = itertools.count()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            next(calls)  # one step of the interpreter: exact with several threads

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        batches = open_batches()
        _pass_over(batches, skip)
        first = next(calls)
        num_samples = 0
        for batch in itertools.islice(batches, count):
            num_samples += len(batch["sample"])
        num_calls = next(calls) - first
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return {"calls": num_calls, "samples": num_samples}


def _pass_over(batches: Iterator[Batch], count: int) -> None:
    for _ in itertools.islice(batches, count):
        pass
