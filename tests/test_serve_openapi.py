"""The server against its own OpenAPI document, by schemathesis: hostile and polite requests."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from helpers_serve import held_engine
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from serve.app import build_app

NUM_EXAMPLES = 30  # of each operation


@pytest.fixture
def app() -> Iterator[Any]:
    with held_engine() as (engine, _):
        yield build_app(engine, engine._config)


PATHS = ["/v1/images", "/invocations", "/ping", "/v1/info", "/metrics", "/"]


# What takes nothing can be asked nothing wrong.
CASES = [(path, GenerationMode.POSITIVE) for path in PATHS]
CASES += [(path, GenerationMode.NEGATIVE) for path in PATHS[:2]]


@pytest.mark.parametrize(("path", "mode"), CASES)
def test_no_request_gets_an_answer_that_the_document_does_not_have(app, path, mode):
    """Nor is a request refused that the document allows, nor one accepted that it does not."""
    operations = schemathesis.openapi.from_asgi("/openapi.json", app)
    operation = operations[path]["POST" if path in PATHS[:2] else "GET"]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any) -> None:
        case.call_and_validate()

    ask()


def test_the_paths_asked_are_all_that_the_document_has(app):
    assert sorted(TestClient(app).get("/openapi.json").json()["paths"]) == sorted(PATHS)


def test_every_way_out_of_a_request_for_images_is_documented(app):
    document = TestClient(app).get("/openapi.json").json()
    statuses = {"200", "400", "401", "408", "413", "415", "422", "429", "500", "503", "504"}
    for path in ("/v1/images", "/invocations"):
        assert statuses <= document["paths"][path]["post"]["responses"].keys()


def test_limits_and_defaults_are_in_the_document(app):
    document = TestClient(app).get("/openapi.json").json()
    body = document["paths"]["/v1/images"]["post"]["requestBody"]["content"]["application/json"]
    properties = body["schema"]["properties"]
    assert (
        properties["width"].items()
        >= {
            "minimum": 16,
            "maximum": 128,
            "multipleOf": 8,
            "default": 64,
        }.items()
    )
    assert properties["steps"]["maximum"] == 100
    assert body["schema"]["required"] == ["prompt"]
    assert body["schema"]["additionalProperties"] is False
