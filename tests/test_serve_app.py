"""The HTTP interface, in this process, around a pipeline that a test can hold."""

import base64
import io
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from helpers_serve import SIDE, client_of, error_of, held_engine, wait_until
from PIL import Image

from serve.app import build_app

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with client_of() as (client, _, _):
        yield client


def image_of(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))


# Images -------------------------------------------------------------------------------------------


def test_a_prompt_alone_gets_an_image_of_the_models_own_size(client):
    answer = client.post("/v1/images", json={"prompt": "a red circle"})
    assert answer.status_code == 200
    document = answer.json()
    (image,) = document["images"]
    assert image_of(base64.b64decode(image["png"])).size == (SIDE, SIDE)
    assert (image["prompt"], image["flagged"]) == ("a red circle", None)
    assert (document["width"], document["steps"], document["scheduler"]) == (SIDE, 25, "dpm++")
    assert document["warnings"] == []
    assert document["timings"].keys() == {"queued_sec", "generated_sec", "batch_size"}


def test_a_drawn_seed_is_told_and_gives_the_image_again(client):
    first = client.post("/v1/images", json={"prompt": "a"}).json()["images"][0]
    other = client.post("/v1/images", json={"prompt": "a"}).json()["images"][0]
    again = client.post("/v1/images", json={"prompt": "a", "seed": first["seed"]}).json()
    assert again["images"][0] == first
    assert other["png"] != first["png"]


def test_each_prompt_gets_the_seed_after_the_one_before(client):
    both = client.post("/v1/images", json={"prompt": ["a", "b"], "seed": 7}).json()["images"]
    assert [(image["prompt"], image["seed"]) for image in both] == [("a", 7), ("b", 8)]
    alone = client.post("/v1/images", json={"prompt": "b", "seed": 8}).json()["images"]
    assert alone == both[1:]


def test_a_png_carries_seed_and_warnings_in_its_headers(client):
    prompt = "one two three four five six\nseven «acht»"
    answer = client.post("/v1/images", json={"prompt": prompt, "seed": 3, "format": "png"})
    assert answer.headers["content-type"] == "image/png"
    assert image_of(answer.content).format == "PNG"
    assert answer.headers["x-seed"] == "3"
    assert "10 tokens, 7 are used" in answer.headers["x-warning"]
    assert "seven \\xabacht\\xbb" in answer.headers["x-warning"]


def test_every_field_has_its_effect(client):
    asked = {"width": 32, "height": 48, "steps": 3, "guidance": 1.5, "scheduler": "euler"}
    document = client.post("/v1/images", json={"prompt": "a", **asked}).json()
    assert {name: document[name] for name in asked} == asked
    assert image_of(base64.b64decode(document["images"][0]["png"])).size == (32, 48)


