"""`/invocations`: what the platform's callers send, and what they get."""

import base64
import json
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from helpers_serve import build_config, held_engine, wait_until

import serve.sagemaker
from serve.app import build_app


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with held_engine() as (engine, _), TestClient(build_app(engine, engine._config)) as client:
        yield client


def test_inputs_alone_get_an_image_in_base64(client):
    answer = client.post("/invocations", json={"inputs": "a red circle"})
    document = answer.json()
    assert answer.status_code == 200
    assert base64.b64decode(document["generated_images"][0]).startswith(b"\x89PNG")
    assert document["flagged"] == [None]


def test_parameters_have_the_names_that_diffusers_gives_them(client):
    parameters = {"num_inference_steps": 3, "guidance_scale": 1.5, "width": 32, "height": 48}
    asked = {"inputs": "a", "parameters": {**parameters, "seed": 7, "scheduler": "euler"}}
    theirs = client.post("/invocations", json=asked).json()
    ours = {"prompt": "a", "steps": 3, "guidance": 1.5, "width": 32, "height": 48}
    image = client.post("/v1/images", json={**ours, "seed": 7, "scheduler": "euler"}).json()
    assert theirs["generated_images"] == [image["images"][0]["png"]]
    assert theirs["seeds"] == [7]


def test_several_images_of_one_text_have_seeds_in_a_row(client):
    asked = {"inputs": "a", "parameters": {"num_images_per_prompt": 3, "seed": 5}}
    document = client.post("/invocations", json=asked).json()
    assert document["seeds"] == [5, 6, 7]
    assert len(set(document["generated_images"])) == 3


def test_several_texts_get_an_image_each(client):
    assert len(client.post("/invocations", json={"inputs": ["a", "b"]}).json()["seeds"]) == 2


def test_the_body_of_our_own_interface_is_taken_as_well(client):
    document = client.post("/invocations", json={"prompt": "a", "seed": 3}).json()
    assert document["seeds"] == [3]
    answer = client.post("/invocations", json={"prompt": "a", "format": "png"})
    assert answer.headers["content-type"] == "image/png"


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("image/png", "image/png"),
        ("application/json", "application/json"),
        ("*/*", "application/json"),
        ("application/json, image/png", "application/json"),
        ("image/png;q=0.9, */*", "image/png"),
    ],
)
def test_accept_decides_between_a_png_and_json(client, accept, content_type):
    answer = client.post("/invocations", json={"inputs": "a"}, headers={"accept": accept})
    assert answer.headers["content-type"] == content_type


def test_headers_of_the_platform_change_nothing(client):
    asked = {"inputs": "a", "parameters": {"seed": 1}}
    headers = {
        "X-Amzn-SageMaker-Custom-Attributes": "c000b4f9-df62-4c85-a0bf-7c525f9104a4",
        "X-Amzn-SageMaker-Target-Variant": "v",
        "X-Amzn-SageMaker-Inference-Id": "1",
    }
    plain = client.post("/invocations", json=asked).json()
    assert client.post("/invocations", json=asked, headers=headers).json() == plain


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({}, 422, "inputs"),
        ({"inputs": ""}, 422, "inputs"),
        ({"inputs": 3}, 422, "inputs"),
        ({"inputs": "a", "extra": 1}, 422, "extra"),
        ({"inputs": "a", "parameters": None}, 422, "parameters"),
        ({"inputs": "a", "parameters": {"steps": 3}}, 422, "parameters.steps"),
        ({"inputs": "a", "parameters": {"width": 7}}, 422, "parameters.width"),
        ({"inputs": "a", "prompt": "b"}, 422, "inputs"),
        (
            {"inputs": ["a"], "parameters": {"num_images_per_prompt": 2}},
            422,
            "parameters.num_images_per_prompt",
        ),
    ],
    ids=str,
)
def test_a_bad_field_is_named(client, body, status, field):
    answer = client.post("/invocations", json=body)
    assert (answer.status_code, answer.json()["error"]["field"]) == (status, field)


def test_several_images_are_no_png(client):
    headers = {"accept": "image/png"}
    answer = client.post("/invocations", json={"inputs": ["a", "b"]}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (406, "not_acceptable")


@pytest.mark.parametrize("accept", ["application/json", "image/png"])
def test_an_answer_that_the_platform_would_cut_is_refused_with_the_reason(
    client, monkeypatch, accept
):
    monkeypatch.setattr(serve.sagemaker, "MAX_ANSWER_BYTES", 50)
    answer = client.post("/invocations", json={"inputs": "a"}, headers={"accept": accept})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "answer_too_large")


def test_the_caller_learns_of_a_timeout_before_the_platform_gives_up(monkeypatch):
    monkeypatch.setattr(serve.sagemaker, "TIMEOUT_SEC", 0.3)
    with held_engine(timeout_sec=1000) as (engine, pipeline):
        pipeline.free = False
        with TestClient(build_app(engine, engine._config)) as client:
            answer = client.post("/invocations", json={"inputs": "a"})
            assert answer.json()["error"]["code"] == "timed_out"
            pipeline.free = True
            pipeline.steps.release(100)
            wait_until(lambda: engine.is_ready)
    assert build_config().timeout_sec > serve.sagemaker.TIMEOUT_SEC


def test_a_cut_prompt_is_told_of(client):
    body = json.dumps({"inputs": "1 2 3 4 5 6 7"})
    answer = client.post("/invocations", content=body, headers={"content-type": "application/json"})
    assert answer.json()["warnings"] == ["prompt has 9 tokens, 7 are used; not seen: '6 7'"]
