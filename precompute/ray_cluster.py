"""The way to a Ray cluster, or to a Ray of our own. Ray is imported when it is asked for."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from precompute.engine import Events
from precompute.shard_task import ShardTask
from precompute.worker_spec import WorkerSpec
from shards.errors import UserError

_PACKAGES = ("shards", "precompute")
_REACH_SEC = 10.0  # for a cluster to answer
# Ray reads these when it is imported.
_QUIET = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
# What is meant for desktops keeps Ray, all of its processes, on the loopback interface.
_THIS_MACHINE_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def run_ray(spec: WorkerSpec, tasks: Sequence[ShardTask], num_workers: int, address: str) -> Events:
    """Actors on the cluster at `address`; on this machine alone where that is empty.

    Raises:
        UserError: no Ray, no cluster there, a shard cannot be encoded, or the model not loaded.
    """
    with connected(address, _PACKAGES, "--engine ray"):
        from precompute.ray_engine import run_actors

        yield from run_actors(spec, tasks, num_workers)


@contextmanager
def connected(
    address: str, packages: Sequence[str], wanted_by: str, **own_options: Any
) -> Iterator[Any]:
    """Ray: of a cluster, or without an address of our own and for this machine alone.

    Args:
        address: `auto` or host:port; empty: a Ray that ends with this connection.
        packages: of this repository, for the machines of a cluster, which have what those need.
        wanted_by: flag, for the error where Ray is not installed.
        own_options: of `ray.init`, for a Ray of our own.

    Raises:
        UserError: no Ray, or no cluster there.
    """
    settings = _QUIET if address else _QUIET | _THIS_MACHINE_ALONE
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    ray = import_ray(wanted_by)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        expect_listener(address)
        # The machines of a cluster have the packages that we need, and not us.
        here = Path(__file__).parent.parent
        folders = [str(here / name) for name in packages]
        options |= {"address": address, "runtime_env": {"py_modules": folders}}
    else:
        # An empty address is RAY_ADDRESS, or a cluster that happens to be there.
        options |= {"address": "local", "include_dashboard": False, **own_options}
    try:
        with _own_signals():
            ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(address, str(error).strip().splitlines()[0]) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def import_ray(wanted_by: str) -> Any:
    """Ray, or the error that says how to get it."""
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        remedy = ".venv/bin/pip install 'ray[serve]'"
        raise UserError(wanted_by, "Ray is not installed", remedy=remedy) from None
    return ray


def expect_listener(address: str) -> None:
    """Refuse an address where nobody listens: Ray tries for minutes, and ends the process.

    Raises:
        UserError: nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # `auto`, or what Ray alone understands
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_SEC).close()
    except OSError as error:
        raise _no_cluster(address, error.strerror or str(error)) from None


def _no_cluster(address: str, why: str) -> UserError:
    return UserError(
        "--ray-address",
        f"{address or 'this machine'}: no Ray there ({why})",
        wanted="auto, or host:port of a running cluster (ray start --head)",
        remedy="RAY_AUTH_MODE=token in the environment where the cluster asks for its token",
    )


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray makes SIGTERM end the process at once; how a job stops is the job's business."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
