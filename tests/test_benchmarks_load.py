"""The load test: what a server does is counted as it was, and bounded in number and time."""

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers_deployment import (
    Answer,
    FakeServer,
    build_pipeline_folder,
    fake_server,
    refusal,
)

from benchmarks.__main__ import main
from benchmarks.load.clients import OK, MemoryWatch, closed_loop, open_loop, resident_mib
from benchmarks.load.load import LoadConfig, measure, print_table
from serve.client import Client
from serve.deployment import all_deployments, state_folder
from shards.errors import UserError

INFO = {
    "source": "fake",
    "devices": ["cpu"],
    "defaults": {"width": 8, "height": 8, "steps": 25},
    "limits": {"max_queue": 4, "max_batch_size": 2},
}
QUICK = {"duration_sec": 0.5, "num_clients": 4, "out": "-"}


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """It answers well."""
    with fake_server() as server:
        server.answer = lambda path, *_: answer_of(path)
        yield server


def answer_of(path: str, status: int = 200) -> Answer:
    if path == "/v1/info":
        return Answer(body=json.dumps(INFO).encode())
    if status == 200:
        return Answer()
    return Answer(status, refusal("x", "not now"), {"retry-after": "1"})


def every_other(status: int):
    """Refuses one request, and answers one."""
    return lambda path, _, number: answer_of(path, status if number % 2 else 200)


def test_a_closed_loop_asks_no_more_than_it_may(server):
    samples = closed_loop(
        Client(server.url),
        [{"prompt": "a"}, {"prompt": ["b", "c"], "steps": 3}],
        num_clients=3,
        max_requests=20,
        duration_sec=60,
    )
    assert len(samples) == len(server.asked) == 20
    assert [sample.outcome for sample in samples] == [OK] * 20
    assert sum(sample.num_images for sample in samples) == 10 + 20
    assert sorted(body["seed"] for _, _, body in server.asked) == list(range(20))
    assert {sample.queued_sec for sample in samples} == {0.1}


def test_a_closed_loop_never_has_more_under_way_than_it_has_clients(server):
    lock, under_way, most = threading.Lock(), 0, 0

    def answer(path, *_):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.01)
        with lock:
            under_way -= 1
        return answer_of(path)

    server.answer = answer
    limits = {"num_clients": 3, "max_requests": 30, "duration_sec": 60.0}
    closed_loop(Client(server.url), [{"prompt": "a"}], **limits)
    assert most == 3


def test_a_closed_loop_ends_with_its_time(server):
    samples = closed_loop(
        Client(server.url), [{"prompt": "a"}], num_clients=2, max_requests=10**9, duration_sec=0.2
    )
    assert 2 <= len(samples) == len(server.asked)
    assert max(sample.due_sec for sample in samples) <= 0.2


def test_an_open_loop_keeps_its_rate_however_slow_the_server_is(server):
    release = threading.Event()

    def answer(path, *_):
        if len(server.asked) >= 12:
            release.set()  # all are there at once: none has waited for another's answer
        release.wait(30)
        return answer_of(path)

    server.answer = answer
    samples = open_loop(
        Client(server.url), [{"prompt": "a"}], rate_per_sec=200, num_requests=12, max_in_flight=12
    )
    assert [sample.due_sec for sample in samples] == [number / 200 for number in range(12)]
    assert {sample.outcome for sample in samples} == {OK}


def test_what_the_clients_are_late_with_counts(server):
    """One client for requests that all are due at once: each waits for those before it."""
    server.answer = lambda path, *_: time.sleep(0.02) or answer_of(path)
    samples = open_loop(
        Client(server.url), [{"prompt": "a"}], rate_per_sec=1e6, num_requests=5, max_in_flight=1
    )
    latencies = [sample.latency_sec for sample in samples]
    assert latencies == sorted(latencies)
    assert latencies[-1] >= 5 * 0.02


def test_refusals_and_errors_are_counted_by_kind_and_not_asked_again(server):
    bodies = [{"prompt": "a"}]
    for status in (429, 500, 504):
        server.asked.clear()
        server.answer = every_other(status)
        samples = open_loop(
            Client(server.url), bodies, rate_per_sec=500, num_requests=10, max_in_flight=1
        )
        outcomes = [sample.outcome for sample in samples]
        assert (outcomes.count(OK), outcomes.count(str(status))) == (5, 5)
        assert len(server.asked) == 10
    with fake_server() as gone:
        pass
    (lost,) = open_loop(Client(gone.url), bodies, rate_per_sec=1, num_requests=1, max_in_flight=1)
    assert (lost.outcome, lost.num_images) == ("none", 0)


def test_the_document_has_every_sample_and_figures_that_follow_from_them(server):
    server.answer = every_other(429)
    document = measure(LoadConfig(url=server.url, **QUICK, loads=(1.0, 3.0), max_requests=40))
    assert [part["load"] for part in document["parts"]] == ["closed", "1x", "3x"]
    for part in document["parts"]:
        samples = part["samples"]
        assert len(set(map(len, samples.values()))) == 1
        assert len(samples["outcome"]) == part["num_requests"] <= 40
        accepted = np.array(samples["outcome"]) == OK
        assert part["refused_frac"] == pytest.approx(1 - accepted.mean())
        latency = np.array(samples["latency_sec"])[accepted]
        p99 = np.percentile(latency, 99)
        assert part["latency_sec"]["p99"] == pytest.approx(p99, abs=1e-4)  # as samples are rounded
        rate = accepted.sum() / part["duration_sec"]
        assert part["images_per_sec"] == pytest.approx(rate)
        assert part["errors"] == {}
        assert part["memory_mib"] is None  # of a server that is not ours nothing is known
    capacity, *offered = document["parts"]
    rate = capacity["images_per_sec"]
    assert document["capacity_images_per_sec"] == rate
    assert [part["offered_images_per_sec"] for part in offered] == pytest.approx([rate, 3 * rate])
    assert capacity["bound_sec"] == pytest.approx((4 + 2 * 2) / rate)