def test_the_warning_of_a_prompt_that_was_cut_is_in_the_answer(client):
    document = client.post("/v1/images", json={"prompt": "1 2 3 4 5 6 7"}).json()
    assert document["warnings"] == ["prompt has 9 tokens, 7 are used; not seen: '6 7'"]


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "code", "field"),
    [
        ({}, 422, "missing_field", "prompt"),
        ({"prompt": ""}, 422, "invalid_field", "prompt"),
        ({"prompt": []}, 422, "invalid_field", "prompt"),
        ({"prompt": None}, 422, "invalid_field", "prompt"),
        ({"prompt": ["a", 3]}, 422, "invalid_field", "prompt"),
        ({"prompt": ["a"] * 9}, 422, "invalid_field", "prompt"),
        ({"prompt": "x" * 4001}, 422, "invalid_field", "prompt"),
        ({"prompt": "a", "negative_prompt": ["b"]}, 422, "invalid_field", "negative_prompt"),
        ({"prompt": "a", "negative_prompt": None}, 422, "invalid_field", "negative_prompt"),
        ({"prompt": "a", "steps": 0}, 422, "invalid_field", "steps"),
        ({"prompt": "a", "steps": 101}, 422, "invalid_field", "steps"),
        ({"prompt": "a", "steps": 2.5}, 422, "invalid_field", "steps"),
        ({"prompt": "a", "steps": "20"}, 422, "invalid_field", "steps"),
        ({"prompt": "a", "steps": True}, 422, "invalid_field", "steps"),
        ({"prompt": "a", "guidance": 0.5}, 422, "invalid_field", "guidance"),
        ({"prompt": "a", "guidance": 20.1}, 422, "invalid_field", "guidance"),
        ({"prompt": "a", "seed": -1}, 422, "invalid_field", "seed"),
        ({"prompt": "a", "seed": 1 << 53}, 422, "invalid_field", "seed"),
        ({"prompt": "a", "width": 60}, 422, "invalid_field", "width"),
        ({"prompt": "a", "width": 8}, 422, "invalid_field", "width"),
        ({"prompt": "a", "height": 136}, 422, "invalid_field", "height"),
        ({"prompt": "a", "height": 10**30}, 422, "invalid_field", "height"),
        ({"prompt": "a", "scheduler": "none"}, 422, "invalid_field", "scheduler"),
        ({"prompt": "a", "format": "gif"}, 422, "invalid_field", "format"),
        ({"prompt": ["a", "b"], "format": "png"}, 422, "invalid_field", "format"),
        ({"prompt": "a", "stepz": 3}, 422, "unknown_field", "stepz"),
        ([1], 422, "invalid_field", None),
        ("a", 422, "invalid_field", None),
    ],
    ids=str,
)
def test_a_bad_field_is_named(client, body, status, code, field):
    answer = client.post("/v1/images", json=body)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["field"]) == (status, code, field)
    assert error["message"].startswith(field or "the body")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"prompt=a",
        b'{"prompt": "a", "guidance": NaN}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b"[" * 100_000,
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_is_not_json_is_refused(client, body):
    answer = client.post("/v1/images", content=body, headers=JSON)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "not_json")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_content_types_are_refused_as_browsers_send_them_unasked(client, content_type):
    body = b'{"prompt": "a"}'
    answer = client.post("/v1/images", content=body, headers={"content-type": content_type})
    assert (answer.status_code, error_of(answer)["code"]) == (415, "not_json")


def test_numbers_that_json_writes_with_a_point_are_whole_all_the_same(client):
    answer = client.post("/v1/images", content=b'{"prompt": "a", "steps": 2.0}', headers=JSON)
    assert answer.json()["steps"] == 2


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/images", 405), ("DELETE", "/ping", 405)],
)
def test_other_paths_and_methods_get_the_same_kind_of_answer(client, method, path, status):
    answer = client.request(method, path)
    assert answer.status_code == status
    assert error_of(answer)["field"] is None
    assert (status == 405) == ("allow" in answer.headers)


def test_an_image_that_is_not_finite_is_an_error_and_no_image(client):
    answer = client.post("/v1/images", json={"prompt": "not finite"})
    assert (answer.status_code, error_of(answer)["code"]) == (500, "not_finite")


def test_an_error_of_ours_is_told_without_its_insides():
    with client_of() as (client, pipeline, _):
        pipeline.failing = lambda prompts: RuntimeError("secret")
        answer = client.post("/v1/images", json={"prompt": "a"})
    assert (answer.status_code, error_of(answer)["code"]) == (500, "internal")
    assert "secret" not in answer.text


# State --------------------------------------------------------------------------------------------


def test_while_draining_ping_and_new_requests_are_503():
    with client_of() as (client, _, engine):
        assert client.get("/ping").json() == {"status": "ready"}
        engine.start_draining()
        for answer in (client.get("/ping"), client.post("/v1/images", json={"prompt": "a"})):
            assert (answer.status_code, error_of(answer)["code"]) == (503, "draining")
            assert "retry-after" in answer.headers
        assert client.get("/v1/info").status_code == 200


