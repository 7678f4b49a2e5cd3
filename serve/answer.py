"""Answers: their models, which are also their documentation, and making them from images."""

from __future__ import annotations

import base64
from typing import Any

from pydantic import BaseModel, Field
from starlette.responses import Response

from serve.job import Job, ServedImage


class AnsweredImage(BaseModel):
    """One image."""

    png: str = Field(description="The file, in base64.")
    prompt: str
    seed: int = Field(description="That gives this image again.")
    flagged: bool | None = Field(
        description="The safety checker's word, by which the image is blank; null: there is none."
    )


class Timings(BaseModel):
    """Where the time went."""

    queued_sec: float
    generated_sec: float
    batch_size: int = Field(description="Of the largest batch that one of the images was in.")


class ImagesAnswer(BaseModel):
    """The answer to `POST /v1/images`."""

    images: list[AnsweredImage]
    width: int
    height: int
    steps: int
    guidance: float
    scheduler: str
    warnings: list[str]
    timings: Timings


class ErrorDetail(BaseModel):
    """What is wrong."""

    code: str = Field(description="For programs.")
    message: str = Field(description="For people.")
    field: str | None = Field(description="Of the request, that is at fault.")


class ErrorAnswer(BaseModel):
    """The answer to a request that gets none else."""

    error: ErrorDetail


def error_answers() -> dict[int | str, dict[str, Any]]:
    """What a request for images may get instead of them, as OpenAPI has it."""
    causes = {
        400: "Not JSON.",
        401: "No token, or another.",
        408: "The body did not arrive in time.",
        413: "The body, or the answer, is too large.",
        415: "Another content-type than JSON.",
        422: "A field is missing, unknown or out of its limits.",
        429: "The queue is full; Retry-After says when there is likely to be room.",
        500: "The images could not be generated.",
        503: "The server is shutting down, or the device has no memory for this size.",
        504: "It took too long.",
    }
    answers: dict[int | str, dict[str, Any]] = {
        status: {"description": cause, "model": ErrorAnswer} for status, cause in causes.items()
    }
    answers[429]["headers"] = {"retry-after": {"schema": {"type": "integer"}}}
    return answers


def warnings_of(images: list[ServedImage]) -> list[str]:
    """Each one once, in order."""
    return list(dict.fromkeys(warning for image in images for warning in image.warnings))


def timings_of(job: Job, images: list[ServedImage]) -> Timings:
    """Of a job that has its images."""
    return Timings(
        queued_sec=round(job.queued_sec, 6),
        generated_sec=round(job.generated_sec, 6),
        batch_size=max(image.batch_size for image in images),
    )


def json_answer(job: Job, images: list[ServedImage]) -> Response:
    """All images in one document. Takes milliseconds for each: not for the event loop's thread."""
    request = job.request
    answer = ImagesAnswer(
        images=[
            AnsweredImage(
                png=base64.b64encode(image.png).decode(),
                prompt=prompt,
                seed=request.seed_of(index),
                flagged=image.flagged,
            )
            for index, (prompt, image) in enumerate(zip(request.prompts, images, strict=True))
        ],
        width=request.kind.width,
        height=request.kind.height,
        steps=request.kind.steps,
        guidance=request.kind.guidance,
        scheduler=request.kind.scheduler,
        warnings=warnings_of(images),
        timings=timings_of(job, images),
    )
    return Response(answer.model_dump_json(), media_type="application/json")


def png_answer(job: Job, images: list[ServedImage]) -> Response:
    """The one image as a file; what else there is to say is in its headers."""
    (image,) = images
    headers = {"x-seed": str(job.request.seed)}
    if warnings := warnings_of(images):
        headers["x-warning"] = _header_text("; ".join(warnings))
    if image.flagged is not None:
        headers["x-flagged"] = str(image.flagged).lower()
    return Response(image.png, media_type="image/png", headers=headers)


def _header_text(text: str) -> str:
    """Headers are ASCII in one line."""
    line = "".join(char if char.isprintable() else " " for char in text)
    return line.encode("ascii", "backslashreplace").decode()