def test_errors_show_in_the_table(server, capsys):
    server.answer = every_other(500)
    document = measure(LoadConfig(url=server.url, **QUICK, loads=(2.0,), max_requests=20))
    print_table(document)
    said = capsys.readouterr().out
    assert f"{document['parts'][1]['errors']['500']} times 500" in said
    assert "not seen" in said


def test_every_size_is_asked_with_every_number_of_steps(server):
    measure(
        LoadConfig(
            url=server.url,
            **QUICK,
            sizes="64x64, 32x48",
            step_counts="2,5",
            prompts_per_request=2,
            loads=(1.0,),
            max_requests=16,
        )
    )
    bodies = [body for path, _, body in server.asked if path == "/v1/images"]
    kinds = {(body["width"], body["height"], body["steps"]) for body in bodies}
    assert kinds == {(64, 64, 2), (64, 64, 5), (32, 48, 2), (32, 48, 5)}
    assert {len(body["prompt"]) for body in bodies} == {2}


def test_a_server_that_makes_no_image_is_an_error_and_no_result(server):
    server.answer = lambda path, *_: answer_of(path, 422)
    with pytest.raises(UserError, match=r"made no image \(\d+ times 422\)"):
        measure(LoadConfig(url=server.url, **QUICK))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "--url or --source"),
        ({"url": "http://127.0.0.1:1", "source": "x"}, "--url or --source"),
        ({"url": "http://192.0.2.1:80"}, "another machine"),
        ({"url": "http://127.0.0.1.test"}, "another machine"),
        ({"url": "http://127.0.0.1:1", "max_requests": 0}, "--max-requests"),
        ({"url": "http://127.0.0.1:1", "duration_sec": -1}, "--duration-sec"),
        ({"url": "http://127.0.0.1:1", "loads": (0.0,)}, "--loads"),
        ({"url": "http://127.0.0.1:1", "num_clients": -1}, "--num-clients"),
        ({"url": "http://127.0.0.1:1"}, "no answer"),
    ],
)
def test_a_load_that_makes_no_sense_is_refused(options, why):
    with pytest.raises(UserError, match=why):
        measure(LoadConfig(**options))


@pytest.mark.parametrize(
    "options", [{"sizes": "64"}, {"sizes": "64x64,"}, {"sizes": "axb"}, {"step_counts": "ten"}]
)
def test_lists_that_cannot_be_read_are_refused(server, options):
    with pytest.raises(UserError, match="wanted a list such as"):
        measure(LoadConfig(url=server.url, **options))


def test_memory_is_looked_at_while_it_is_watched():
    with MemoryWatch(os.getpid(), every_sec=0.001) as memory:
        while len(memory.samples_mib) < 3:
            time.sleep(0.001)
    seen = len(memory.samples_mib)
    assert min(memory.samples_mib) > 1
    time.sleep(0.01)
    assert len(memory.samples_mib) == seen
    assert resident_mib(2**22 + 1) == 0.0  # above every process number


def test_a_server_of_its_own_is_started_loaded_and_ended(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("LATENTMILL_TOKEN", "secret-of-the-test")
    source = build_pipeline_folder(tmp_path / "pipeline")
    out = tmp_path / "load.json"
    options = ["--max-queue=8", "--max-batch-size=2", "--step-counts=2,4", "--duration-sec=1"]
    main(["load", f"--source={source}", *options, "--loads", "1", "4", f"--out={out}"])
    said = capfd.readouterr().out
    document = json.loads(said.splitlines()[-1])
    assert document == json.loads(out.read_text())
    assert document["theme"] == "load"
    assert document["server"]["limits"]["max_queue"] == 8
    assert [part["errors"] for part in document["parts"]] == [{}, {}, {}]
    assert all(part["memory_mib"]["before"] > 100 for part in document["parts"])
    assert document["capacity_images_per_sec"] > 0
    assert "secret-of-the-test" not in said
    assert all_deployments() == []
    assert list(state_folder().iterdir()) == []  # not even a log


def test_a_server_that_stops_making_images_after_the_warm_up_has_no_capacity(server):
    # /v1/info and 8 requests come first.
    server.answer = lambda path, _, number: answer_of(path, 503 if number >= 9 else 200)
    with pytest.raises(UserError, match=r"made no image \(\d+ times 503\)"):
        measure(LoadConfig(url=server.url, **QUICK))


def test_for_requests_of_several_kinds_no_bound_is_claimed(server, capsys):
    document = measure(
        LoadConfig(url=server.url, **QUICK, step_counts="2,5", loads=(1.0,), max_requests=20)
    )
    assert [part["bound_sec"] for part in document["parts"]] == [None, None]
    print_table(document)
    assert "none for requests of several kinds" in capsys.readouterr().out
