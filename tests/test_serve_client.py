"""The client: what a server says reaches the user, and a full one is asked again for a while."""

import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from helpers_deployment import PNG, Answer, FakeServer, fake_server, refusal

import serve.client
from serve.client import Client, ServerError
from shards.errors import UserError


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the client would have waited; other threads sleep as ever."""
    waited: list[float] = []
    clock = SimpleNamespace(sleep=waited.append, monotonic=time.monotonic)
    monkeypatch.setattr(serve.client, "time", clock)
    return waited


def busy(times: int, status: int = 429, **headers: str):
    """So many refusals, and then an answer."""
    body = refusal("queue_full", "the queue is full")

    def answer(path, asked, number):
        return Answer(status, body, headers) if number < times else Answer()

    return answer


def test_images_come_back_with_their_prompts_and_seeds(server):
    images = Client(server.url).images(["a lion", "a leaf"], seed=7, steps=3, width=None)
    assert [(image.prompt, image.seed, image.flagged) for image in images] == [
        ("a lion", 7, None),
        ("a leaf", 8, None),
    ]
    assert all(image.png == PNG for image in images)
    (asked,) = server.asked
    assert asked[0] == "/v1/images"
    assert asked[2] == {"prompt": ["a lion", "a leaf"], "seed": 7, "steps": 3}


def test_a_reply_has_the_settings_that_were_used_the_warnings_and_the_times(server):
    reply = Client(server.url + "/").generate("a lion")
    assert reply.settings["steps"] == 25
    assert reply.warnings == []
    assert reply.timings["batch_size"] == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_full_server_is_asked_again_when_it_says_to(server, waits, status):
    server.answer = busy(2, status, **{"retry-after": "3"})
    assert len(Client(server.url).images("a lion")) == 1
    assert len(server.asked) == 3
    assert all(3 < wait < 4 for wait in waits)


def test_a_server_that_stays_full_is_given_up(server, waits, monkeypatch):
    server.answer = busy(10**9, **{"retry-after": "20"})
    clock = iter(range(0, 10**6, 25))
    monkeypatch.setattr(serve.client.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(ServerError, match="the queue is full") as raised:
        Client(server.url, patience_sec=120).images("a lion")
    assert raised.value.status == 429
    assert raised.value.code == "queue_full"
    assert raised.value.retry_after_sec == 20
    assert 1 < len(server.asked) < 8


def test_what_takes_longer_than_ones_patience_is_not_waited_for_at_all(server, waits):
    server.answer = busy(1, **{"retry-after": "3600"})
    with pytest.raises(ServerError, match="queue is full"):
        Client(server.url, patience_sec=60).images("a lion")
    assert (len(server.asked), waits) == (1, [])


@pytest.mark.parametrize("header", ["soon", "Wed, 21 Oct 2026 07:28:00 GMT", "-5", "1e9", ""])
def test_an_odd_retry_after_is_no_reason_to_wait_for_ever_or_to_crash(server, waits, header):
    server.answer = busy(1, **{"retry-after": header})
    assert len(Client(server.url).images("a lion")) == 1
    assert [0 < wait < 2 for wait in waits] == [True]


def test_post_asks_once(server, waits):
    server.answer = busy(1)
    with pytest.raises(ServerError, match="queue is full"):
        Client(server.url).post({"prompt": "a lion"})
    assert (len(server.asked), waits) == (1, [])


@pytest.mark.parametrize("status", [400, 401, 413, 422, 500, 504])
def test_a_refusal_is_told_in_the_servers_words_and_not_tried_again(server, waits, status):
    body = refusal("bad_field", "must be a multiple of 8", "width")
    server.answer = lambda *_: Answer(status, body)
    with pytest.raises(UserError, match=rf"width: must be .* of 8 \(status {status}\)") as raised:
        Client(server.url).images("a lion", width=7)
    assert raised.value.status == status
    assert raised.value.code == "bad_field"
    assert (len(server.asked), waits) == (1, [])


@pytest.mark.parametrize(
    "body", [b"<html>bad gateway</html>", b"", b"[1]", b'{"error": "x"}', b"\xff\xfe", b"[" * 99999]
)
def test_an_error_in_another_form_is_told_as_it_is(server, body):
    server.answer = lambda *_: Answer(502, body)
    with pytest.raises(ServerError, match=r"\(status 502\)") as raised:
        Client(server.url).images("a lion")
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "body",
    [
        b"not json",
        b"[]",
        b"{}",
        b'{"images": [{}]}',
        b'{"images": 5}',
        b'{"images": [{"png": "%%%", "prompt": "x", "seed": 1, "flagged": null}]}',
    ],
)
def test_an_answer_of_another_form_is_an_error_and_no_image(server, body):
    server.answer = lambda *_: Answer(200, body)
    with pytest.raises(ServerError):
        Client(server.url).images("a lion")


def test_an_answer_that_is_cut_short_is_an_error(server):
    server.answer = lambda *_: Answer(200, b"{", {"content-length": "1000", "connection": "close"})
    with pytest.raises(ServerError, match="no answer"):
        Client(server.url).images("a lion")


def test_where_nothing_listens_it_is_said_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ServerError, match=r"no answer .*refused"):
            Client(url).images("a lion")
        assert not Client(url).is_ready()


def test_a_server_that_hangs_is_left_after_a_time(server):
    over = threading.Event()

    def hang(*_):
        over.wait(10)
        return Answer()

    server.answer = hang
    try:
        with pytest.raises(ServerError, match=r"no answer within 0\.1 s"):
            Client(server.url, timeout_sec=0.1).images("a lion")
    finally:
        over.set()


def test_what_is_not_http_is_told():
    odd = ("http://[::1", "http://localhost:70000", "http://localhost:port")
    for url in ("", "127.0.0.1:8000", "file:///etc/passwd", "http://", "ftp://localhost", *odd):
        with pytest.raises(UserError, match="--url"):
            Client(url)


def test_a_token_goes_to_its_server_and_never_along_with_a_redirect(server):
    with fake_server() as other:
        for status in (301, 302, 303, 307, 308):
            server.answer = lambda *_, status=status: Answer(
                status, b"", {"location": other.url + "/v1/images"}
            )
            with pytest.raises(ServerError, match=rf"\(status {status}\)"):
                Client(server.url, "secret").images("a lion")
            with pytest.raises(ServerError, match=rf"\(status {status}\)"):
                Client(server.url, "secret").info()
        assert other.asked == []
    headers = {name.lower(): value for name, value in server.asked[0][1].items()}
    assert headers["authorization"] == "Bearer secret"


def test_no_token_no_header(server):
    Client(server.url).images("a lion")
    assert "authorization" not in {name.lower() for name in server.asked[0][1]}


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(server, monkeypatch):
    with fake_server() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        Client(server.url).images("a lion")
        assert proxy.asked == []


def test_a_server_of_another_kind_is_told_and_has_no_limits(server):
    for body in (b"{}", b'{"limits": 3}', b'{"limits": {"max_prompts": "many"}}'):
        server.answer = lambda *_, body=body: Answer(200, body)
        with pytest.raises(ServerError, match="no server of this kind"):
            _ = Client(server.url).max_prompts
