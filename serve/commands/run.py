"""Serve in the foreground, until SIGTERM or Ctrl-C."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from serve.config import ServeConfig
from serve.ray_replicas import ReplicaConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of `python -m serve run`."""

    server: Annotated[ServeConfig, tyro.conf.arg(name="")]
    replicas: Annotated[ReplicaConfig, tyro.conf.arg(name="")] = field(
        default_factory=ReplicaConfig
    )


def run(config: RunConfig) -> None:
    """Serve, in this process or as replicas."""
    from serve.detached import ServerSettings

    ServerSettings(server=config.server, replicas=config.replicas).run()
