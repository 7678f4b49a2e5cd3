"""The queue: images of a kind go together, in order, and no more wait than there are places."""

import threading
import time

import pytest
from helpers_serve import build_request, held_engine, wait_until

from serve.batcher import Batcher
from serve.job import Job
from serve.refusal import RefusedError


def batcher(capacity: int = 16, max_batch_size: int = 4, wait_sec: float = 0.0) -> Batcher:
    return Batcher(capacity, max_batch_size, wait_sec)


def put(queue: Batcher, *prompts: str, **kind: object) -> Job:
    job = Job(build_request(*prompts, **kind))
    assert queue.put(job)
    return job


def taken(queue: Batcher) -> list[str]:
    return [task.prompt for task in queue.take()]


def test_images_of_several_requests_are_batched_in_order_of_arrival():
    queue = batcher()
    put(queue, "a", "b")
    put(queue, "c")
    put(queue, "d", "e")
    assert taken(queue) == ["a", "b", "c", "d"]
    assert taken(queue) == ["e"]


@pytest.mark.parametrize(
    "other",
    [{"width": 32}, {"height": 32}, {"steps": 3}, {"guidance": 3.0}, {"scheduler": "ddim"}],
    ids=str,
)
def test_images_that_differ_are_never_in_one_batch(other):
    queue = batcher()
    put(queue, "a")
    put(queue, "b", **other)
    put(queue, "c")
    assert taken(queue) == ["a", "c"]
    assert taken(queue) == ["b"]


def test_negative_prompts_and_seeds_may_differ_within_a_batch():
    queue = batcher()
    put(queue, "a", negative_prompt="x", seed=1)
    put(queue, "b", negative_prompt="y", seed=2)
    assert taken(queue) == ["a", "b"]


def test_the_oldest_image_is_next_though_others_would_fill_a_batch():
    queue = batcher(max_batch_size=2)
    put(queue, "old", steps=9)
    put(queue, "a", "b", "c", "d")
    assert taken(queue) == ["old"]


def test_a_request_is_queued_as_a_whole_or_not_at_all():
    queue = batcher(capacity=3)
    put(queue, "a", "b")
    assert not queue.put(Job(build_request("c", "d")))
    assert len(queue) == 2
    put(queue, "c")
    assert not queue.put(Job(build_request("d")))


def test_the_places_of_a_job_that_is_over_are_free():
    queue = batcher(capacity=3)
    gone = put(queue, "a", "b")
    put(queue, "c")
    queue.discard(gone)
    put(queue, "d", "e")
    assert taken(queue) == ["c", "d", "e"]


def test_an_image_waits_for_others_of_its_kind_and_leaves_at_once_when_they_are_there():
    queue = batcher(max_batch_size=2, wait_sec=60)
    put(queue, "a")
    batches: list[list[str]] = []
    taker = threading.Thread(target=lambda: batches.append(taken(queue)), daemon=True)
    taker.start()
    time.sleep(0.05)
    assert not batches
    put(queue, "b")
    taker.join(timeout=20)
    assert batches == [["a", "b"]]


def test_a_closed_queue_hands_out_nothing_and_takes_nothing():
    queue = batcher()
    put(queue, "a")
    queue.close()
    assert queue.take() == []
    assert not queue.put(Job(build_request("b")))


def test_requests_that_wait_are_generated_together():
    with held_engine() as (engine, pipeline):
        pipeline.free = False
        jobs = [engine.submit(build_request("first"))]
        wait_until(lambda: pipeline.batches)
        jobs += [engine.submit(build_request(prompt)) for prompt in "abc"]
        pipeline.free = True
        pipeline.steps.release(10)
        images = [job.future.result(20)[0] for job in jobs]
        assert pipeline.batches == [["first"], ["a", "b", "c"]]
        assert [image.batch_size for image in images] == [1, 3, 3, 3]


def test_a_request_larger_than_a_batch_is_answered_in_the_order_of_its_prompts():
    with held_engine(max_batch_size=2) as (engine, pipeline):
        whole = engine.submit(build_request(*"abcde", seed=7)).future.result(20)
        assert sorted(map(len, pipeline.batches)) == [1, 2, 2]
        for index, image in enumerate(whole):
            (alone,) = engine.submit(build_request("x", seed=7 + index)).future.result(20)
            assert image.png == alone.png


def test_two_devices_share_the_queue():
    with held_engine(devices="cpu,cpu", max_batch_size=1) as (engine, pipeline):
        pipeline.free = False
        jobs = [engine.submit(build_request(prompt)) for prompt in "ab"]
        wait_until(lambda: len(pipeline.batches) == 2)  # one is held, and the other one has begun
        pipeline.steps.release(4)
        assert all(job.future.result(20) for job in jobs)


def test_no_room_is_told_with_the_time_that_the_work_ahead_takes():
    with held_engine(max_queue=8, max_batch_size=1) as (engine, pipeline):
        pipeline.free = False
        engine.submit(build_request("in hand"))
        wait_until(lambda: pipeline.batches)
        engine.submit(build_request(*"abcdefgh"))
        for _ in range(40):
            engine._speed.record(build_request("x").kind.work, 3.0)  # seconds for such an image
        with pytest.raises(RefusedError) as two:
            engine.submit(build_request("x", "y"))
        with pytest.raises(RefusedError) as four:
            engine.submit(build_request(*"wxyz"))
    assert (two.value.status, two.value.code) == (429, "queue_full")
    # One image is in hand, and as many must be begun as want a place.
    assert 2 * 3 < two.value.retry_after_sec <= 3 * 3
    assert four.value.retry_after_sec - two.value.retry_after_sec == pytest.approx(2 * 3, abs=0.5)
    assert int(two.value.headers["retry-after"]) >= two.value.retry_after_sec