def test_a_device_that_failed_is_seen_by_ping():
    with client_of() as (client, pipeline, _):
        pipeline.failing = lambda prompts: RuntimeError("lost")
        client.post("/v1/images", json={"prompt": "a"})
        wait_until(lambda: client.get("/ping").status_code == 503)
        assert error_of(client.get("/ping"))["code"] == "failed"


# Token, figures, documents ------------------------------------------------------------------------


PROTECTED = [
    ("POST", "/v1/images"),
    ("POST", "/invocations"),
    ("GET", "/v1/info"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def guarded() -> Iterator[TestClient]:
    with client_of(token="the token") as (client, _, _):
        yield client


@pytest.mark.parametrize(("method", "path"), PROTECTED)
@pytest.mark.parametrize(
    "authorization",
    [None, "Bearer", "Bearer the", "Bearer the token!", "Basic the token", "Bearer ü"],
)
def test_without_the_token_nothing_is_answered(guarded, method, path, authorization):
    headers = {} if authorization is None else {"authorization": authorization.encode()}
    answer = guarded.request(method, path, headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_with_the_token_everything_is_answered(guarded):
    headers = {"authorization": "Bearer the token"}
    assert guarded.post("/v1/images", json={"prompt": "a"}, headers=headers).status_code == 200
    assert guarded.post("/invocations", json={"inputs": "a"}, headers=headers).status_code == 200
    assert guarded.get("/v1/info", headers=headers).status_code == 200
    assert guarded.get("/metrics", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/ping", "/", "/docs", "/openapi.json"])
def test_what_tells_nothing_needs_no_token(guarded, path):
    answer = guarded.get(path)
    assert answer.status_code == 200
    assert "the token" not in answer.text


def test_metrics_count_what_was_asked_and_made():
    with client_of() as (client, _, _):
        client.post("/v1/images", json={"prompt": ["a", "b"]})
        client.post("/v1/images", json={"prompt": ""})
        client.get("/no/such/path")
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    for line in (
        'latentmill_requests_total{route="/v1/images",status="200"} 1.0',
        'latentmill_requests_total{route="/v1/images",status="422"} 1.0',
        'latentmill_requests_total{route="other",status="404"} 1.0',
        "latentmill_images_total 2.0",
        "latentmill_queued_images 0.0",
        'latentmill_batch_size_bucket{le="2.0"} 1.0',
        "latentmill_queued_seconds_count 1.0",
        "latentmill_generated_seconds_count 1.0",
    ):
        assert line in answer.text


def test_two_servers_in_one_process_count_apart():
    with client_of() as (first, _, _), client_of() as (second, _, _):
        first.post("/v1/images", json={"prompt": "a"})
        assert "latentmill_images_total 1.0" in first.get("/metrics").text
        assert "latentmill_images_total 0.0" in second.get("/metrics").text


def test_info_tells_limits_that_requests_are_held_to(client):
    info = client.get("/v1/info").json()
    limits = info["limits"]
    assert info["defaults"]["width"] == SIDE
    assert info["safety_checker"] is None
    for side in (limits["min_side"], limits["max_side"]):
        body = {"prompt": "a", "width": side, "height": side, "steps": 1}
        assert client.post("/v1/images", json=body).status_code == 200
    for side in (limits["min_side"] - 8, limits["max_side"] + 8):
        assert client.post("/v1/images", json={"prompt": "a", "width": side}).status_code == 422


def test_the_end_of_the_application_ends_the_engine():
    with held_engine() as (engine, _):
        with TestClient(build_app(engine, engine._config)) as client:
            assert client.get("/ping").status_code == 200
        assert not engine.is_ready
        assert not any(worker._thread.is_alive() for worker in engine._workers)


def test_a_path_with_a_slash_too_many_is_told_and_never_redirected(client):
    answer = client.post("/v1/images/", json={"prompt": "a"}, follow_redirects=False)
    assert (answer.status_code, error_of(answer)["code"]) == (404, "not_found")
    assert "location" not in answer.headers
