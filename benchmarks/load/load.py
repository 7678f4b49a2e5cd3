"""Load on a server: its capacity, then the capacity and multiples of it, at a fixed rate.

Clients that wait for their answer (a closed loop) first measure how many images a second the server
makes. Then requests arrive at 1, 2 and 4 times that rate whatever the server does (an open loop):
accepted ones are to be answered within a bounded time, the others to be refused with 429 at once,
and the server's memory is not to grow. Nothing is asked again. Time counts from when a request was
to arrive.

python -m benchmarks load --source runs/demo
python -m benchmarks load --url http://127.0.0.1:8000 --sizes 64x64,96x64 --step-counts 10,25
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.load.clients import OK, MemoryWatch, Sample, closed_loop, open_loop
from benchmarks.result import result, spread
from serve.address import is_loopback
from serve.client import Client
from shards.column import Json
from shards.errors import UserError

_REFUSED = "429"
_PROMPTS = ("a large red circle", "a small blue square above a green circle", "a yellow star")


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """Settings of `python -m benchmarks load`.

    The token of a server that `up` did not start is read from LATENTMILL_TOKEN.
    """

    url: str = ""
    """Server to load; or --source."""
    source: str = ""
    """Run, checkpoint or pipeline to start a server of, on this machine, and to end it again."""
    max_queue: int = 32
    """Of the server that --source starts."""
    max_batch_size: int = 8
    """Of the server that --source starts."""
    sizes: str = ""
    """Widths and heights that requests have in turn, such as 64x64,96x64; default: the model's."""
    step_counts: str = ""
    """Steps that requests have in turn, such as 10,25; default: the server's."""
    prompts_per_request: int = 1
    """Images of one request."""
    num_clients: int = 0
    """Of the closed loop; 0: as many as fill each device's batch twice."""
    loads: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Multiples of the capacity."""
    duration_sec: float = 20.0
    """Of each part, but for the answers that are still to come."""
    max_requests: int = 5000
    """Of each part."""
    max_in_flight: int = 256
    """Requests that the open loop has under way at most."""
    allow_remote: bool = False
    """Load a server of another machine: only one that is yours to load."""
    out: str = ""
    """File of the result; default: its place in benchmarks/results; `-`: none."""


def measure(config: LoadConfig) -> Json:
    """Run the benchmark and return the result document.

    Raises:
        UserError: the server cannot be started, does not answer, or is another machine's.
    """
    _check(config)
    with _served(config) as (client, pid):
        info = client.info()
        bodies = _bodies(config)
        num_clients = config.num_clients or 2 * info["limits"]["max_batch_size"] * max(
            1, len(info["devices"])
        )
        clients = partial(
            closed_loop,
            client,
            bodies,
            num_clients=num_clients,
            duration_sec=config.duration_sec,
        )
        print(f"warm-up, then {num_clients} clients that wait for their answers", flush=True)
        _expect_images(client, clients(max_requests=2 * max(num_clients, len(bodies))))
        with MemoryWatch(pid) as memory:
            samples = clients(max_requests=config.max_requests)
        _expect_images(client, samples)  # without a capacity there is no multiple of it
        closed = _part("closed", samples, memory)
        capacity = closed["images_per_sec"]
        parts = [_open_part(config, client, pid, bodies, load, capacity) for load in config.loads]
    return result(
        "load",
        config,
        variant="mixed" if len(bodies) > 1 else "",
        server={**info, "source": config.source or info["source"]},
        num_clients=num_clients,
        capacity_images_per_sec=capacity,
        parts=[
            # Of several kinds the queue may hold the slow one alone: a mean rate bounds nothing.
            {**part, "bound_sec": None if len(bodies) > 1 else _bound_sec(info, part)}
            for part in (closed, *parts)
        ],
    )


def _open_part(
    config: LoadConfig,
    client: Client,
    pid: int | None,
    bodies: Sequence[dict[str, Any]],
    load: float,
    images_per_sec: float,
) -> Json:
    rate_per_sec = load * images_per_sec / config.prompts_per_request
    num_requests = min(config.max_requests, max(1, round(rate_per_sec * config.duration_sec)))
    print(f"{load:g}x: {num_requests} requests at {rate_per_sec:.1f} a second", flush=True)
    with MemoryWatch(pid) as memory:
        samples = open_loop(
            client,
            bodies,
            rate_per_sec=rate_per_sec,
            num_requests=num_requests,
            max_in_flight=config.max_in_flight,
        )
    part = _part(f"{load:g}x", samples, memory)
    return {**part, "offered_images_per_sec": load * images_per_sec}


def _part(load: str, samples: Sequence[Sample], memory: MemoryWatch) -> Json:
    """Figures of one part, with the raw samples as columns."""
    accepted = [sample for sample in samples if sample.outcome == OK]
    end_sec = max(sample.due_sec + sample.latency_sec for sample in samples)
    outcomes = Counter(sample.outcome for sample in samples)
    return {
        "load": load,
        "num_requests": len(samples),
        "duration_sec": end_sec,
        "images_per_sec": sum(sample.num_images for sample in accepted) / end_sec,
        "refused_frac": outcomes[_REFUSED] / len(samples),
        "errors": {kind: count for kind, count in outcomes.items() if kind not in (OK, _REFUSED)},
        "latency_sec": _percentiles([sample.latency_sec for sample in accepted]),
        "refusal_sec": _percentiles(
            [sample.latency_sec for sample in samples if sample.outcome == _REFUSED]
        ),
        "batch_size": spread([s.batch_size for s in accepted]) if accepted else None,
        "memory_mib": _memory(memory),
        "samples": _columns(samples),
    }


def _columns(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Every sample, to the tenth of a millisecond."""
    rows = [asdict(sample) for sample in samples]
    return {
        name: [round(row[name], 4) if name.endswith("_sec") else row[name] for row in rows]
        for name in rows[0]
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """None without any: no number stands for that."""
    if not seconds:
        return None
    p50, p95, p99 = np.percentile(np.asarray(seconds), [50, 95, 99])
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "max": max(seconds)}


