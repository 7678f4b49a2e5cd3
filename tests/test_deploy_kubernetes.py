"""The manifests: held to Kubernetes' schemas and Kubeflow's models, their commands run here."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, run_python
from helpers_deploy import free_port

from deploy.container import command_of
from deploy.render import holes, render
from serve.config import TOKEN_VARIABLE
from shards.dataset import Dataset

pytest.importorskip("kubernetes_validate")
MANIFESTS = REPOSITORY / "deploy" / "kubernetes"
NEEDED = {
    "precompute": {"IMAGE": "r/x:1", "SHARDS": "s3://b/{0..9}.tar", "OUT": "s3://b/latents"},
    "train": {"IMAGE": "r/x:1", "DATA": "s3://b/latents", "OUTPUT_DIR": "s3://b/run"},
    "serve": {"IMAGE": "r/x:1", "SOURCE": "s3://b/run"},
}


def documents(name: str, **values: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(render(MANIFESTS / f"{name}.yaml", NEEDED[name] | values)))


def pod_spec(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    if document["kind"] == "PyTorchJob":
        spec = spec["pytorchReplicaSpecs"]["Worker"]
    pod: dict[str, Any] = spec["template"]["spec"]
    return pod


def container(name: str, **values: str) -> dict[str, Any]:
    (found,) = pod_spec(documents(name, **values)[0])["containers"]
    return dict(found)


@pytest.mark.parametrize("name", NEEDED)
def test_nothing_but_the_users_own_is_asked_for(name: str) -> None:
    found = holes((MANIFESTS / f"{name}.yaml").read_text())
    assert {hole for hole, default in found.items() if default is None} == set(NEEDED[name])


@pytest.mark.parametrize("name", ["precompute", "serve"])
def test_kubernetes_takes_the_manifest(name: str) -> None:
    import kubernetes_validate

    version = kubernetes_validate.latest_version()
    for document in documents(name):
        kubernetes_validate.validate(document, version, strict=True)


def test_the_schema_would_notice_a_slip() -> None:
    import kubernetes_validate

    (job,) = documents("precompute")
    job["spec"]["completion"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


def test_kubeflow_takes_the_training_job() -> None:
    import kubernetes_validate

    (job,) = documents("train")
    assert list(unknown_fields(job, "KubeflowOrgV1PyTorchJob")) == []
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod_spec(job)}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_kubeflows_models_would_notice_a_slip() -> None:
    (job,) = documents("train")
    job["spec"]["elasticPolicy"]["nprocPerNode"] = job["spec"]["elasticPolicy"].pop("nProcPerNode")
    job["spec"]["runPolicy"]["backoffLimit"] = "many"
    assert list(unknown_fields(job, "KubeflowOrgV1PyTorchJob")) == [
        "spec.elasticPolicy.nprocPerNode: no such field",
        "spec.runPolicy.backoffLimit: not int",
    ]


def unknown_fields(value: Any, kind: str, path: str = "") -> Iterator[str]:
    """What differs from the operator's own models; a pod's template has a schema of its own."""
    import kubeflow.training

    if mapped := re.fullmatch(r"dict\(str, (\w+)\)|list\[(\w+)\]", kind):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for name, entry in entries:
            yield from unknown_fields(entry, mapped[1] or mapped[2], f"{path}.{name}")
        return
    model = getattr(kubeflow.training, kind, None)
    if kind in ("int", "str", "bool"):
        if type(value).__name__ != kind:
            yield f"{path[1:]}: not {kind}"
    elif model is not None and kind.startswith("KubeflowOrg"):
        fields = {json: name for name, json in model.attribute_map.items()}
        for name, entry in value.items():
            if name in fields:
                yield from unknown_fields(
                    entry, model.openapi_types[fields[name]], f"{path}.{name}"
                )
            else:
                yield f"{path[1:]}.{name}: no such field"


# What is in them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEEDED)
def test_nothing_runs_as_root_or_by_a_floating_image(name: str) -> None:
    for document in documents(name):
        if document["kind"] == "Service":
            continue
        assert pod_spec(document)["securityContext"]["runAsNonRoot"] is True
        (one,) = pod_spec(document)["containers"]
        assert one["image"] == "r/x:1"
        assert one["securityContext"]["allowPrivilegeEscalation"] is False
        assert int(one["resources"]["limits"]["nvidia.com/gpu"]) >= 1


def test_a_pod_lives_longer_than_the_checkpoint_or_the_drain_may_take() -> None:
    (job,) = documents("train")
    (one,) = pod_spec(job)["containers"]
    (left,) = (e["value"] for e in one["env"] if e["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    assert pod_spec(job)["terminationGracePeriodSeconds"] > int(left)

    deployment = documents("serve")[0]
    (server,) = pod_spec(deployment)["containers"]
    drain = int(server["args"][server["args"].index("--drain-sec") + 1])
    pause = int(server["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert pod_spec(deployment)["terminationGracePeriodSeconds"] > drain + pause


def test_nobody_is_told_to_read_figures_that_want_a_token() -> None:
    (deployment, _) = documents("serve")
    (server,) = pod_spec(deployment)["containers"]
    assert [entry["name"] for entry in server["env"]] == [TOKEN_VARIABLE]
    assert "prometheus.io/scrape" not in deployment["spec"]["template"]["metadata"].get(
        "annotations", {}
    )


def test_the_service_finds_the_pods_and_the_probes_the_port() -> None:
    deployment, service = documents("serve", NAME="mine")
    (server,) = pod_spec(deployment)["containers"]
    assert service["spec"]["selector"].items() <= (
        deployment["spec"]["template"]["metadata"]["labels"].items()
    )
    (port,) = server["ports"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert str(port["containerPort"]) == server["args"][server["args"].index("--port") + 1]
    for probe in ("startupProbe", "readinessProbe"):
        assert server[probe]["httpGet"] == {"path": "/ping", "port": port["name"]}


def test_the_operators_own_names_are_kept() -> None:
    """It asks for a container `pytorch`; NCCL for more shared memory than Docker's 64 MiB."""
    one = container("train")
    assert one["name"] == "pytorch"
    assert "/dev/shm" in [mount["mountPath"] for mount in one["volumeMounts"]]
    (job,) = documents("train", NODES="4", GPUS="2")
    policy = job["spec"]["elasticPolicy"]
    assert (policy["maxReplicas"], policy["nProcPerNode"]) == (4, 2)
    assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == policy["maxReplicas"]


