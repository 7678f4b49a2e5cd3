"""An iterator that runs ahead: same items, same errors, and no thread left behind."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from shards.prefetch import prefetch


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.005)


def count_up(produced: list[int]) -> Iterator[int]:
    number = 0
    while True:
        produced.append(number)
        yield number
        number += 1


@pytest.mark.parametrize("depth", [1, 2, 100])
def test_the_items_come_in_order_and_end(depth):
    assert list(prefetch(iter(range(50)), depth)) == list(range(50))
    assert list(prefetch(iter([]), depth)) == []
    assert threads() == []


def test_none_and_exceptions_are_items_like_any_other():
    error = ValueError("an item")
    assert list(prefetch(iter([None, error, None]), 2)) == [None, error, None]


def test_it_runs_ahead_by_no_more_than_its_depth():
    produced: list[int] = []
    items = prefetch(count_up(produced), 3)
    assert next(items) == 0
    wait_until(lambda: len(produced) == 5)  # one taken, three waiting, one in hand
    time.sleep(0.15)
    assert len(produced) == 5
    items.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [ValueError("broken shard"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_in_the_thread_is_raised_after_what_came_before(error):
    def fail_at_two() -> Iterator[int]:
        yield 0
        yield 1
        raise error

    items = prefetch(fail_at_two(), 8)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(type(error)) as raised:
        next(items)
    assert raised.value is error
    assert "fail_at_two" in "".join(str(entry) for entry in raised.traceback)
    assert threads() == []


@pytest.mark.parametrize("taken", [1, 2, 10])
def test_closing_stops_the_thread_even_when_the_queue_is_full(taken):
    produced: list[int] = []
    items = prefetch(count_up(produced), 2)
    for _ in range(taken):
        next(items)
    assert threads() == ["prefetch"]
    items.close()  # type: ignore[attr-defined]
    assert threads() == []
    stopped_at = len(produced)
    time.sleep(0.05)
    assert len(produced) == stopped_at


def test_an_iterator_that_is_never_used_starts_no_thread():
    prefetch(count_up([]), 2)
    assert threads() == []


def test_a_consumer_that_fails_leaves_no_thread():
    def consume() -> None:
        for number in prefetch(count_up([]), 2):
            if number == 3:
                raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        consume()
    wait_until(lambda: threads() == [])
