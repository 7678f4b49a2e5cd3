"""A client of the server: prompts in, PNGs out. The standard library is all it needs.

    images = Client("http://127.0.0.1:8000").images("a red circle", steps=20, seed=7)
    Path("circle.png").write_bytes(images[0].png)

A server that is full (429) or about to end (503) says when to come again; `images` and `generate`
do so while their patience lasts. `post` asks once.
"""

from __future__ import annotations

import base64
import json
import random
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPMessage
from typing import IO, Any
from urllib.parse import urlsplit

from serve.address import is_loopback
from shards.errors import UserError

_BUSY = (429, 503)
_DEFAULT_DELAY_SEC = 1.0  # where the server says no time


class ServerError(UserError):
    """A server that cannot be reached, or that refuses.

    Args:
        url: of the server.
        found: what it said, or did.
        status: of HTTP; 0 where there was no answer.
        code: the server's own word for it; empty where it has none.
        retry_after_sec: when to come again; None where the server does not say.
    """

    def __init__(
        self,
        url: str,
        found: str,
        *,
        status: int = 0,
        code: str = "",
        retry_after_sec: float | None = None,
    ) -> None:
        super().__init__(url, found)
        self.status = status
        self.code = code
        self.retry_after_sec = retry_after_sec


@dataclass(frozen=True)
class Image:
    """One picture, and the seed that makes it again."""

    png: bytes
    prompt: str
    seed: int
    flagged: bool | None
    """By a safety checker, which has blanked it; None where there is none."""


@dataclass(frozen=True)
class Reply:
    """What a request was answered."""

    images: list[Image]
    warnings: list[str]
    timings: dict[str, float]
    """`queued_sec`, `generated_sec`, `batch_size`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """`width`, `height`, `steps`, `guidance`, `scheduler`, as they were used."""


class Client:
    """Requests to one server.

    Args:
        url: `http://host:port`.
        token: bearer token, where the server wants one. It is not sent on to where a server
            redirects: redirects are refused.
        timeout_sec: for one answer.
        patience_sec: altogether, to wait for a server that is full.
    """

    def __init__(
        self, url: str, token: str = "", *, timeout_sec: float = 300.0, patience_sec: float = 60.0
    ) -> None:
        host = _host_of(url)
        self.url = url.rstrip("/")
        self._token = token
        self._timeout_sec = timeout_sec
        self._patience_sec = patience_sec
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
        if is_loopback(host):
            handlers.append(urllib.request.ProxyHandler({}))  # a proxy is on another machine
        self._opener = urllib.request.build_opener(*handlers)

    def images(self, prompt: str | list[str], **fields: Any) -> list[Image]:
        """The pictures of one request; `fields` and errors as of `generate`."""
        return self.generate(prompt, **fields).images

    def generate(self, prompt: str | list[str], **fields: Any) -> Reply:
        """Send one request, again while the server is full.

        Args:
            prompt: one, or several of one size.
            fields: `negative_prompt`, `steps`, `guidance`, `seed`, `width`, `height`, `scheduler`;
                what is left out, or None, is the server's default.

        Raises:
            ServerError: the server refuses, in its own words; does not answer; or is still full.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        deadline = time.monotonic() + self._patience_sec
        while True:
            try:
                return self.post({"prompt": prompt, **given})
            except ServerError as error:
                delay = _delay_sec(error)
                if error.status not in _BUSY or time.monotonic() + delay > deadline:
                    raise
            time.sleep(delay)

    def post(self, body: dict[str, Any]) -> Reply:
        """One request to `/v1/images`, asked once.

        Raises:
            ServerError: see `generate`.
        """
        answer = self._json("/v1/images", json.dumps(body).encode())
        try:
            return _reply(answer)
        except (KeyError, TypeError, ValueError) as error:
            found = f"an answer of another form ({type(error).__name__}: {error})"
            raise ServerError(self.url, found, status=200) from None

    @property
    def max_prompts(self) -> int:
        """Of one request, as the server says.

        Raises:
            ServerError: see `generate`.
        """
        try:
            return int(self.info()["limits"]["max_prompts"])
        except (KeyError, TypeError, ValueError):
            found = "its /v1/info is of another form: no server of this kind"
            raise ServerError(self.url, found, status=200) from None

    def info(self) -> dict[str, Any]:
        """`/v1/info`: model, defaults, limits, devices.

        Raises:
            ServerError: see `generate`.
        """
        return self._json("/v1/info")

    def metrics(self) -> str:
        """`/metrics`, in Prometheus' text form.

        Raises:
            ServerError: see `generate`.
        """
        return self._fetch("/metrics").decode()

    def is_ready(self) -> bool:
        """Whether `/ping` is answered with 200."""
        try:
            self._fetch("/ping")
        except ServerError:
            return False
        return True

    def _json(self, path: str, body: bytes | None = None) -> dict[str, Any]:
        data = self._fetch(path, body)
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            found = f"{path} is not answered in JSON: {data[:80]!r}"
            raise ServerError(self.url, found, status=200)
        return answer

    def _fetch(self, path: str, body: bytes | None = None) -> bytes:
        headers = {"content-type": "application/json", "accept": "application/json, */*"}
        if self._token:
            headers["authorization"] = f"Bearer {self._token}"
        request = urllib.request.Request(self.url + path, data=body, headers=headers)
        try:
            with self._opener.open(request, timeout=self._timeout_sec) as response:
                data: bytes = response.read()
                return data
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(self.url, error) from None
        except TimeoutError:
            raise ServerError(self.url, f"no answer within {self._timeout_sec:g} s") from None
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise ServerError(self.url, f"no answer within {self._timeout_sec:g} s") from None
            raise ServerError(self.url, f"no answer ({reason or type(error).__name__})") from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> None:
        """Follow none: the token is for this server alone."""


