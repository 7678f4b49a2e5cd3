"""The server as a process: started, asked as SageMaker asks, ended by a signal; or refused."""

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY, run_python
from helpers_serve import ServerProcess, save_pipeline, served

from serve.__main__ import main


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("serve") / "pipeline")


@pytest.fixture(scope="module")
def server(pipeline: Path) -> Iterator[ServerProcess]:
    with served("--source", pipeline, "--max-queue", 8, "--max-batch-size", 4) as server:
        yield server
        server.process.send_signal(signal.SIGTERM)
        out, errors = server.process.communicate(timeout=60)
        assert (server.process.returncode, out, errors) == (0, "", "")


def test_a_real_pipeline_answers(server):
    status, body = server.post("/v1/images", {"prompt": ["a", "b"], "steps": 2, "seed": 1})
    assert status == 200
    assert len(json.loads(body)["images"]) == 2


def test_the_answer_comes_as_the_container_contract_has_it(server):
    assert server.get("/ping")[0] == 200
    platform = {
        "accept": "image/png",
        "X-Amzn-SageMaker-Custom-Attributes": "trace=1",
        "X-Amzn-SageMaker-Target-Model": "m",
    }
    asked = {"inputs": "a red circle", "parameters": {"num_inference_steps": 2, "seed": 3}}
    status, png = server.post("/invocations", asked, **platform)
    assert (status, png[:4]) == (200, b"\x89PNG")
    status, body = server.post("/invocations", asked)
    assert json.loads(body).keys() == {"generated_images", "seeds", "flagged", "warnings"}


def test_at_four_times_its_capacity_a_server_refuses_and_makes_no_error(server):
    """12 images have room (a batch and the queue); 48 clients ask at once."""
    answers: list[tuple[int, bytes]] = []

    def ask() -> None:
        answers.append(server.post("/v1/images", {"prompt": "a", "steps": 4}))

    threads = [threading.Thread(target=ask) for _ in range(48)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = [status for status, _ in answers]
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 8
    assert statuses.count(429) > 0
    figures = server.get("/metrics")[1].decode()
    assert "latentmill_queued_images 0.0" in figures


# What does not start ------------------------------------------------------------------------------


@pytest.fixture
def refused_start(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused_start(*flags)`: the one line that a server ends with that does not start."""

    def start(*flags: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["run", *map(str, flags)])
        out, errors = capsys.readouterr()
        assert (ended.value.code, out) == (2, "")
        (line,) = errors.splitlines()
        return line

    return start


def test_a_checkpoint_that_does_not_fit_its_model_ends_the_start_before_the_port_opens(
    refused_start, pipeline, tmp_path
):
    broken = tmp_path / "broken"
    broken.mkdir()
    for part in pipeline.iterdir():
        (broken / part.name).symlink_to(part)
    (broken / "unet").unlink()
    (broken / "unet").mkdir()
    config = json.loads((pipeline / "unet" / "config.json").read_text())
    config["cross_attention_dim"] = 32
    (broken / "unet" / "config.json").write_text(json.dumps(config))
    name = "diffusion_pytorch_model.safetensors"
    (broken / "unet" / name).symlink_to(pipeline / "unet" / name)
    line = refused_start("--source", broken, "--port", "0")
    assert line.startswith("serve: error: ")
    assert "broken" in line


def test_a_port_that_is_taken_ends_the_start_before_the_model_is_loaded(refused_start):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = refused_start("--source", "/nowhere", "--port", port)
    assert f"127.0.0.1:{port} cannot be listened on" in line


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_an_address_that_others_reach_wants_a_token_or_leave_for_everyone(refused_start, host):
    line = refused_start("--source", "x", "--host", host)
    assert "no token" in line
    assert "--allow-anonymous" in line


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--steps", 101),
        ("--max-prompts", 33),
        ("--max-batch-size", 0),
        ("--port", 70_000),
        ("--timeout-sec", 0),
        ("--guidance", "nan"),
        ("--scheduler", "none"),
        ("--token", "ü"),
        ("--token", " padded"),
        ("--token", "two\nlines"),
        ("--max-queue", 0),
    ],
)
def test_a_setting_out_of_its_range_is_named(refused_start, flag, value):
    assert f"error: {flag}: " in refused_start("--source", "x", flag, value)


def test_a_token_of_the_environment_does_not_show_in_what_is_printed():
    code = "from serve.config import ServeConfig; print(ServeConfig(source='x'))"
    for command in (
        ("-c", code),
        ("-m", "serve", "run", "--help"),
        ("-m", "serve", "up", "--help"),
    ):
        done = run_python(*command, LATENTMILL_TOKEN="hush")
        assert "source" in done.stdout
        assert "hush" not in done.stdout + done.stderr


def test_the_overview_names_every_command():
    done = run_python("-m", "serve")
    assert done.returncode == 0
    for name in ("run", "up", "query", "status", "down"):
        assert f"\n  {name} " in done.stdout
    assert "unknown" in run_python("-m", "serve", "rnu").stderr


def test_help_loads_no_heavy_library():
    heavy = ["torch", "diffusers", "transformers", "fastapi", "uvicorn", "prometheus_client"]
    code = "import sys; sys.argv = ['serve', 'run', '--help']\n"
    code += "import runpy\ntry: runpy.run_module('serve', run_name='__main__')\n"
    code += f"except SystemExit: pass\nassert not set({heavy!r}) & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--max-queue" in done.stdout


def test_a_queue_that_is_too_short_for_a_request_is_named(refused_start):
    line = refused_start("--source", "x", "--max-queue", 4)
    assert "error: --max-prompts: 8, and --max-queue is 4" in line
