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
    with _connected(address):
        from precompute.ray_engine import run_actors

        yield from run_actors(spec, tasks, num_workers)


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """A connection to a cluster; without an address to a Ray of our own, for this machine alone."""
    settings = _QUIET if address else _QUIET | _THIS_MACHINE_ALONE
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    ray = _import_ray()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        _expect_listener(address)
        # The machines of a cluster have the packages that we need, and not us.
        here = Path(__file__).parent.parent
        packages = [str(here / name) for name in _PACKAGES]
        options |= {"address": address, "runtime_env": {"py_modules": packages}}
    else:
        options |= {"include_dashboard": False}
    try:
        with _own_signals():
            # An empty address is RAY_ADDRESS, or a cluster that happens to be there.
            ray.init(**{"address": "local", **options})
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(address, str(error).strip().splitlines()[0]) from None
    try:
        yield
    finally:
        ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        remedy = ".venv/bin/pip install ray"
        raise UserError("--engine ray", "Ray is not installed", remedy=remedy) from None
    return ray


def _expect_listener(address: str) -> None:
    """Ray itself tries for more than a minute, and then ends the process."""
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
