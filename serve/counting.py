"""Requests counted by route and status."""

from __future__ import annotations

from typing import Any

from serve.metrics import ServeMetrics


class CountRequests:
    """ASGI middleware; unlike one on functions it leaves the client's disconnect to the handler.

    Args:
        app: what it wraps.
        metrics: where it counts.
    """

    def __init__(self, app: Any, metrics: ServeMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request, or follow the application's life."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count_request(_route_of(scope), message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_counted)
        except Exception:  # answered, with 500, outside of this
            self._metrics.count_request(_route_of(scope), 500)
            raise


def _route_of(scope: Any) -> str:
    """Paths that are no route are as many as clients like."""
    path: str = getattr(scope.get("route"), "path", "other")
    return path