# Their commands -----------------------------------------------------------------------------------


def test_the_pods_of_stage_one_encode_the_whole_dataset(
    image_shards: Path, model_folder: Path, tmp_path: Path
) -> None:
    from precompute.__main__ import main

    out = tmp_path / "latents"
    values = {"SHARDS": f"{image_shards}/*.tar", "OUT": str(out), "PARTS": "2"}
    args = container("precompute", **values, MODEL=str(model_folder), RESOLUTIONS="32")["args"]
    for index in ("0", "1"):
        filled = [arg.replace("$(JOB_COMPLETION_INDEX)", index) for arg in args]
        command = command_of(filled)
        assert command[:3] == [sys.executable, "-m", "precompute"]
        main(command[3:])
    assert len(Dataset(out).image_column(32).shards) == 3


def test_a_pod_of_the_training_starts_torchrun_as_the_operator_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pods of two processes each meet at the operator's rendezvous."""
    stub = tmp_path / "main.py"
    stub.write_text("import os; print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])")
    monkeypatch.setattr("deploy.launch.TRAINER", stub)
    (job,) = documents("train", NODES="2", GPUS="2")
    policy = job["spec"]["elasticPolicy"]
    variables = {
        "PET_RDZV_BACKEND": policy["rdzvBackend"],
        "PET_RDZV_ENDPOINT": f"127.0.0.1:{free_port()}",
        "PET_RDZV_ID": policy["rdzvId"],
        "PET_NNODES": f"{policy['minReplicas']}:{policy['maxReplicas']}",
        "PET_NPROC_PER_NODE": str(policy["nProcPerNode"]),
        "PET_MAX_RESTARTS": str(policy["maxRestarts"]),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command = command_of(container("train")["args"])
    assert command[-5:] == [
        "sd2-base-256",
        "--data",
        "s3://b/latents",
        "--output-dir",
        "s3://b/run",
    ]
    pods = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        for _ in range(2)
    ]
    lines = sorted(line for pod in pods for line in pod.communicate(timeout=120)[0].splitlines())
    assert lines == [f"rank {rank} of 4" for rank in range(4)]
    assert [pod.returncode for pod in pods] == [0, 0]


def test_the_server_of_the_deployment_knows_its_flags() -> None:
    command = command_of(container("serve")["args"])
    done = run_python(*command[1:], "--help")
    assert done.returncode == 0, done.stderr
    assert "--drain-sec FLOAT" in done.stdout
