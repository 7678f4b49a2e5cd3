"""The image: what its entry point becomes, and whether its recipe fits the repository."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import REPOSITORY, run_python
from packaging.requirements import Requirement

from deploy.container import command_of, is_healthy
from deploy.launch import TRAINER, Nodes, trainer_command
from deploy.requirements import requirements
from serve.config import ServeConfig
from shards.errors import UserError

DOCKERFILE = REPOSITORY / "deploy" / "Dockerfile"
PYTHON = sys.executable


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile, lines joined, comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in text.splitlines() if line]


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(PYTHON).parent / "hadolint"
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    patterns = [
        line
        for line in (REPOSITORY / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    for name, arguments in instructions():
        if name != "COPY":
            continue
        for source in arguments.split()[:-1]:
            assert (REPOSITORY / source).exists(), source
            ignored = False
            for pattern in patterns:  # the last that matches decides
                wanted = pattern.removeprefix("!")
                if fnmatch(source, wanted) or source.startswith(f"{wanted}/"):
                    ignored = not pattern.startswith("!")
            assert not ignored, source


def test_every_package_of_ours_is_in_the_image() -> None:
    import tomllib

    document = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    packages = document["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    copied = {arguments.split()[0] for name, arguments in instructions() if name == "COPY"}
    assert set(packages) <= copied


def test_data_runs_and_environments_stay_out_of_the_build() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert next(line for line in lines if not line.startswith("#")) == "*"
    assert not {"!data", "!runs", "!.venv", "!.git"} & set(lines)


def test_the_last_stage_runs_as_a_numbered_user_that_is_not_root() -> None:
    users = [arguments for name, arguments in instructions() if name == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
    stages = [arguments.split()[-1] for name, arguments in instructions() if name == "FROM"]
    assert stages == ["base", "sagemaker", "latentmill"]


def test_the_entry_point_and_the_health_check_are_modules_that_start(tmp_path: Path) -> None:
    """As in the image: from another folder, which has a package called train, and in safe mode."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "__init__.py").write_text("raise SystemExit('the wrong train')")
    entry = json.loads(dict(instructions())["ENTRYPOINT"])
    assert entry[0] == "python"
    done = subprocess.run(
        [PYTHON, *entry[1:], "train", "tiny", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--global-batch-size" in done.stdout
    healthy = re.search(r"CMD (\[.*\])", dict(instructions())["HEALTHCHECK"])
    assert healthy is not None
    assert json.loads(healthy[1]) == [*entry, "healthy"]


def test_the_requirements_of_the_image_are_those_of_the_project() -> None:
    args = dict(
        arguments.split("=", 1)
        for name, arguments in instructions()
        if name == "ARG" and "=" in arguments
    )
    extras = [*args["EXTRAS"].split(","), "gpu"]
    names = {Requirement(line).name for line in requirements(REPOSITORY / "pyproject.toml", extras)}
    assert {"torch", "diffusers", "fastapi", "ray", "s3fs", "torchmetrics", "xformers"} <= names
    done = run_python("deploy/requirements.py", "pyproject.toml", "serve")
    assert "fastapi" in done.stdout
    assert Requirement(f"torch=={args['TORCH']}").specifier.contains(version("torch").split("+")[0])


def test_the_image_pins_what_the_tests_run_with() -> None:
    lines = (REPOSITORY / "deploy" / "constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    assert len({pin.name for pin in pinned}) == len(pinned) > 100
    for name in (
        "accelerate",
        "diffusers",
        "fastapi",
        "numpy",
        "ray",
        "safetensors",
        "transformers",
    ):
        (pin,) = (pin for pin in pinned if pin.name == name)
        assert pin.specifier.contains(version(name)), name


# What the entry point becomes ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["precompute", "serve", "evaluate", "shards", "benchmarks"])
def test_a_package_of_ours_becomes_its_command(name: str) -> None:
    assert command_of([name, "--help"]) == [PYTHON, "-m", name, "--help"]


def test_any_other_program_becomes_itself() -> None:
    assert command_of(["bash", "-c", "true"]) == ["bash", "-c", "true"]
    with pytest.raises(UserError, match="trian: no such command"):
        command_of(["trian"])


def test_one_process_trains_without_torchrun() -> None:
    command = trainer_command(["tiny"], num_processes=1, max_restarts=2)
    assert command == [PYTHON, str(TRAINER), "tiny", "--max-restarts=2"]


def test_several_processes_get_torchrun_and_its_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    command = trainer_command(
        ["tiny"], num_processes=8, nodes=Nodes(2, 1, "algo-1"), max_restarts=2
    )
    assert command[1:3] == ["-m", "torch.distributed.run"]
    assert command[3:-2] == [
        "--nnodes=2",
        "--node-rank=1",
        "--nproc-per-node=8",
        "--master-addr=algo-1",
        "--master-port=29500",
        "--max-restarts=2",
    ]
    assert command[-2:] == [str(TRAINER), "tiny"]


# Docker's health check ----------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(self.server.status)  # type: ignore[attr-defined]
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.status = 200  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_server_is_healthy_when_it_answers_ping(server: HTTPServer, tmp_path: Path) -> None:
    init = tmp_path / "cmdline"
    words = ["python", "-m", "serve", "run", "--port", str(server.server_port)]
    init.write_bytes("\0".join(words).encode() + b"\0")
    assert is_healthy(init)
    server.status = 503  # type: ignore[attr-defined]
    assert not is_healthy(init)


def test_the_port_is_found_as_the_server_would_read_it(
    server: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = tmp_path / "cmdline"
    init.write_bytes(f"python\0-m\0serve\0run\0--port={server.server_port}\0".encode())
    assert is_healthy(init)
    monkeypatch.setattr(ServeConfig, "port", server.server_port)
    init.write_bytes(b"python\0-m\0serve\0run\0--source\0x\0")
    assert is_healthy(init)


def test_a_server_that_does_not_listen_is_not_healthy(tmp_path: Path) -> None:
    init = tmp_path / "cmdline"
    init.write_bytes(b"python\0-m\0serve\0run\0--port\0001\0")
    assert not is_healthy(init)


def test_a_job_is_healthy_while_it_runs(tmp_path: Path) -> None:
    init = tmp_path / "cmdline"
    for command in (
        b"python\0/opt/latentmill/train/main.py\0tiny\0",
        b"python\0-m\0evaluate\0generate\0--prompts\0serve\0",
    ):
        init.write_bytes(command)
        assert is_healthy(init)


def test_a_mounted_folder_belongs_to_who_runs_the_container() -> None:
    """The image's own user may not write into it."""
    for file in (DOCKERFILE, DOCKERFILE.parent / "README.md"):
        text = file.read_text().replace("\\\n#", "").replace("\\\n", "")
        (command,) = re.findall(r"docker run .*--volume.*", text)
        assert '--user "$(id -u):$(id -g)"' in command
    environment = dict(re.findall(r"(\w+)=(\S+)", dict(instructions())["ENV"]))
    assert f"chmod 1777 {environment['HOME']}" in DOCKERFILE.read_text()
