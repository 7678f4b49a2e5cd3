"""End servers that were started by name, once they have finished what they accepted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from shards.errors import UserError

if TYPE_CHECKING:
    from serve.deployment import Deployment


@dataclass(frozen=True, kw_only=True)
class DownConfig:
    """Settings of `python -m serve down`."""

    name: tyro.conf.Positional[str] = ""
    """Of the server."""
    all: bool = False
    """All servers of this user on this machine."""


def run(config: DownConfig) -> None:
    """Send SIGTERM, wait, and say what became of each."""
    from serve.deployment import all_deployments, recorded_deployment

    if bool(config.name) == config.all:
        raise UserError("down", "a name or --all is needed", wanted="one of them")
    found = all_deployments() if config.all else [recorded_deployment(config.name)]
    for deployment in found:
        _end(deployment)
    if not found:
        print("there is no server")


def _end(deployment: Deployment) -> None:
    from serve.deployment import forget
    from serve.launch import terminate

    name, process = deployment.name, deployment.process
    if not process.is_here:
        print(f"{name}: runs on {process.host}; take it down there")
        return
    if not process.is_alive:
        forget(deployment)
        print(f"{name}: had ended by itself; its log: {deployment.log}")
        return
    drain_sec = deployment.settings["server"]["drain_sec"]
    print(f"{name}: ending; accepted requests have {drain_sec:g} s to finish", flush=True)
    if terminate(deployment, drain_sec):
        print(f"{name}: down")
    else:
        print(f"{name}: did not end in time and was killed; its log: {deployment.log}")