def _memory(memory: MemoryWatch) -> Json | None:
    seen = memory.samples_mib
    if not seen:
        return None
    return {"before": seen[0], "after": seen[-1], "max": max(seen), "samples": seen}


def _bound_sec(info: Json, part: Json) -> float | None:
    """Of an accepted request's time, predicted from the part's own rate.

    At worst it comes behind a full queue and a batch that has just begun, to the end of its own.
    """
    limits, images_per_sec = info["limits"], part["images_per_sec"]
    in_work = 2 * limits["max_batch_size"] * max(1, len(info["devices"]))
    return (limits["max_queue"] + in_work) / images_per_sec if images_per_sec else None


def _expect_images(client: Client, samples: Sequence[Sample]) -> None:
    outcomes = Counter(sample.outcome for sample in samples)
    if not outcomes[OK]:
        found = ", ".join(f"{count} times {kind}" for kind, count in outcomes.items())
        remedy = "python -m serve query --url ... says why"
        raise UserError(client.url, f"made no image ({found})", remedy=remedy)


def _bodies(config: LoadConfig) -> list[dict[str, Any]]:
    """Requests of every size with every number of steps, with prompts in turn."""
    sizes: list[dict[str, int]] = [{}]
    if config.sizes:
        sides = [_numbers(text, r"(\d+)x(\d+)", "--sizes") for text in config.sizes.split(",")]
        sizes = [{"width": width, "height": height} for width, height in sides]
    steps: list[dict[str, int]] = [{}]
    if config.step_counts:
        counts = [_numbers(t, r"(\d+)", "--step-counts") for t in config.step_counts.split(",")]
        steps = [{"steps": count} for (count,) in counts]
    bodies = [{**size, **count} for size in sizes for count in steps]
    prompts = [_PROMPTS[n % len(_PROMPTS)] for n in range(config.prompts_per_request)]
    return [{"prompt": prompts, **body} for body in bodies]


def _numbers(text: str, form: str, option: str) -> list[int]:
    found = re.fullmatch(form, text.strip())
    if not found:
        wanted = "64x64,96x64" if "x" in form else "10,25"
        raise UserError(option, f"{text!r}", wanted=f"a list such as {wanted}")
    return [int(number) for number in found.groups()]


