"""Recordings by shape: in any order, in bounded number, and given up when memory runs out."""

from __future__ import annotations

import pytest
import torch
from helpers_recorder import OperatorRecorder

from serve.fast.graphs import MIN_GRAPHS, WARM_UP_RUNS, GraphCache
from shards.errors import UserError


def double(value):
    return (value * 2,)


def run(cache, value, name="double", function=double):
    (output,) = cache.run(name, function, {"value": value})
    return output.clone()


def record(cache, value, **of):
    for _ in range(WARM_UP_RUNS + 1):
        run(cache, value, **of)


def test_each_shape_is_recorded_once_and_then_replayed():
    recorder = OperatorRecorder()
    cache = GraphCache(recorder, MIN_GRAPHS)
    calls = []

    def counted(value):
        calls.append(value.shape)
        return (value * 2,)

    for number in range(1, 9):
        for length in (1, 2, 3):
            value = torch.full((length,), float(number))
            assert torch.equal(run(cache, value, function=counted), value * 2)
    assert recorder.num_recordings == cache.num_recorded == 3
    assert len(calls) == 3 * (WARM_UP_RUNS + 1), "a replay runs no Python"


def test_types_and_names_are_told_apart_like_shapes():
    cache = GraphCache(OperatorRecorder(), 8)
    for dtype in (torch.float32, torch.float16, torch.int64):
        value = torch.arange(4).to(dtype)
        for _ in range(WARM_UP_RUNS + 2):
            found = run(cache, value)
            assert found.dtype == dtype
            assert torch.equal(found, value * 2)
            square = run(cache, value, "square", lambda value: (value * value,))
            assert torch.equal(square, value * value)
    assert len(cache) == 6


def test_the_shape_that_was_not_used_for_the_longest_time_is_given_up():
    recorder = OperatorRecorder()
    cache = GraphCache(recorder, 3)
    for length in (1, 2, 3):
        record(cache, torch.ones(length))
    run(cache, torch.ones(1))  # now 2 is the oldest
    record(cache, torch.ones(4))
    assert len(cache) == 3
    assert recorder.num_recordings == 4
    run(cache, torch.ones(1))
    run(cache, torch.ones(3))
    assert recorder.num_recordings == 4, "1 and 3 are still there"
    record(cache, torch.ones(2))
    assert recorder.num_recordings == 5


def test_a_flood_of_shapes_leaves_nothing_behind_but_the_last_ones():
    recorder = OperatorRecorder()
    cache = GraphCache(recorder, 4)
    for _ in range(WARM_UP_RUNS):
        run(cache, torch.ones(1))
    for length in range(2, 60):
        assert run(cache, torch.ones(length)).sum() == 2 * length
    run(cache, torch.ones(1))
    assert recorder.num_recordings == 0, "that it ran before is forgotten as well"
    record(cache, torch.ones(59))
    assert recorder.num_recordings == 1


class Failing(OperatorRecorder):
    """Raises the given errors, one for each recording, and then records."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__()
        self.errors = list(errors)

    def record(self, function):
        if self.errors:
            raise self.errors.pop(0)
        return super().record(function)


def test_what_cannot_be_recorded_runs_as_it_is_and_says_why():
    recorder = Failing(UserError("--cuda-graph", "operation not permitted"))
    cache = GraphCache(recorder, 4)
    for number in range(6):
        value = torch.full((2,), float(number))
        assert torch.equal(run(cache, value), value * 2)
    assert "operation not permitted" in cache.refusals["double"]
    assert recorder.num_recordings == 0, "it is not tried again and again"


def test_without_memory_for_a_recording_the_others_are_given_up_and_all_goes_on():
    recorder = Failing()
    cache = GraphCache(recorder, 4)
    record(cache, torch.ones(1))
    recorder.errors = [torch.OutOfMemoryError("no memory")]
    for number in range(4):
        value = torch.full((2,), float(number))
        assert torch.equal(run(cache, value), value * 2)
    assert recorder.num_forgotten == 1
    assert torch.equal(run(cache, torch.ones(1)), torch.full((1,), 2.0))


def test_a_run_without_memory_is_tried_once_more_without_recordings():
    recorder = OperatorRecorder()
    cache = GraphCache(recorder, 4)
    record(cache, torch.ones(1))
    failures = [torch.OutOfMemoryError("no memory")]

    def hungry(value):
        if failures:
            raise failures.pop()
        return (value + 1,)

    assert run(cache, torch.ones(2), "hungry", hungry).tolist() == [2.0, 2.0]
    assert recorder.num_forgotten == 1
    failures.append(torch.OutOfMemoryError("no memory"))
    with pytest.raises(torch.OutOfMemoryError):
        run(cache, torch.ones(3), "hungry", hungry)
    assert recorder.num_forgotten == 1, "there was nothing left to give back"


def test_an_output_is_overwritten_by_the_next_replay_as_on_a_gpu():
    """So that tests of what uses the cache can find those that hold on to an output."""
    cache = GraphCache(OperatorRecorder(), 4)
    record(cache, torch.ones(1))
    (first,) = cache.run("double", double, {"value": torch.ones(1)})
    cache.run("double", double, {"value": torch.full((1,), 5.0)})
    assert first.item() == 10.0
