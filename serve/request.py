"""Requests: what may be asked for, as a model that is also their documentation; and reading one."""

from __future__ import annotations

import asyncio
import secrets
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    create_model,
)
from pydantic_core import from_json

from evaluate.schedulers import SCHEDULERS
from serve.config import ServeConfig
from serve.generator import ModelFacts
from serve.job import NUM_SEEDS, ImageRequest, Kind
from serve.refusal import RefusedError

_CODES = {"extra_forbidden": "unknown_field", "missing": "missing_field"}
_NUM_DRAWN_SEEDS = 1 << 32  # short enough to be copied by hand
_MAX_NAMED_FIELDS = 5
_JSON = "application/json"
_TAGS = _ONE, _MANY = "<one>", "<many>"

# A PNG has room for one image.
_PNG_OF_ONE: Any = {
    "if": {"properties": {"format": {"const": "png"}}, "required": ["format"]},
    "then": {"properties": {"prompt": {"anyOf": [{"type": "string"}, {"maxItems": 1}]}}},
}


class StrictModel(BaseModel):
    """Types as JSON has them, and no field that is not known."""

    model_config = ConfigDict(extra="forbid", strict=True)


def _to_whole(value: Any) -> Any:
    """JSON has one kind of number: 64.0 is 64."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def whole_number(least: int, most: int, multiple_of: int = 1) -> Any:
    """The type of an integer within limits, which its schema states."""
    limits = Field(ge=least, le=most, multiple_of=multiple_of)
    return Annotated[int, limits, BeforeValidator(_to_whole)]


def prompt_type(config: ServeConfig, about: str) -> Any:
    """A text, or a list of texts; an error is told of the one that was sent."""
    text = Annotated[str, Field(min_length=1, max_length=config.limits.max_prompt_chars)]
    texts = Annotated[list[text], Field(min_length=1, max_length=config.limits.max_prompts)]
    return Annotated[
        Annotated[text, Tag(_ONE)] | Annotated[texts, Tag(_MANY)],
        Discriminator(
            _tag_of,
            custom_error_type="text_or_texts",
            custom_error_message="Input should be a text or a list of texts",
        ),
        Field(description=about),
    ]


def _tag_of(prompt: Any) -> str | None:
    if isinstance(prompt, list):
        return _MANY
    return _ONE if isinstance(prompt, str) else None


def common_fields(config: ServeConfig, facts: ModelFacts) -> dict[str, Any]:
    """Fields of every kind of request, with their limits and defaults."""
    limits, defaults = config.limits, config.defaults
    least, most = limits.sides_of(facts)
    side = whole_number(least, most, facts.size_multiple)
    negative_about = "What images are to lack; has an effect with guidance over 1 alone."
    seed_about = "The n-th image starts from the noise of seed + n; null: drawn."
    return {
        "negative_prompt": (
            str,
            Field("", max_length=limits.max_prompt_chars, description=negative_about),
        ),
        "seed": (whole_number(0, NUM_SEEDS - 1) | None, Field(None, description=seed_about)),
        "width": (side, Field(facts.width, description="Pixels.")),
        "height": (side, Field(facts.height, description="Pixels.")),
        "scheduler": (
            Literal[tuple(SCHEDULERS)],
            Field(defaults.scheduler, description="The sampler."),
        ),
    }


def step_fields(config: ServeConfig) -> dict[str, Any]:
    """Steps and guidance; the one request that has other names for them renames these."""
    limits, defaults = config.limits, config.defaults
    return {
        "steps": (
            whole_number(1, limits.max_steps),
            Field(defaults.steps, description="Denoising steps."),
        ),
        "guidance": (
            float,
            Field(
                defaults.guidance,
                ge=1,
                le=limits.max_guidance,
                allow_inf_nan=False,
                description="Scale of classifier-free guidance; 1 is off.",
            ),
        ),
    }


def build_request_model(config: ServeConfig, facts: ModelFacts) -> type[BaseModel]:
    """The body of `POST /v1/images`."""
    formats: Any = Literal["json", "png"]
    model: type[BaseModel] = create_model(
        "ImagesRequest",
        __base__=StrictModel,
        prompt=(prompt_type(config, "What to show; an image for each."), ...),
        format=(formats, Field("json", description="png: the file itself, of one prompt.")),
        **step_fields(config),
        **common_fields(config, facts),
    )
    model.model_config["json_schema_extra"] = _PNG_OF_ONE
    model.model_rebuild(force=True)
    return model


def to_image_request(fields: Any) -> ImageRequest:
    """A validated `ImagesRequest`, with a seed."""
    prompts = (fields.prompt,) if isinstance(fields.prompt, str) else tuple(fields.prompt)
    if fields.format == "png" and len(prompts) > 1:
        message = f"format: a PNG is one image, and {len(prompts)} prompts are given"
        raise RefusedError(422, "invalid_field", message, field="format")
    return ImageRequest(
        prompts=prompts,
        negative_prompt=fields.negative_prompt,
        seed=secrets.randbelow(_NUM_DRAWN_SEEDS) if fields.seed is None else fields.seed,
        kind=Kind(
            width=fields.width,
            height=fields.height,
            steps=fields.steps,
            guidance=fields.guidance,
            scheduler=fields.scheduler,
        ),
    )


async def read_json(request: Request, max_bytes: int, timeout_sec: float) -> Any:
    """The JSON that a request carries.

    Raises:
        RefusedError: it is of another type, too large, too slow to arrive, or not JSON.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != _JSON:
        # Also what keeps other sites' pages from posting here without asking the browser first.
        message = f"content-type is {content_type!r}; wanted {_JSON}"
        raise RefusedError(415, "not_json", message)
    try:
        async with asyncio.timeout(timeout_sec):
            data = await _read(request, max_bytes)
    except TimeoutError:
        message = f"the body did not arrive within {timeout_sec:g} seconds"
        raise RefusedError(408, "body_timed_out", message) from None
    try:
        return from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise RefusedError(400, "not_json", f"the body is not JSON: {error}") from None


async def _read(request: Request, max_bytes: int) -> bytes:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > max_bytes:
            raise RefusedError(413, "too_large", f"the body is over {max_bytes} bytes")
    return bytes(data)


def validate(model: type[BaseModel], document: Any) -> Any:
    """A request of this model.

    Raises:
        RefusedError: it names the first field at fault, and in its message up to five.
    """
    if not isinstance(document, dict):
        raise RefusedError(422, "invalid_field", "the body: Input should be an object")
    try:
        return model.model_validate(document)
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False, include_input=False, include_context=False)
        first = errors[0]
        messages = [f"{_path(one['loc'])}: {one['msg']}" for one in errors[:_MAX_NAMED_FIELDS]]
        raise RefusedError(
            422,
            _CODES.get(first["type"], "invalid_field"),
            "; ".join(messages),
            field=_path(first["loc"]).partition("[")[0],
        ) from None


def _path(loc: tuple[int | str, ...]) -> str:
    """`prompt[2]`, `parameters.width`; the tags of `prompt_type` are no part of the request."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in _TAGS:
            path += f".{part}" if path else part
    return path
