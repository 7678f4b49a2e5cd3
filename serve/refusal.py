"""A request that gets no image: status, code, message, and the field at fault."""

from __future__ import annotations

import math


class RefusedError(Exception):
    """What a client is told instead of an image.

    Args:
        status: of HTTP.
        code: for programs.
        message: for people.
        field: of the request, that is at fault.
        retry_after_sec: after which the same request is likely to be accepted.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        field: str | None = None,
        retry_after_sec: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.field = status, code, message, field
        self.retry_after_sec = retry_after_sec

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON that is sent."""
        return {"error": {"code": self.code, "message": self.message, "field": self.field}}

    @property
    def headers(self) -> dict[str, str]:
        """The headers that are sent."""
        headers = {}
        if self.retry_after_sec is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_sec)))
        if self.status == 408:
            headers["connection"] = "close"  # the rest of the body may still trickle in
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def draining() -> RefusedError:
    """The server ends: another one may answer."""
    return RefusedError(503, "draining", "the server is shutting down", retry_after_sec=5)
