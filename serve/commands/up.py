"""Start a server by name, as a process of its own that stays."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from serve.config import ServeConfig
from serve.ray_replicas import ReplicaConfig


@dataclass(frozen=True, kw_only=True)
class UpConfig:
    """Settings of `python -m serve up`: those of `run`, and a name."""

    name: tyro.conf.Positional[str]
    """What to call it: small letters, digits, - and _."""
    server: Annotated[ServeConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: ServeConfig(source=tyro.MISSING, port=0)
    )
    replicas: Annotated[ReplicaConfig, tyro.conf.arg(name="")] = field(
        default_factory=ReplicaConfig
    )
    start_timeout_sec: float = 1800.0
    """How long the server may take to load its model and to compile."""


def run(config: UpConfig) -> None:
    """Start it, wait until it is ready, and say how to reach it."""
    from serve.detached import ServerSettings
    from serve.launch import ended_on_error, launch, wait_until_ready

    settings = ServerSettings(server=config.server, replicas=config.replicas)
    deployment, is_new = launch(config.name, settings)
    name = deployment.name
    if is_new:
        print(f"{name}: starting; log: {deployment.log}", flush=True)
        with ended_on_error(deployment):
            wait_until_ready(deployment, config.start_timeout_sec, _show_progress)
    else:
        print(f"{name}: runs already, with these settings, since {deployment.since}")
        wait_until_ready(deployment, config.start_timeout_sec, _show_progress)
    print(f"{name}: ready at {deployment.url} (process {deployment.process.pid})")
    print(f'  python -m serve query {name} --prompt "..." --out image.png')
    print(f"  python -m serve down {name}")


def _show_progress(waited_sec: float) -> None:
    if sys.stdout.isatty():
        print(f"\r  loading, {waited_sec:.0f} s\033[K", end="\r", flush=True)
