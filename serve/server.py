"""The server in the foreground: loaded first, then listening, drained by SIGTERM."""

from __future__ import annotations

import asyncio
import socket
from types import FrameType
from typing import Any

from serve.config import ServeConfig
from serve.engine import Engine
from shards.errors import UserError

_LAST_SEC = 5  # for answers that are being written, after the last one is there


def run_server(config: ServeConfig) -> None:
    """Load the model, then open the port, and serve until SIGTERM or Ctrl-C.

    The first signal drains: accepted requests finish, within `drain_sec`, while new ones and
    `/ping` get 503. The second ends at once.

    Raises:
        UserError: the address is taken, or the model cannot be served.
    """
    uvicorn = _import_uvicorn()
    from serve.app import build_app

    with _bound(config) as listener:  # taken, and not listening until the model is there
        engine = Engine(config)
        app = build_app(engine, config)
        settings = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=_LAST_SEC,
            server_header=False,
        )
        server = _draining_server(uvicorn.Server, settings, engine, config.drain_sec)
        print(f"serving {config.source} at {_url(listener)}", flush=True)  # noqa: T201
        server.run(sockets=[listener])


def _draining_server(base: Any, settings: Any, engine: Engine, drain_sec: float) -> Any:
    """A uvicorn server that answers on while its engine drains."""

    class DrainingServer(base):
        async def serve(self, sockets: list[socket.socket] | None = None) -> None:
            self._loop = asyncio.get_running_loop()  # before signals come here
            await super().serve(sockets)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            """Called by the signal, between any two instructions of the main thread."""
            if engine.is_draining:
                self.should_exit = self.force_exit = True
            else:
                engine.start_draining()
                self._loop.call_soon_threadsafe(self._start_drain)

        def _start_drain(self) -> None:
            self._drain_task = self._loop.create_task(self._drain())

        async def _drain(self) -> None:
            await asyncio.to_thread(engine.drain, drain_sec)
            self.should_exit = True

    return DrainingServer(settings)


def _bound(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        found = f"{config.host}:{config.port} cannot be listened on ({error.strerror})"
        raise UserError("--host, --port", found, remedy="another --port, or 0") from None
    return listener


def _url(listener: socket.socket) -> str:
    host, port, *_ = listener.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _import_uvicorn() -> Any:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        raise not_installed(error) from None
    return uvicorn


def not_installed(error: ModuleNotFoundError) -> UserError:
    """What the server needs and the rest of the repository does not."""
    remedy = ".venv/bin/pip install fastapi uvicorn prometheus-client"
    return UserError("python -m serve", f"{error.name} is not installed", remedy=remedy)