def _host_of(url: str) -> str:
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts.hostname
    except ValueError:
        pass  # brackets that do not close, or a port that is no number
    raise UserError("--url", f"{url!r}", wanted="http://host:port")


def _reply(answer: dict[str, Any]) -> Reply:
    images = [
        Image(
            png=base64.b64decode(image["png"], validate=True),
            prompt=image["prompt"],
            seed=image["seed"],
            flagged=image["flagged"],
        )
        for image in answer["images"]
    ]
    settings = {name: answer[name] for name in ("width", "height", "steps", "guidance")}
    return Reply(
        images,
        list(answer["warnings"]),
        dict(answer["timings"]),
        {**settings, "scheduler": answer["scheduler"]},
    )


def _refusal(url: str, error: urllib.error.HTTPError) -> ServerError:
    """What the server says against it."""
    try:
        data = error.read()
    except (OSError, HTTPException):
        data = b""
    try:
        said = json.loads(data)["error"]
        code, message, at = said["code"], said["message"], said.get("field")
    except (ValueError, KeyError, TypeError, RecursionError):
        code, at = "", None
        message = data[:200].decode(errors="replace").strip() or error.reason
    text = f"{at}: {message}" if at and str(at) not in message else str(message)
    return ServerError(
        url,
        f"{text} (status {error.code})",
        status=error.code,
        code=str(code),
        retry_after_sec=_seconds(error.headers.get("retry-after")),
    )


def _seconds(header: str | None) -> float | None:
    """Of a Retry-After in seconds; as a date, which servers of ours never send, it is ignored."""
    return float(header) if header and header.strip().isdecimal() else None


def _delay_sec(error: ServerError) -> float:
    """A little more than asked, at random: clients refused together must not return together."""
    asked = _DEFAULT_DELAY_SEC if error.retry_after_sec is None else error.retry_after_sec
    return asked * random.uniform(1.0, 1.25) + 0.01
