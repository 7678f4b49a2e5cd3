"""The HTTP interface: what is answered where, by an engine."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serve.answer import ErrorAnswer, ImagesAnswer, error_answers, json_answer, png_answer
from serve.config import ServeConfig
from serve.counting import CountRequests
from serve.engine import Engine
from serve.info import ServerInfo, server_info
from serve.refusal import RefusedError, draining
from serve.request import build_request_model, read_json, to_image_request, validate
from serve.sagemaker import add_invocations
from serve.waiting import ClientGoneError, Deadline, images_of

_PAGE = Path(__file__).with_name("page.html")
_CLIENT_GONE = 499  # nginx's number: it reaches nobody but the counters


def build_app(engine: Engine, config: ServeConfig) -> FastAPI:
    """The application, with its engine started; the end of the application ends the engine.

    Args:
        engine: is started here unless it was before.
        config: the one that the engine has.
    """
    engine.start()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="latentmill",
        summary="Images from a text-to-image model.",
        version=version("latentmill"),
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would name whatever host the request did
    )
    app.add_middleware(CountRequests, metrics=engine.metrics)
    app.add_exception_handler(RefusedError, _refuse)
    app.add_exception_handler(ClientGoneError, _nobody_there)
    app.add_exception_handler(ClientDisconnect, _nobody_there)  # before the end of the body
    app.add_exception_handler(HTTPException, _no_such_thing)
    app.add_exception_handler(Exception, _internal_error)
    protection = [Depends(_token_check(config.token))] if config.token else []
    _add_images(app, engine, config, protection)
    add_invocations(app, engine, config, protection)
    _add_state(app, engine, config, protection)
    return app


def _add_images(app: FastAPI, engine: Engine, config: ServeConfig, protection: list[Any]) -> None:
    model = build_request_model(config, engine.facts)
    schema = {"content": {"application/json": {"schema": model.model_json_schema()}}}

    @app.post(
        "/v1/images",
        summary="Generate images",
        dependencies=protection,
        response_class=Response,
        responses={
            200: {
                "description": "The images, or with format png the one image.",
                "model": ImagesAnswer,
                "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
            },
            **error_answers(),
        },
        openapi_extra={"requestBody": {"required": True, **schema}},
    )
    async def images(http: Request) -> Response:
        deadline = Deadline(config.timeout_sec)
        document = await read_json(http, config.limits.max_body_bytes, deadline.left_sec)
        fields = validate(model, document)
        request = to_image_request(fields)
        job, made = await images_of(engine, http, request, deadline)
        if fields.format == "png":
            return png_answer(job, made)
        return await asyncio.to_thread(json_answer, job, made)


def _add_state(app: FastAPI, engine: Engine, config: ServeConfig, protection: list[Any]) -> None:
    info = server_info(engine, config)
    page = _PAGE.read_text(encoding="utf-8")
    refused: dict[int | str, dict[str, Any]] = {
        401: {"description": "No token, or another.", "model": ErrorAnswer}
    }

    @app.get(
        "/ping",
        summary="Whether requests are taken",
        responses={503: {"description": "Not now.", "model": ErrorAnswer}},
    )
    async def ping() -> dict[str, str]:
        if engine.is_draining:
            raise draining()
        if not engine.is_ready:
            raise RefusedError(503, "failed", "a device does not work")
        return {"status": "ready"}

    @app.get(
        "/v1/info", summary="Model, defaults, limits", dependencies=protection, responses=refused
    )
    async def get_info() -> ServerInfo:
        return info

    @app.get(
        "/metrics",
        summary="For Prometheus",
        dependencies=protection,
        response_class=Response,
        responses={
            200: {"description": "Figures.", "content": {"text/plain": {}}},
            **refused,
        },
    )
    async def metrics() -> Response:
        content_type = "text/plain; version=0.0.4; charset=utf-8"
        return Response(engine.metrics.exposition(), headers={"content-type": content_type})

    @app.get("/", summary="A page to type a prompt", response_class=HTMLResponse)
    async def get_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": _PAGE_POLICY})


# The page holds its own script and style, and speaks to this server alone.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; form-action 'none'; frame-ancestors 'none'; "
    "base-uri 'none'"
)


def _token_check(token: str) -> Any:
    bearer = HTTPBearer(auto_error=False)

    def check(credentials: HTTPAuthorizationCredentials | None = Depends(bearer)) -> None:  # noqa: B008
        given = credentials.credentials if credentials else ""
        if not hmac.compare_digest(given.encode(), token.encode()):
            raise RefusedError(401, "unauthorized", "wanted: Authorization: Bearer and the token")

    return check


async def _refuse(_: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, RefusedError)
    return JSONResponse(refusal.body, refusal.status, headers=refusal.headers)


async def _nobody_there(_: Request, __: Exception) -> Response:
    return Response(status_code=_CLIENT_GONE)


async def _no_such_thing(http: Request, error: Exception) -> Response:
    """No such path, or another method."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    message = f"{http.method} {http.url.path}: {error.detail}"
    refusal = RefusedError(error.status_code, code, message)
    return JSONResponse(refusal.body, refusal.status, headers=error.headers)


async def _internal_error(_: Request, __: Exception) -> Response:
    """What we did not foresee; it is logged, and no part of the answer."""
    refusal = RefusedError(500, "internal", "an internal error; the server's log has it")
    return JSONResponse(refusal.body, refusal.status)
