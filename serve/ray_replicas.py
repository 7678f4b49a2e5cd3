"""Copies of the server behind one address, on one machine or on many, through Ray Serve.

Each replica is the whole app with one pipeline on one device: it batches, bounds its queue and
drains as a server without Ray does. Ray Serve's proxies share requests out among the replicas,
replace one that dies, and add some under load where that is asked for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from precompute.ray_cluster import connected
from serve.address import local_url, usable_port
from serve.client import Client
from serve.config import ServeConfig
from shards.errors import UserError
from shards.stop import StopOnSignal

_PACKAGES = ("shards", "train", "precompute", "evaluate", "serve")
_NAME = "latentmill"
_SLACK_REQUESTS = 8  # for /ping, /metrics and the page, beside those that wait for images
_REACH_SEC = 10.0  # for a cluster to answer, or for the proxy once all replicas are there
_POLL_SEC = 0.2
# Ray reads these when it is imported.
_QUIET = {
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_OBJECT_STORE_BYTES = 256 << 20  # requests and answers do not pass through it


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig:
    """How many servers stand behind the address."""

    replicas: int = 0
    """Servers behind one address, through Ray Serve, with one device each; 0: one, without Ray."""
    max_replicas: int = 0
    """Add replicas under load, up to so many, and take them away again; 0: keep their number."""
    ray_address: str = ""
    """Ray cluster that they run on: auto, or host:port; default: a Ray of their own, here."""

    def __post_init__(self) -> None:
        if self.replicas < 0:
            raise UserError("--replicas", f"{self.replicas}", wanted="at least 0")
        if self.max_replicas and not 0 < self.replicas <= self.max_replicas:
            found, wanted = f"{self.max_replicas}", "at least --replicas, which is at least 1"
            raise UserError("--max-replicas", found, wanted=wanted)
        if self.ray_address and not self.replicas:
            raise UserError("--ray-address", "has no use without replicas", wanted="--replicas too")

    @property
    def most(self) -> int:
        """Replicas at any time."""
        return self.max_replicas or self.replicas


def run_replicas(config: ServeConfig, replicas: ReplicaConfig) -> None:
    """Serve until SIGTERM or Ctrl-C, then let accepted requests finish.

    Raises:
        UserError: the port is taken, Ray is missing, its cluster cannot be reached, a replica
            cannot start, or there are fewer GPUs than replicas.
    """
    config = replace(config, port=usable_port(config.host, config.port))
    with _connected(replicas) as ray:
        from ray import serve

        resources = _resources_of_each(config, replicas, ray.cluster_resources())
        _start_proxies(config, replicas)
        try:
            _deploy(_application(config, replicas, resources))
            url = local_url(config.host, config.port)
            _expect_answer(url)
            print(f"serving {config.source} at {url}", flush=True)  # noqa: T201
            with StopOnSignal() as stop:
                while not stop.requested:
                    time.sleep(_POLL_SEC)
        finally:
            serve.delete(_NAME)  # returns when replicas have finished what they had accepted
            if replicas.ray_address and not serve.status().applications:
                serve.shutdown()


def _deploy(application: Any) -> None:
    """Return when all replicas are ready."""
    from ray import serve

    try:
        serve.run(application, name=_NAME)
    except RuntimeError:
        message = serve.status().applications[_NAME].deployments["server"].message
        raise UserError("replica", _reason(message)) from None


def _reason(message: str) -> str:
    """The line of a replica's traceback that says what was raised."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    ours = [line.partition("UserError: ")[2] for line in lines if "UserError: " in line]
    return (ours or lines or ["a replica cannot start"])[-1]


