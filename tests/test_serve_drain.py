"""SIGTERM: accepted requests finish, new ones go elsewhere, and it does not take for ever.

The server runs in this process and in its main thread, where signals arrive.
"""

import json
import os
import signal
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from helpers_serve import WAIT_SEC, HeldPipeline, build_config, wait_until

import serve.server
from serve.engine import Engine

Ask = Callable[..., tuple[int, bytes]]


@pytest.fixture
def run_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """`run_with(client, **settings)`: serve until a signal, with `client(ask, pipeline)` beside it.

    What the client returns is returned; its errors are raised.
    """

    def run(client: Callable[[Ask, HeldPipeline], Any], **settings: Any) -> Any:
        pipeline = HeldPipeline()
        monkeypatch.setattr(
            serve.server, "Engine", lambda config: Engine(config, lambda *_: pipeline)
        )
        with socket.create_server(("127.0.0.1", 0)) as trial:
            port = trial.getsockname()[1]
        results: list[Any] = []

        def ask(path: str, document: Any = None) -> tuple[int, bytes]:
            return _ask(f"http://127.0.0.1:{port}{path}", document)

        def use() -> None:
            try:
                wait_until(lambda: ask("/ping")[0] == 200)
                results.append(client(ask, pipeline))
            except BaseException as error:
                results.append(error)
                os.kill(os.getpid(), signal.SIGTERM)  # so that the test ends
            finally:
                pipeline.free = True
                pipeline.steps.release(10_000)

        user = threading.Thread(target=use)
        user.start()
        serve.server.run_server(build_config(port=port, **settings))
        user.join()
        (result,) = results
        if isinstance(result, BaseException):
            raise result
        return result

    return run


def _ask(url: str, document: Any) -> tuple[int, bytes]:
    data = None if document is None else json.dumps(document).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=WAIT_SEC) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


def begin(ask: Ask, pipeline: HeldPipeline, *prompts: str) -> list[tuple[int, bytes]]:
    """Ask in the background, and wait until the first image is being generated."""
    pipeline.free = False
    pipeline.batches.clear()
    answers: list[tuple[int, bytes]] = []
    for prompt in prompts:
        body = {"prompt": prompt, "steps": 3}
        threading.Thread(target=lambda body=body: answers.append(ask("/v1/images", body))).start()
        wait_until(lambda: pipeline.batches)
    opened = f"latentmill_open_requests {len(prompts)}.0".encode()
    wait_until(lambda: opened in ask("/metrics")[1])
    return answers


def test_requests_in_flight_and_in_the_queue_are_answered(run_with):
    def client(ask: Ask, pipeline: HeldPipeline) -> None:
        answers = begin(ask, pipeline, "in flight", "in the queue")
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: ask("/ping")[0] == 503)
        assert ask("/v1/images", {"prompt": "late"})[0] == 503
        assert not answers
        pipeline.steps.release(100)
        wait_until(lambda: len(answers) == 2)
        assert [status for status, _ in answers] == [200, 200]
        wait_until(lambda: ask("/ping")[0] == 0)

    run_with(client, max_batch_size=1)


def test_what_does_not_finish_in_time_is_told_so_and_the_server_ends(run_with):
    def client(ask: Ask, pipeline: HeldPipeline) -> None:
        answers = begin(ask, pipeline, "in flight")
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: answers)
        assert answers[0][0] == 503
        assert json.loads(answers[0][1])["error"]["code"] == "draining"

    run_with(client, drain_sec=0.1)


def test_a_second_signal_does_not_wait(run_with):
    def client(ask: Ask, pipeline: HeldPipeline) -> None:
        begin(ask, pipeline, "in flight")
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: ask("/ping")[0] == 503)
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: ask("/ping")[0] == 0)

    run_with(client, drain_sec=1000)


def test_an_idle_server_ends_at_once(run_with):
    def client(ask: Ask, pipeline: HeldPipeline) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: ask("/ping")[0] == 0)

    run_with(client, drain_sec=1000)


def test_a_signal_before_the_first_request_can_come_ends_the_server(monkeypatch):
    class Hasty(uvicorn.Server):
        async def _serve(self, sockets: Any = None) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            await super()._serve(sockets)

    monkeypatch.setattr(uvicorn, "Server", Hasty)
    monkeypatch.setattr(
        serve.server, "Engine", lambda config: Engine(config, lambda *_: HeldPipeline())
    )
    serve.server.run_server(build_config(port=0, drain_sec=1000))
