"""Requests that wait: a full queue, too little time, a client that leaves, a body without end."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi.testclient import TestClient
from helpers_serve import build_request, client_of, error_of, held_engine, wait_until

from serve.app import build_app


def test_a_full_queue_is_429_with_a_time_to_try_again():
    with client_of(max_queue=8) as (client, pipeline, engine):
        pipeline.free = False
        asked = [_in_background(client, {"prompt": "a"})]
        wait_until(lambda: pipeline.batches)
        asked += [_in_background(client, {"prompt": ["a"] * 8})]
        wait_until(lambda: len(engine._batcher) == 8)
        answer = client.post("/v1/images", json={"prompt": "a"})
        assert (answer.status_code, error_of(answer)["code"]) == (429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        pipeline.free = True
        pipeline.steps.release(1000)
        assert [one().status_code for one in asked] == [200, 200]


def _in_background(client: TestClient, body: dict[str, Any]) -> Any:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(client.post, "/v1/images", json=body)
    return lambda: future.result(20)


def test_a_request_that_takes_too_long_gets_504_and_says_where_it_was():
    with client_of(timeout_sec=1) as (client, pipeline, engine):
        pipeline.free = False
        held = _in_background(client, {"prompt": "held"})
        wait_until(lambda: pipeline.batches)
        waiting = _in_background(client, {"prompt": "waiting"})
        errors = [error_of(answer) for answer in (held(), waiting())]
        assert [error["code"] for error in errors] == ["timed_out"] * 2
        assert errors[0]["message"].endswith("while it was generated")
        assert errors[1]["message"].endswith("in the queue")
        assert len(engine._batcher) == 0
        pipeline.free = True
        pipeline.steps.release(10)
        wait_until(lambda: b"requests_timed_out_total 2.0" in engine.metrics.exposition())
    assert ["waiting"] not in pipeline.batches


def call(app: Any, receive: Any) -> list[dict[str, Any]]:
    """What the application sends to a request for images, called as a server calls it."""
    sent: list[dict[str, Any]] = []
    path = "/v1/images"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode()}
    scope |= {"query_string": b"", "http_version": "1.1", "asgi": {"version": "3.0"}}
    scope |= {"headers": [(b"content-type", b"application/json")], "scheme": "http"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent


def ask_and_leave(app: Any, body: dict[str, Any], leave: Any) -> list[dict[str, Any]]:
    """Send a request, and close the connection once `leave()` returns."""
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.to_thread(leave)
        return {"type": "http.disconnect"}

    return call(app, receive)


def test_a_batch_stops_when_its_only_client_has_gone():
    with held_engine() as (engine, pipeline):
        app = build_app(engine, engine._config)
        pipeline.free = False
        pipeline.steps.release(2)
        body = {"prompt": "a", "steps": 50}
        sent = ask_and_leave(app, body, lambda: wait_until(lambda: pipeline.num_steps_done == 2))
        assert sent[0]["status"] == 499
        pipeline.free = True
        pipeline.steps.release(1)
        engine.drain(20)
        wait_until(lambda: all(worker._work_in_hand == 0 for worker in engine._workers))
        assert pipeline.num_steps_done <= 2 + 2
        text = engine.metrics.exposition().decode()
    assert 'latentmill_requests_total{route="/v1/images",status="499"} 1.0' in text
    assert "latentmill_requests_cancelled_total 1.0" in text


def test_a_client_that_leaves_the_queue_frees_its_places():
    with held_engine(max_queue=8) as (engine, pipeline):
        app = build_app(engine, engine._config)
        pipeline.free = False
        blocker = engine.submit(build_request("blocker"))
        wait_until(lambda: pipeline.batches)
        ask_and_leave(app, {"prompt": ["a"] * 8}, lambda: wait_until(lambda: len(engine._batcher)))
        assert len(engine._batcher) == 0
        pipeline.free = True
        pipeline.steps.release(10)
        assert blocker.future.result(20)


def test_a_body_over_the_limit_is_refused_before_it_has_been_read():
    chunks = iter(range(1000))
    with held_engine() as (engine, _):
        app = build_app(engine, engine._config)

        async def receive() -> dict[str, Any]:
            next(chunks)
            return {"type": "http.request", "body": b" " * 65536, "more_body": True}

        sent = call(app, receive)
    assert sent[0]["status"] == 413
    assert next(chunks) <= 20


def test_a_client_that_leaves_before_the_end_of_its_body_is_no_error_of_ours():
    with held_engine() as (engine, pipeline):
        app = build_app(engine, engine._config)
        messages = [
            {"type": "http.disconnect"},
            {"type": "http.request", "body": b"{", "more_body": True},
        ]

        async def receive() -> dict[str, Any]:
            return messages.pop()

        sent = call(app, receive)
    assert sent[0]["status"] == 499
    assert not pipeline.batches


def test_a_body_that_does_not_arrive_is_not_waited_for_for_ever():
    with held_engine(timeout_sec=0.05) as (engine, pipeline):
        app = build_app(engine, engine._config)
        pieces = iter([b"{"])

        async def receive() -> dict[str, Any]:
            if piece := next(pieces, None):
                return {"type": "http.request", "body": piece, "more_body": True}
            await asyncio.sleep(60)
            raise AssertionError("it was waited for")

        start, body = call(app, receive)
    assert start["status"] == 408
    assert (b"connection", b"close") in start["headers"]
    assert json.loads(body["body"])["error"]["code"] == "body_timed_out"
    assert not pipeline.batches
