"""Start a server as a process of its own, wait until it is ready, and end it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from serve.address import local_url, usable_port
from serve.client import Client
from serve.deployment import (
    Deployment,
    ServerProcess,
    find_deployment,
    forget,
    here,
    log_path,
    remember,
    sole_change,
)
from serve.detached import ServerSettings
from shards.errors import UserError

_POLL_SEC = 0.1
_LOG_LINES = 15
_KILL_SEC = 30.0  # on top of the server's own time to drain


def launch(name: str, settings: ServerSettings) -> tuple[Deployment, bool]:
    """The server of this name: a new process, or the one that runs already with these settings.

    Returns:
        the server, which may still be loading its model; whether it is new.

    Raises:
        UserError: it runs with other settings, on another machine, or its port is taken.
    """
    settings = settings.absolute()
    asked = settings.to_json()
    with sole_change():
        running = find_deployment(name)
        if running is not None and not running.is_gone:
            _expect_same(running, asked)
            return running, False
        port = usable_port(settings.server.host, settings.server.port)
        given = replace(settings, server=replace(settings.server, port=port))
        deployment = _spawn(name, given, asked)
    return deployment, True


def _spawn(name: str, given: ServerSettings, asked: dict[str, object]) -> Deployment:
    log = log_path(name)
    if log.exists():
        log.replace(log.with_suffix(".log.1"))  # why the last one ended may be asked yet
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "serve.detached"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    assert process.stdin is not None
    deployment = Deployment(
        name=name,
        url=local_url(given.server.host, given.server.port),
        token=given.server.token,
        process=here(process.pid),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        log=str(log),
        settings=asked,
    )
    remember(deployment)  # before it is told anything: `down` finds it whatever becomes of us
    try:
        process.stdin.write(json.dumps(given.to_json()).encode())
        process.stdin.close()
    except BrokenPipeError:
        pass  # it has ended already; `wait_until_ready` says why
    return deployment


def wait_until_ready(
    deployment: Deployment, timeout_sec: float, tick: Callable[[float], None]
) -> None:
    """Wait until `/ping` is answered with 200.

    Args:
        deployment: a server that was launched.
        timeout_sec: how long it may take to load its model; then it is ended.
        tick: is called now and then with the seconds so far.

    Raises:
        UserError: the server ended, with the last lines of its log; or it takes too long.
    """
    client = Client(deployment.url, deployment.token, timeout_sec=5)
    begin = time.monotonic()
    while True:
        is_ready = client.is_ready()
        if not deployment.process.is_alive:  # asked second: another server may answer at the port
            forget(deployment)
            raise _not_started(deployment, "the server ended while it started")
        if is_ready:
            return
        waited = time.monotonic() - begin
        if waited > timeout_sec:
            terminate(deployment, 0)
            found = f"not ready after {timeout_sec:g} s (--start-timeout-sec)"
            raise _not_started(deployment, found)
        tick(waited)
        time.sleep(_POLL_SEC)


@contextmanager
def ended_on_error(deployment: Deployment) -> Iterator[None]:
    """A server that nobody waits for any more is not left to start on its own."""
    try:
        yield
    except BaseException:
        terminate(deployment, 0)
        raise


def terminate(deployment: Deployment, drain_sec: float) -> bool:
    """Send SIGTERM, and SIGKILL to one that has not ended by itself; forget it.

    Args:
        deployment: a server of this machine.
        drain_sec: how long accepted requests may take to finish.

    Returns:
        whether it ended by itself.
    """
    process = deployment.process
    if process.is_alive:
        os.kill(process.pid, signal.SIGTERM)
    by_itself = _wait_gone(process, drain_sec + _KILL_SEC)
    if not by_itself:
        os.killpg(process.pid, signal.SIGKILL)  # it leads a session of its own
        _wait_gone(process, _KILL_SEC)
    forget(deployment)
    return by_itself


def _not_started(deployment: Deployment, found: str) -> UserError:
    """With the last lines of what it printed: those say why."""
    text = Path(deployment.log).read_text(encoding="utf-8", errors="replace")
    lines = [f"  | {line}" for line in text.splitlines()[-_LOG_LINES:]]
    return UserError(deployment.name, "\n".join([found, *lines, f"The log: {deployment.log}"]))


def _wait_gone(process: ServerProcess, timeout_sec: float) -> bool:
    deadline = time.monotonic() + timeout_sec
    while process.is_alive:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SEC)
    return True


def _expect_same(running: Deployment, asked: dict[str, object]) -> None:
    if not running.process.is_here:
        found = f"runs on {running.process.host}, which shares this home folder"
        raise UserError(running.name, found, remedy="another name")
    if running.settings == asked:
        return
    theirs, ours = _flat(running.settings), _flat(asked)
    other = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
    raise UserError(
        running.name,
        f"runs at {running.url} with other settings ({', '.join(other)})",
        remedy=f"python -m serve down {running.name} first, or another name",
    )


def _flat(settings: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(settings, dict):
        return {prefix: settings}
    return {
        name: value
        for key, part in settings.items()
        for name, value in _flat(part, f"{prefix}.{key}" if prefix else key).items()
    }
