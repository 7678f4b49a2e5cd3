"""`POST /invocations`: what a SageMaker real-time endpoint sends to its container.

The platform starts the container with the model unpacked in /opt/ml/model, asks `/ping` on port
8080 until it gets 200, and forwards each call of InvokeEndpoint as `POST /invocations` with the
caller's Content-Type and Accept, its CustomAttributes as a header, and headers of its own; those
are not read here. It gives a container 60 seconds for an answer, and bodies and answers 6 MB. It
authenticates callers itself, and has no way to send a bearer token:

    python -m serve run --source /opt/ml/model --host 0.0.0.0 --port 8080 --allow-anonymous
"""

from __future__ import annotations

import asyncio
import base64
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, create_model

from serve.answer import ErrorAnswer, error_answers, png_answer, warnings_of
from serve.config import ServeConfig
from serve.engine import Engine
from serve.generator import ModelFacts
from serve.job import ImageRequest, Job, ServedImage
from serve.refusal import RefusedError
from serve.request import (
    StrictModel,
    build_request_model,
    common_fields,
    prompt_type,
    read_json,
    step_fields,
    to_image_request,
    validate,
    whole_number,
)
from serve.waiting import Deadline, images_of

TIMEOUT_SEC = 58.0  # so that the caller learns from us why there is no answer
MAX_ANSWER_BYTES = 6_000_000
_RENAMED = {"steps": "num_inference_steps", "guidance": "guidance_scale"}  # as diffusers calls them
# Several images of one prompt, or one of each of several.
_IMAGES_OF_ONE: Any = {
    "if": {"properties": {"inputs": {"type": "array"}}},
    "then": {"properties": {"parameters": {"properties": {"num_images_per_prompt": {"const": 1}}}}},
}


class InvocationAnswer(BaseModel):
    """The answer to `POST /invocations`."""

    generated_images: list[str] = Field(description="PNG files in base64.")
    seeds: list[int]
    flagged: list[bool | None]
    warnings: list[str]


def add_invocations(
    app: FastAPI, engine: Engine, config: ServeConfig, protection: list[Any]
) -> None:
    """Add the route to the application."""
    own = build_request_model(config, engine.facts)
    theirs = build_invocation_model(config, engine.facts)
    schema = {"oneOf": [_inlined(theirs), own.model_json_schema()]}
    timeout_sec = min(config.timeout_sec, TIMEOUT_SEC)

    @app.post(
        "/invocations",
        summary="Generate images, as SageMaker asks for them",
        dependencies=protection,
        response_class=Response,
        responses={
            200: {
                "description": "The images, or with Accept: image/png the one image.",
                "model": InvocationAnswer,
                "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
            },
            406: {"description": "Several images, and Accept: image/png.", "model": ErrorAnswer},
            **error_answers(),
        },
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}
        },
    )
    async def invocations(http: Request) -> Response:
        deadline = Deadline(timeout_sec)
        document = await read_json(http, config.limits.max_body_bytes, deadline.left_sec)
        is_own = not isinstance(document, dict) or "prompt" in document
        fields = validate(own if is_own else theirs, document)
        request = to_image_request(fields if is_own else _own_fields(fields))
        wants_png = _wants_png(http) or (is_own and fields.format == "png")
        if wants_png and len(request.prompts) > 1:
            raise RefusedError(406, "not_acceptable", f"{len(request.prompts)} images are no PNG")
        job, images = await images_of(engine, http, request, deadline)
        if wants_png:
            return _checked(png_answer(job, images))
        return _checked(await asyncio.to_thread(_json_answer, job, images))


def build_invocation_model(config: ServeConfig, facts: ModelFacts) -> type[BaseModel]:
    """`{"inputs": …, "parameters": {…}}`, as the examples of the platform have it."""
    steps = {_RENAMED[name]: field for name, field in step_fields(config).items()}
    several = whole_number(1, config.limits.max_prompts)
    parameters = create_model(
        "InvocationParameters",
        __base__=StrictModel,
        num_images_per_prompt=(several, Field(1, description="Of one text alone.")),
        **steps,
        **common_fields(config, facts),
    )
    model: type[BaseModel] = create_model(
        "Invocation",
        __base__=StrictModel,
        inputs=(prompt_type(config, "What to show."), ...),
        parameters=(parameters, Field(default_factory=parameters)),
    )
    model.model_config["json_schema_extra"] = _IMAGES_OF_ONE
    model.model_rebuild(force=True)
    return model


def _inlined(model: type[BaseModel]) -> dict[str, Any]:
    """Its schema without references, which would point into the wrong document."""
    schema = model.model_json_schema()
    schema["properties"]["parameters"] = schema.pop("$defs")["InvocationParameters"]
    return schema


def _own_fields(fields: Any) -> Any:
    """An `Invocation` as the `ImagesRequest` that it amounts to."""
    parameters, prompt = fields.parameters, fields.inputs
    if parameters.num_images_per_prompt > 1:
        if not isinstance(prompt, str):
            name = "num_images_per_prompt"
            raise RefusedError(
                422,
                "invalid_field",
                f"parameters.{name}: is for one text alone",
                field=f"parameters.{name}",
            )
        prompt = [prompt] * parameters.num_images_per_prompt
    return SimpleNamespace(
        **(
            parameters.model_dump()
            | {own: getattr(parameters, theirs) for own, theirs in _RENAMED.items()}
            | {"prompt": prompt, "format": "json"}
        )
    )


def _wants_png(http: Request) -> bool:
    accepted = http.headers.get("accept", "")
    return "image/png" in accepted and "application/json" not in accepted


def _json_answer(job: Job, images: list[ServedImage]) -> Response:
    request: ImageRequest = job.request
    answer = InvocationAnswer(
        generated_images=[base64.b64encode(image.png).decode() for image in images],
        seeds=[request.seed_of(index) for index in range(len(images))],
        flagged=[image.flagged for image in images],
        warnings=warnings_of(images),
    )
    return Response(answer.model_dump_json(), media_type="application/json")


def _checked(answer: Response) -> Response:
    """The platform would cut the connection, and the caller would not learn why."""
    if len(answer.body) > MAX_ANSWER_BYTES:
        found = f"the answer has {len(answer.body)} bytes, and the platform takes 6 MB"
        raise RefusedError(413, "answer_too_large", f"{found}; ask for fewer or smaller images")
    return answer
