"""The Ray cluster's file, and the launcher of its trainer pool on two machines that are one."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from helpers_deploy import free_port

import deploy.ray_cluster.train
from deploy.launch import Nodes
from deploy.ray_cluster.train import Machine
from deploy.render import render
from precompute.config import PrecomputeConfig

pytestmark = pytest.mark.skipif(not find_spec("ray"), reason="Ray is not installed")

CLUSTER = REPOSITORY / "deploy" / "ray_cluster" / "cluster.yaml"
VALUES = {"IMAGE": "r/x:1", "REGION": "us-west-2", "PROFILE": "arn:aws:iam::1:instance-profile/x"}


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(render(CLUSTER, VALUES))
    return document


def test_rays_own_schema_takes_the_file(config: dict[str, Any]) -> None:
    import ray.autoscaler
    from jsonschema import validate

    schema = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
    validate(config, json.loads(schema.read_text()))


def test_the_pools_are_as_large_as_published(config: dict[str, Any]) -> None:
    """48 A10G (g5.2xlarge, one each) encode; 32 A100-80GB (p4de.24xlarge, eight each) train."""
    types = config["available_node_types"]
    encoder, trainer = types["encoder"], types["trainer"]
    assert encoder["node_config"]["InstanceType"] == "g5.2xlarge"
    assert encoder["min_workers"] * encoder["resources"]["GPU"] == 48
    assert encoder["min_workers"] * encoder["resources"]["CPU"] == 192 + 192
    assert trainer["node_config"]["InstanceType"] == "p4de.24xlarge"
    assert trainer["min_workers"] * 8 == 32
    assert config["max_workers"] == encoder["max_workers"] + trainer["max_workers"]
    assert config["head_node_type"] in types


def test_stage_one_cannot_land_on_a_trainer(config: dict[str, Any]) -> None:
    trainer = config["available_node_types"]["trainer"]["resources"]
    assert (trainer["CPU"], trainer["GPU"]) == (0, 0)
    assert trainer["trainer"] == 1
    assert "trainer" not in config["available_node_types"]["encoder"]["resources"]


def test_the_commands_of_the_file_have_flags_that_exist() -> None:
    import tyro

    from deploy.ray_cluster.train import RayTrainConfig
    from train.main import parse

    text = re.sub(r" \\\n#\s+", " ", CLUSTER.read_text())
    encode, train = (
        shlex.split(shlex.split(line)[-1]) for line in re.findall(r"ray exec .*", text)
    )
    assert encode[:3] == ["python", "-m", "precompute"]
    parsed = tyro.cli(PrecomputeConfig, args=encode[3:])
    assert (parsed.engine, parsed.workers) == ("ray", 48)
    assert train[:3] == ["python", "-m", "deploy.ray_cluster.train"]
    split = train.index("--")
    assert tyro.cli(RayTrainConfig, args=train[3:split]).nodes == 4
    assert parse(train[split + 1 :]).resolution == 256


# The launcher -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray of two machines with `trainer`, all on the loopback interface."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("MASTER_PORT", str(free_port()))
        from ray.cluster_utils import Cluster

        cluster = Cluster()
        for _ in range(2):
            cluster.add_node(
                num_cpus=0,
                num_gpus=0,
                resources={"trainer": 1},
                include_dashboard=False,
                node_ip_address="127.0.0.1",
            )
        cluster.wait_for_nodes()
        yield cluster.address
        cluster.shutdown()


def launch(address: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "deploy.ray_cluster.train",
            "--ray-address",
            address,
            *map(str, arguments),
        ],
        cwd=REPOSITORY,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def test_each_machine_starts_torchrun_and_they_meet(address: str) -> None:
    done = launch(address, "--nodes", 2, "--processes", 1, "--", "tiny", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: train/main.py") == 2


def test_a_run_that_fails_is_tried_again_so_often(address: str) -> None:
    done = launch(
        address, *("--nodes", 2, "--processes", 1, "--max-failures", 1, "--", "tiny", "--no-such")
    )
    assert done.returncode == 2
    assert done.stderr.count("failed with status 1") == 2
    assert "--max-failures: 2 attempts failed" in done.stderr


def test_a_mistake_of_one_process_alone_is_not_tried_again(address: str) -> None:
    done = launch(address, "--processes", 1, "--", "tiny", "--data", "/nowhere")
    assert done.returncode == 2
    assert "attempt" not in done.stderr


def test_a_machine_that_is_stopped_before_it_has_started_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(deploy.ray_cluster.train, "trainer_command", lambda *_, **__: command)
    machine = Machine()
    machine.stop()
    assert machine.train([], Nodes(), 1) == -signal.SIGTERM


def test_without_arguments_the_launcher_says_what_it_wants(address: str) -> None:
    done = launch(address, "--nodes", 2)
    assert done.returncode == 2
    assert "wanted arguments of train/main.py" in done.stderr


def test_a_cluster_that_is_not_there_is_named() -> None:
    done = launch("127.0.0.1:1", "--", "tiny")
    assert done.returncode == 2
    assert "127.0.0.1:1" in done.stderr
