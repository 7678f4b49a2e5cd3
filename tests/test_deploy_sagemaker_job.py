"""A training job and an endpoint, each in processes started exactly as the container starts them.

One job: stopped on one machine, started again on two, its model handed to an endpoint.
"""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from helpers_deploy import free_port
from helpers_train import metrics_of, write_unet
from PIL import Image

from deploy.render import render
from shards.canonical import canonical_json
from train.checkpoint import checkpoints_of

pytestmark = pytest.mark.timeout(240)

HOSTS = ["127.0.0.1", "localhost"]


def start_container(base: Path, argument: str, **variables: str) -> subprocess.Popen[str]:
    """`docker run IMAGE <argument>`: the image's entry point, from a folder of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SM_")}
    return subprocess.Popen(
        [sys.executable, "-m", "deploy.container", argument],
        cwd=base,
        env={
            **kept,
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
            "SAGEMAKER_BASE_DIR": str(base),
            "ACCELERATE_USE_CPU": "1",
            "OMP_NUM_THREADS": "1",
            **variables,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def remove(container: subprocess.Popen[str]) -> None:
    """With all that it started, whatever state they are in."""
    with suppress(ProcessLookupError):
        os.killpg(container.pid, signal.SIGKILL)
    container.wait()


def fill(
    base: Path, hosts: list[str], current: str, hyperparameters: dict[str, str], **channels: Path
) -> Path:
    """A machine's /opt/ml before the container starts."""
    config = base / "input" / "config"
    config.mkdir(parents=True)
    resources = {"current_host": current, "hosts": hosts, "network_interface_name": "lo"}
    for name, document in {
        "hyperparameters": hyperparameters,
        "resourceconfig": resources,
        "inputdataconfig": {channel: {} for channel in channels},
    }.items():
        (config / f"{name}.json").write_text(canonical_json(document))
    (base / "input" / "data").mkdir()
    for channel, folder in channels.items():
        (base / "input" / "data" / channel).symlink_to(folder)
    for name in ("model", "checkpoints", "output"):
        (base / name).mkdir()
    return base


@dataclass(frozen=True)
class Job:
    """What two containers left, one after the other."""

    stopped_status: int
    stopped_at: int
    statuses: list[int]
    said: str
    first: Path  # the first machine's /opt/ml


@pytest.fixture(scope="module")
def job(latent_dataset: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    channels = {"latents": latent_dataset, "model": model_folder}
    hyperparameters = {
        "preset": "tiny",
        "unet": write_unet(folder / "unet.json", cross_attention_dim=128),
        "resolution": "32",
        "lr_schedule": "constant",
        "max_steps": "9999",
        "global_batch_size": "8",
        "log_every": "1",
        "num_samples": "0",
        "validation_samples": "0",
    }
    one = fill(folder / "one", HOSTS[:1], HOSTS[0], hyperparameters, **channels)
    container = start_container(one, "train")
    try:
        assert container.stdout is not None
        for line in container.stdout:
            if line.startswith("step "):
                container.send_signal(signal.SIGTERM)
                break
        said, _ = container.communicate(timeout=100)
    finally:
        remove(container)
    assert checkpoints_of(one / "checkpoints"), said
    stopped_at = checkpoints_of(one / "checkpoints")[-1].step

    hyperparameters["max_steps"] = str(stopped_at + 3)
    machines = []
    for host in HOSTS:
        base = fill(folder / f"two-{host}", HOSTS, host, hyperparameters, **channels)
        # SageMaker fills each machine's folder from S3.
        shutil.copytree(one / "checkpoints", base / "checkpoints", dirs_exist_ok=True)
        machines.append(base)
    port = str(free_port())
    containers = [start_container(base, "train", MASTER_PORT=port) for base in machines]
    try:
        output = [started.communicate(timeout=200)[0] for started in containers]
    finally:
        for started in containers:
            remove(started)
    statuses = [started.returncode for started in containers]
    return Job(container.returncode, stopped_at, statuses, "\n".join(output), machines[0])


def test_a_stopped_job_ends_well_with_a_checkpoint(job: Job) -> None:
    assert job.stopped_status == 0
    assert job.stopped_at >= 1


def test_the_job_goes_on_from_there_on_two_machines(job: Job) -> None:
    assert job.statuses == [0, 0], job.said
    assert "x 2 processes" in job.said
    run = job.first / "checkpoints"
    assert checkpoints_of(run)[-1].step == job.stopped_at + 3
    assert [row["step"] for row in metrics_of(run)] == list(range(1, job.stopped_at + 4))
    assert not (job.first / "output" / "failure").exists()


def test_the_requests_metrics_are_found_in_what_the_trainer_says(job: Job) -> None:
    values = dict.fromkeys(("NAME", "ROLE", "IMAGE", "BUCKET"), "x")
    request = yaml.safe_load(render(REPOSITORY / "deploy/sagemaker/training-job.yaml", values))
    patterns = {
        metric["Name"]: metric["Regex"]
        for metric in request["AlgorithmSpecification"]["MetricDefinitions"]
    }
    line = next(line for line in job.said.splitlines() if line.startswith("step "))
    for name in ("train:loss", "train:images_per_sec"):
        found = re.search(patterns[name], line)
        assert found is not None
        assert float(found[1]) > 0
    validated = re.search(
        patterns["validation:loss"], "step 500 | val/loss 0.1234 | val/ema_loss 1"
    )
    assert validated is not None
    assert validated[1] == "0.1234"


def test_the_model_folder_has_a_pipeline(job: Job) -> None:
    parts = {path.name for path in (job.first / "model").iterdir()}
    assert {"model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler"} <= parts


# The endpoint -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endpoint(job: Job) -> Iterator[str]:
    """The same image, started on what the job left; its address."""
    port = str(free_port())
    container = start_container(job.first, "serve", SAGEMAKER_BIND_TO_PORT=port)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 120
        while status_of(f"{url}/ping") != 200:
            assert container.poll() is None, container.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.2)
        yield url
        container.send_signal(signal.SIGTERM)
        said, _ = container.communicate(timeout=30)  # SageMaker kills after 30 seconds
        assert container.returncode == 0, said
    finally:
        remove(container)


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def invoke(url: str, body: dict[str, Any], accept: str = "application/json") -> bytes:
    request = urllib.request.Request(
        f"{url}/invocations",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Accept": accept},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        answer: bytes = reply.read()
    return answer


def test_ping_is_answered_when_the_model_is_loaded(endpoint: str) -> None:
    assert status_of(f"{endpoint}/ping") == 200


def test_an_invocation_answers_with_images(endpoint: str) -> None:
    body = {"inputs": "a red circle", "parameters": {"num_inference_steps": 2, "seed": 1}}
    (encoded,) = json.loads(invoke(endpoint, body))["generated_images"]
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert image.format == "PNG"
    assert image.size == (32, 32)


def test_an_invocation_answers_with_a_picture_where_one_is_accepted(endpoint: str) -> None:
    body = {"inputs": "a red circle", "parameters": {"num_inference_steps": 2}}
    assert Image.open(io.BytesIO(invoke(endpoint, body, "image/png"))).format == "PNG"


def test_an_invocation_that_makes_no_sense_is_the_callers_fault(endpoint: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        invoke(endpoint, {"inputs": "x", "parameters": {"num_inference_steps": -1}})
    assert 400 <= refused.value.code < 500
    assert status_of(f"{endpoint}/ping") == 200
