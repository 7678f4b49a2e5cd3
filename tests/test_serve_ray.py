"""Replicas behind one address: two of them, on the CPU, started by the command for all tests."""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec

import psutil
import pytest
from conftest import run_python
from helpers_deployment import build_pipeline_folder
from helpers_precompute import wait_until

import serve.ray_replicas
from serve.client import Client, ServerError
from serve.config import ServeConfig
from serve.deployment import Deployment, running_deployment
from serve.launch import terminate
from serve.ray_replicas import ReplicaConfig, run_replicas
from shards.errors import UserError

pytestmark = pytest.mark.skipif(not find_spec("ray"), reason="Ray is not installed")

TOKEN = "a-token-for-the-tests"
OPTIONS = ("--replicas=2", "--steps=3", "--max-queue=3", "--max-batch-size=2", "--max-prompts=2")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A server of two replicas."""
    home = tmp_path_factory.mktemp("home")
    source = build_pipeline_folder(tmp_path_factory.mktemp("source") / "pipeline")
    environment = {"XDG_STATE_HOME": str(home), "LATENTMILL_TOKEN": TOKEN}
    done = run_python("-m", "serve", "up", "two", f"--source={source}", *OPTIONS, **environment)
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(home))
        deployment = running_deployment("two")
        yield deployment
        if not deployment.is_gone:
            terminate(deployment, 60)


def processes_of(deployment: Deployment) -> list[psutil.Process]:
    first = psutil.Process(deployment.process.pid)
    return [first, *first.children(recursive=True)]


def replicas_of(deployment: Deployment) -> list[psutil.Process]:
    """Ray gives its processes the name of what they run."""
    found = []
    for process in processes_of(deployment):
        with suppress(psutil.Error):  # it has ended meanwhile
            if "ServeReplica" in "".join(process.cmdline()):
                found.append(process)
    return found


def images_by_replica(client: Client) -> set[str]:
    """Of those replicas that happen to answer: each counts for itself."""
    texts = [client.metrics() for _ in range(20)]
    return {
        line.split()[1]
        for text in texts
        for line in text.splitlines()
        if line.startswith("latentmill_images_total")
    }


def test_all_of_ray_listens_on_loopback_alone(two):
    assert len(replicas_of(two)) == 2
    listeners = {
        (process.name(), connection.laddr.ip)
        for process in processes_of(two)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert any(name.startswith("ray::ServeReplica") for name, _ in listeners)
    assert {ip for _, ip in listeners} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, listeners


def test_sizes_steps_and_batches_in_any_order_and_at_once_are_all_answered(two):
    client = two.client(patience_sec=300)
    kinds = [
        {"width": width, "height": height, "steps": steps}
        for width, height in ((64, 64), (32, 48), (96, 64))
        for steps in (2, 5)
    ]
    asked = [(kind, prompts) for kind in kinds for prompts in (["a"], ["a", "b"])] * 2
    with ThreadPoolExecutor(6) as pool:
        replies = pool.map(lambda ask: client.generate(ask[1], seed=3, **ask[0]), asked)
        for (kind, prompts), reply in zip(asked, replies, strict=True):
            assert [image.prompt for image in reply.images] == prompts
            assert {name: reply.settings[name] for name in kind} == kind
    in_all = sum(len(prompts) for _, prompts in asked)
    assert all(0 < int(float(share)) < in_all for share in images_by_replica(client))


def test_a_seed_makes_the_same_picture_in_every_replica(two):
    client = two.client()
    pictures = {client.images("a lion", seed=5)[0].png for _ in range(8)}
    assert len(pictures) == 1


def test_the_token_and_the_limits_hold_behind_the_proxy(two):
    with pytest.raises(ServerError, match=r"\(status 401\)"):
        Client(two.url).images("a lion")
    with pytest.raises(ServerError, match=r"steps: .*\(status 422\)") as raised:
        two.client().images("a lion", steps=100_000)
    assert raised.value.code
    with pytest.raises(ServerError, match=r"\(status 404\)"):
        two.client()._fetch("/nothing")


def test_more_than_they_can_take_is_refused_with_429_and_nothing_else(two):
    client = two.client()

    def ask(number: int) -> tuple[int, bool]:
        try:
            client.post({"prompt": "a lion", "steps": 30, "seed": number})
        except ServerError as error:
            return error.status, error.retry_after_sec is not None
        return 200, False

    with ThreadPoolExecutor(32) as pool:
        answers = set(pool.map(ask, range(64)))
    assert answers == {(200, False), (429, True)}
    assert len(client.images("a lion")) == 1


def test_a_replica_that_dies_is_replaced(two):
    before = {process.pid for process in replicas_of(two)}
    killed = replicas_of(two)[0]
    killed.kill()
    client = two.client()

    def are_two_again() -> bool:
        now = {process.pid for process in replicas_of(two)}
        return len(now) == 2 and now != before

    wait_until(are_two_again, timeout_sec=100)
    wait_until(lambda: len(images_by_replica(client)) == 2, timeout_sec=100)
    assert {len(client.images("a lion")) for _ in range(8)} == {1}


def test_down_waits_for_what_was_accepted_and_leaves_no_process(two):
    """The last of the tests with these replicas."""
    client = two.client()
    processes = processes_of(two)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(client.images, "a lion", steps=steps) for steps in (99, 100)]
        busy = {process.pid: process.cpu_times().user for process in replicas_of(two)}
        wait_until(
            lambda: any(
                process.cpu_times().user > busy.get(process.pid, 0) + 0.3
                for process in replicas_of(two)
            )
        )
        assert terminate(two, 60)
        assert [len(one.result()) for one in asked] == [1, 1]
    assert not psutil.wait_procs(processes, timeout=10)[1]


# Without a server.


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"replicas": -1}, "--replicas"),
        ({"max_replicas": 2}, "--max-replicas"),
        ({"replicas": 3, "max_replicas": 2}, "--max-replicas"),
        ({"ray_address": "auto"}, "--ray-address"),
    ],
)
def test_replicas_that_make_no_sense_are_refused(options, why):
    with pytest.raises(UserError, match=why):
        ReplicaConfig(**options)


def test_each_replica_gets_a_gpu_where_there_are_enough():
    config = ServeConfig(source="x")
    resources = serve.ray_replicas._resources_of_each
    two, grows = ReplicaConfig(replicas=2), ReplicaConfig(replicas=2, max_replicas=8)
    assert resources(config, two, {"CPU": 16, "GPU": 4}) == {"num_cpus": 1, "num_gpus": 1}
    assert resources(config, two, {"CPU": 16}) == {"num_cpus": 8, "num_gpus": 0}
    assert resources(config, grows, {"CPU": 16}) == {"num_cpus": 2, "num_gpus": 0}
    assert resources(config, grows, {"CPU": 4}) == {"num_cpus": 1, "num_gpus": 0}
    on_cpu = ServeConfig(source="x", devices="cpu")
    assert resources(on_cpu, two, {"CPU": 16, "GPU": 4}) == {"num_cpus": 8, "num_gpus": 0}
    with pytest.raises(UserError, match=r"--replicas: 8, and this machine has 4 GPUs"):
        resources(config, grows, {"CPU": 16, "GPU": 4})
    named = ServeConfig(source="x", devices="cuda:1")
    with pytest.raises(UserError, match=r"--devices: 'cuda:1' with --replicas"):
        resources(named, two, {"CPU": 16, "GPU": 4})
    cluster = ReplicaConfig(replicas=8, ray_address="auto")  # it may grow
    assert resources(config, cluster, {"CPU": 16, "GPU": 4})["num_gpus"] == 1


def test_without_ray_serve_the_way_to_get_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    with pytest.raises(UserError, match=r"pip install 'ray\[serve\]'"):
        run_replicas(ServeConfig(source="x"), ReplicaConfig(replicas=1))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_cluster_that_is_not_there_is_told_at_once(address, monkeypatch):
    for name in ("RAY_SERVE_LOG_TO_STDERR", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    with pytest.raises(UserError, match=rf"--ray-address: {address}: no Ray there"):
        run_replicas(ServeConfig(source="x"), ReplicaConfig(replicas=1, ray_address=address))


def test_of_a_replicas_traceback_the_line_that_says_why_is_told():
    message = (
        "The deployment failed to start 1 times:\nray::ServeReplica.initialize() (pid=1)\n"
        '  File "x.py", line 3\nshards.errors.UserError: runs/x: no such folder; wanted a run\n\n'
    )
    assert serve.ray_replicas._reason(message) == "runs/x: no such folder; wanted a run"
    assert serve.ray_replicas._reason("ValueError: odd\n\n") == "ValueError: odd"
    assert serve.ray_replicas._reason("") == "a replica cannot start"