def _check(config: LoadConfig) -> None:
    if bool(config.url) == bool(config.source):
        raise UserError("load", "a server is needed", wanted="--url or --source")
    host = urlsplit(config.url).hostname or ""
    if config.url and not is_loopback(host) and not config.allow_remote:
        found = f"{host} is another machine"
        raise UserError("--url", found, wanted="this one", remedy="--allow-remote if it is yours")
    for name in ("prompts_per_request", "max_requests", "max_in_flight", "duration_sec"):
        if not 0 < getattr(config, name) < math.inf:
            option = "--" + name.replace("_", "-")
            raise UserError(option, f"{getattr(config, name)}", wanted="more than 0")
    if not all(0 < load < math.inf for load in config.loads):
        raise UserError("--loads", f"{config.loads}", wanted="more than 0")
    if config.num_clients < 0:
        raise UserError("--num-clients", f"{config.num_clients}", wanted="at least 0")


@contextmanager
def _served(config: LoadConfig) -> Iterator[tuple[Client, int | None]]:
    """A client of the server, and the server's process where it is one of ours."""
    from serve.config import TOKEN_VARIABLE
    from serve.deployment import all_deployments

    if config.source:
        with _own_server(config) as served:
            yield served
        return
    url = config.url.rstrip("/")
    here = (one for one in all_deployments() if one.process.is_here and one.process.is_alive)
    ours = [one for one in here if one.url == url]
    # Replicas on a cluster are not below our process.
    pids = [one.process.pid for one in ours if not one.settings["replicas"]["ray_address"]]
    tokens = [one.token for one in ours] or [os.environ.get(TOKEN_VARIABLE, "")]
    yield Client(url, tokens[0], timeout_sec=600), next(iter(pids), None)


@contextmanager
def _own_server(config: LoadConfig) -> Iterator[tuple[Client, int]]:
    from serve.config import ServeConfig
    from serve.detached import ServerSettings
    from serve.launch import launch, terminate, wait_until_ready

    server = ServeConfig(
        source=config.source,
        port=0,
        max_queue=config.max_queue,
        max_batch_size=config.max_batch_size,
    )
    deployment, _ = launch(f"load-{os.getpid()}", ServerSettings(server=server))
    try:
        wait_until_ready(deployment, 1800, lambda _: None)
        yield deployment.client(timeout_sec=600), deployment.process.pid
    finally:
        terminate(deployment, server.drain_sec)
    Path(deployment.log).unlink()


def print_table(document: Json) -> None:
    """The result for people."""
    protocol, server = document["protocol"], document["server"]
    print(
        f"{server['source']} on {', '.join(server['devices'])}; "
        f"{document['num_clients']} clients, queue {server['limits']['max_queue']}, batches of "
        f"{server['limits']['max_batch_size']}, {protocol['prompts_per_request']} images a request"
    )
    print(
        f"  {'load':<8}{'requests':>9}{'images/s':>10}{'429':>8}{'errors':>8}"
        f"{'p50 s':>8}{'p95 s':>8}{'p99 s':>8}{'bound s':>9}{'batch':>7}{'memory MiB':>18}"
    )
    for part in document["parts"]:
        print(_row(part))
        for kind, count in part["errors"].items():
            print(f"    {count} times {kind}")
    print("  bound: predicted from the rate measured in that part, a full queue and two batches;")
    print("  none for requests of several kinds, where the rate is a mean")


def _row(part: Json) -> str:
    latency, bound, memory = part["latency_sec"], part["bound_sec"], part["memory_mib"]
    times = "".join(
        f"{latency[p]:>8.2f}" if latency else f"{'-':>8}" for p in ("p50", "p95", "p99")
    )
    bound = f"{bound:.2f}" if bound else "-"
    batch = f"{part['batch_size']['median']:.0f}" if part["batch_size"] else "-"
    mib = "{before:,.0f} > {after:,.0f}".format(**memory) if memory else "not seen"
    return (
        f"  {part['load']:<8}{part['num_requests']:>9,}{part['images_per_sec']:>10.2f}"
        f"{part['refused_frac']:>8.1%}{sum(part['errors'].values()):>8}"
        f"{times}{bound:>9}{batch:>7}{mib:>18}"
    )
