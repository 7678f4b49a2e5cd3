"""The process of a server that was started by name: `python -m serve.detached`.

Its settings come in as JSON through its standard input, so that a token is neither among the
arguments, which every user of the machine can see, nor in a file of its own.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from serve.config import ServeConfig
from serve.ray_replicas import ReplicaConfig
from shards.errors import reported


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """All that a server is started with."""

    server: ServeConfig
    replicas: ReplicaConfig = field(default_factory=ReplicaConfig)

    def to_json(self) -> dict[str, Any]:
        """As numbers, texts, lists and objects, all of them."""
        facts: dict[str, Any] = _adapter().dump_python(self, mode="json")
        return facts

    @staticmethod
    def from_json(text: bytes) -> ServerSettings:
        """The inverse of `to_json`, of its text."""
        settings: ServerSettings = _adapter().validate_json(text)
        return settings

    def absolute(self) -> ServerSettings:
        """With local paths that are the same from everywhere, in any process."""
        server = self.server
        server = replace(server, source=_from_root(server.source), model=_from_root(server.model))
        server = replace(server, safety_checker=_from_root(server.safety_checker))
        return replace(self, server=server)

    def run(self) -> None:
        """Serve until SIGTERM.

        Raises:
            UserError: it cannot start.
        """
        if self.replicas.replicas:
            from serve.ray_replicas import run_replicas

            run_replicas(self.absolute().server, self.replicas)
        else:
            from serve.server import run_server

            run_server(self.server)


def _from_root(source: str) -> str:
    return str(Path(source).absolute()) if source and Path(source).exists() else source


def _adapter() -> Any:
    try:
        from pydantic import TypeAdapter
    except ModuleNotFoundError as error:
        from serve.server import not_installed

        raise not_installed(error) from None
    return TypeAdapter(ServerSettings)


if __name__ == "__main__":
    with reported("serve"):
        ServerSettings.from_json(sys.stdin.buffer.read()).run()