def _application(config: ServeConfig, replicas: ReplicaConfig, resources: dict[str, float]) -> Any:
    from ray import serve

    on_gpu = bool(resources["num_gpus"])
    # Ray shows a replica the GPU that it gave it alone.
    own = replace(config, devices="cuda:0" if on_gpu else "cpu")
    is_private = not replicas.ray_address

    def build() -> Any:
        """In the replica's process."""
        from serve.app import build_app
        from serve.engine import Engine
        from serve.ray_replicas import keep_to_loopback

        if is_private:
            keep_to_loopback()
        return build_app(Engine(own), own)

    options: dict[str, Any] = {
        "ray_actor_options": resources,
        # What a replica has no room for it refuses itself, with an estimate of when to try again.
        "max_ongoing_requests": config.max_queue + config.max_batch_size + _SLACK_REQUESTS,
        "max_queued_requests": config.max_queue,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        "graceful_shutdown_timeout_s": config.drain_sec,
        "max_constructor_retry_count": 1,  # a model that does not load does not load twice
    }
    if replicas.max_replicas:
        options["autoscaling_config"] = {
            "min_replicas": replicas.replicas,
            "max_replicas": replicas.max_replicas,
            "target_ongoing_requests": config.max_batch_size,  # a full batch in each
        }
    else:
        options["num_replicas"] = replicas.replicas
    ingress = serve.ingress(build)()
    return serve.deployment(ingress, name="server", **options).bind()


def keep_to_loopback() -> None:
    """Close this replica's port for other deployments to other machines.

    Ray Serve opens it on every interface, without a setting against that, and unpickles what comes
    in. On a cluster it stays as it is: there machines must reach each other.
    """
    from ray.serve._private import replica

    add_port = replica.add_port_to_grpc_server

    def add_private_port(server: Any, address: str) -> Any:
        return add_port(server, address.replace("[::]", "127.0.0.1"))

    replica.add_port_to_grpc_server = add_private_port


def _resources_of_each(
    config: ServeConfig, replicas: ReplicaConfig, cluster: dict[str, float]
) -> dict[str, float]:
    """A GPU for each replica where there are any, else its share of the CPUs.

    Ray sets a process's number of threads to that of its CPUs.
    """
    num_gpus = int(cluster.get("GPU", 0))
    if config.devices not in ("auto", "cpu"):
        found = f"{config.devices!r} with --replicas: Ray chooses the device of each"
        raise UserError("--devices", found, wanted="auto, or cpu")
    if config.devices != "cpu" and num_gpus:
        if num_gpus < replicas.most and not replicas.ray_address:
            found = f"{replicas.most}, and this machine has {num_gpus} GPUs"
            raise UserError("--replicas", found, wanted="one GPU each", remedy="--devices cpu")
        return {"num_cpus": 1, "num_gpus": 1}
    return {"num_cpus": max(1, int(cluster.get("CPU", 1)) // replicas.most), "num_gpus": 0}


def _start_proxies(config: ServeConfig, replicas: ReplicaConfig) -> None:
    from ray import serve
    from ray.serve.config import HTTPOptions

    serve.start(
        proxy_location="EveryNode" if replicas.ray_address else "HeadOnly",
        http_options=HTTPOptions(
            host=config.host,
            port=config.port,
            # The app answers 504 before.
            request_timeout_s=config.timeout_sec + _REACH_SEC,
        ),
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )


def _expect_answer(url: str) -> None:
    """A Serve that ran on the cluster before keeps the address that it was started with."""
    client = Client(url, timeout_sec=_REACH_SEC)
    deadline = time.monotonic() + _REACH_SEC
    while not client.is_ready():
        if time.monotonic() > deadline:
            remedy = "the address that the cluster's Ray Serve was started with"
            raise UserError("--port", f"nothing answers at {url}", remedy=remedy)
        time.sleep(_POLL_SEC)


@contextmanager
def _connected(replicas: ReplicaConfig) -> Iterator[Any]:
    """Ray Serve: on a cluster, or on a Ray of our own and for this machine alone."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    options = {
        "num_cpus": max(os.cpu_count() or 1, replicas.most),
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    with connected(replicas.ray_address, _PACKAGES, "--replicas", **options) as ray:
        _expect_ray_serve()
        yield ray


def _expect_ray_serve() -> None:
    """Ray can be there without what Serve needs; asked for once Ray's environment is set."""
    try:
        import ray.serve  # noqa: F401
    except ModuleNotFoundError as error:
        remedy = ".venv/bin/pip install 'ray[serve]'"
        found = f"Ray Serve is not installed ({error.name})"
        raise UserError("--replicas", found, remedy=remedy) from None
