"""Servers by name: what is remembered of them, and what becomes of records that are no longer true.

One server of random weights is started by the command, as a user does, for all tests.
"""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import run_python
from helpers_deployment import build_pipeline_folder

import serve.launch
from serve.__main__ import main
from serve.config import ServeConfig
from serve.deployment import (
    Deployment,
    ServerProcess,
    all_deployments,
    find_deployment,
    forget,
    here,
    log_path,
    recorded_deployment,
    remember,
    running_deployment,
    started_at,
    state_folder,
)
from serve.detached import ServerSettings
from serve.launch import launch, terminate, wait_until_ready
from serve.ray_replicas import ReplicaConfig
from shards.errors import UserError

TOKEN = "a-token-for-the-tests"
SERVER_OPTIONS = ("--steps=3", "--max-prompts=2", "--max-steps=1000", "--drain-sec=60")


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty state folder."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "latentmill" / "serve"


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that can stand for a server, in a session of its own."""
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def deployment_of(process: ServerProcess, name: str = "demo", **changes: object) -> Deployment:
    settings = ServerSettings(server=ServeConfig(source="x", port=0)).to_json()
    facts = {"url": "http://127.0.0.1:1", "token": "", "since": "", "settings": settings}
    return Deployment(
        name=name,
        process=process,
        log=str(log_path(name)),
        **{**facts, **changes},  # type: ignore
    )


def status_of(*argv: str) -> int:
    try:
        main(list(argv))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_settings_name_the_same_folders_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("run", "checker"):
        (tmp_path / name).mkdir()
    server = ServeConfig(source="run", model="owner/name", safety_checker="checker")
    absolute = ServerSettings(server=server).absolute().server
    assert absolute.source == str(tmp_path / "run")
    assert absolute.model == "owner/name"
    assert absolute.safety_checker == str(tmp_path / "checker")


def test_without_the_servers_packages_the_way_to_get_them_is_named(state, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pydantic", None)
    assert status_of("up", "demo", "--source=x") == 2
    assert "pip install fastapi uvicorn prometheus-client" in capsys.readouterr().err


# Records.


def test_a_record_is_read_as_it_was_written_and_by_nobody_else(state, sleeper):
    written = deployment_of(here(sleeper.pid), token="secret")
    remember(written)
    assert find_deployment("demo") == written
    assert stat.S_IMODE((state / "demo.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700


def test_a_state_folder_that_others_could_read_is_closed(state):
    state.mkdir(parents=True)
    state.chmod(0o777)
    assert stat.S_IMODE(state_folder().stat().st_mode) == 0o700


def test_a_relative_state_home_is_ignored_as_the_standard_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", "somewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_folder() == tmp_path / ".local" / "state" / "latentmill" / "serve"


def test_a_state_folder_that_cannot_be_made_is_one_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="XDG_STATE_HOME"):
        state_folder()


def test_a_process_that_ended_is_gone_even_before_anyone_has_fetched_it(state):
    process = subprocess.Popen(["sleep", "600"])
    deployment = deployment_of(here(process.pid))
    assert not deployment.is_gone
    process.kill()
    while Path(f"/proc/{process.pid}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
    assert deployment.is_gone  # a zombie, which still has its number
    process.wait()
    assert deployment.is_gone
    assert started_at(process.pid) == ""


def test_another_process_of_the_same_number_is_not_taken_for_the_server(state, sleeper):
    before = here(sleeper.pid)
    remember(deployment_of(replace(before, started=before.started + "0")))
    with pytest.raises(UserError, match="has ended"):
        running_deployment("demo")
    assert status_of("down", "demo") == 0
    assert sleeper.poll() is None  # what has nothing to do with us lives on
    assert all_deployments() == []


def test_a_process_whose_name_holds_brackets_and_blanks_is_told_apart(tmp_path):
    odd = tmp_path / "a) S 1 (b"
    odd.symlink_to("/bin/sleep")
    process = subprocess.Popen([odd, "600"])
    try:
        assert re.fullmatch(r"[0-9a-f-]{36}:\d+", started_at(process.pid))
        assert started_at(process.pid) != started_at(os.getpid())
    finally:
        process.kill()
        process.wait()


def test_a_server_of_another_machine_is_left_alone(state, capsys):
    remember(deployment_of(ServerProcess("elsewhere", os.getpid(), "then")))
    assert status_of("status") == 0
    assert "on elsewhere" in capsys.readouterr().out
    assert status_of("down", "demo") == 0
    assert "runs on elsewhere" in capsys.readouterr().out
    with pytest.raises(UserError, match="runs on elsewhere"):
        launch("demo", ServerSettings(server=ServeConfig(source="x", port=0)))
    assert find_deployment("demo") is not None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"name": 1, "process": {}}', "\0" * 9])
def test_a_damaged_record_says_which_file_and_what_to_do(state, text):
    state_folder()
    (state / "demo.json").write_text(text)
    with pytest.raises(UserError, match=r"demo\.json: cannot be read .*delete"):
        find_deployment("demo")


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "a.json", "-a", "a b", "x" * 64, "a\n"])
def test_a_name_that_is_no_file_name_is_refused(state, name):
    with pytest.raises(UserError, match="small letters"):
        find_deployment(name)


def test_a_name_that_is_not_there_is_answered_with_those_that_are(state, sleeper):
    remember(deployment_of(here(sleeper.pid), "first"))
    with pytest.raises(UserError, match=r"no server of this name; wanted one of first\. .* up "):
        recorded_deployment("second")


def test_a_newer_server_of_the_same_name_is_not_forgotten_with_the_old_one(state, sleeper):
    old = deployment_of(ServerProcess(socket.gethostname(), 1, "long ago"))
    new = deployment_of(here(sleeper.pid))
    remember(new)
    forget(old)
    assert find_deployment("demo") == new
    forget(new)
    assert find_deployment("demo") is None
    forget(new)  # twice is no error


def test_a_server_that_does_not_end_is_killed_and_that_is_said(state, monkeypatch, capsys):
    monkeypatch.setattr(serve.launch, "_KILL_SEC", 1.0)
    code = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(99)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    deployment = deployment_of(here(process.pid))
    deployment.settings["server"]["drain_sec"] = 0.2
    remember(deployment)
    assert status_of("down", "--all") == 0
    assert "was killed" in capsys.readouterr().out
    assert process.wait() == -signal.SIGKILL
    assert all_deployments() == []


def test_settings_survive_the_way_to_the_server(state):
    server = ServeConfig(source="x", token="secret", max_queue=9, batch_wait_ms=0.5)
    settings = ServerSettings(server=server, replicas=ReplicaConfig(replicas=2, max_replicas=3))
    again = ServerSettings.from_json(json.dumps(settings.to_json()).encode())
    assert again == settings
    assert again.server.token == "secret"


# The commands, with a real server.


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pipeline_folder(tmp_path_factory.mktemp("source") / "pipeline")


Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def command(home: Path) -> Command:
    """`command("up", …)`: as a user runs it."""

    def command(*args: object, **environment: str) -> "subprocess.CompletedProcess[str]":
        environment = {"XDG_STATE_HOME": str(home), "LATENTMILL_TOKEN": "", **environment}
        return run_python("-m", "serve", *args, **environment)

    return command


@pytest.fixture(scope="module")
def up(command: Command, source: Path, home: Path) -> Iterator["subprocess.CompletedProcess[str]"]:
    done = command("up", "demo", f"--source={source}", *SERVER_OPTIONS, LATENTMILL_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    yield done
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(home))
        for deployment in all_deployments():
            terminate(deployment, 60)


@pytest.fixture
def running(up: object, home: Path, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    """The server."""
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    return running_deployment("demo")


def test_up_says_where_the_server_is_and_leaves_it_running(up, running):
    assert f"demo: ready at {running.url} (process {running.process.pid})" in up.stdout
    assert running.log in up.stdout
    assert "python -m serve query demo" in up.stdout
    assert running.client().is_ready()
    pid = running.process.pid
    assert os.getsid(pid) == pid  # the end of the shell is not its end
    assert running.url.startswith("http://127.0.0.1:")


def test_the_token_is_seen_nowhere(up, running):
    assert TOKEN not in up.stdout + up.stderr
    assert TOKEN.encode() not in Path(f"/proc/{running.process.pid}/cmdline").read_bytes()
    assert TOKEN not in Path(running.log).read_text()
    assert stat.S_IMODE(Path(running.log).stat().st_mode) == 0o600


def test_the_same_again_says_that_it_runs_from_whatever_folder(
    running, source, capsys, monkeypatch
):
    monkeypatch.chdir(source.parent)
    monkeypatch.setenv("LATENTMILL_TOKEN", TOKEN)
    assert status_of("up", "demo", "--source=pipeline", *SERVER_OPTIONS) == 0
    said = capsys.readouterr().out
    assert "demo: runs already, with these settings" in said
    assert running.url in said
    assert running_deployment("demo") == running


def test_other_settings_under_the_same_name_are_refused_by_their_names(running, source, capsys):
    options = [*SERVER_OPTIONS, "--max-queue=5"]
    assert status_of("up", "demo", f"--source={source}", *options) == 2
    said = capsys.readouterr().err
    assert "other settings (server.max_queue, server.token)" in said
    assert TOKEN not in said
    assert running.client().is_ready()


def test_query_saves_the_images_that_the_client_gets(running, tmp_path, capsys):
    out = tmp_path / "images"
    prompts = "A red circle!; a leaf; ../../etc/passwd"  # more than the server takes at a time
    options = ["--steps=2", "--seed=5", "--width=32", "--height=48", f"--out={out}"]
    assert status_of("query", "demo", f"--prompt={prompts}", *options) == 0
    said = capsys.readouterr().out
    names = ["5-a-red-circle.png", "6-a-leaf.png", "7-etc-passwd.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert [said.count(f"seed {seed}") for seed in (5, 6, 7)] == [1, 1, 1]
    assert "32x48, 2 steps of dpm++" in said
    client = running.client()
    (same,) = client.images("a leaf", steps=2, seed=6, width=32, height=48)
    assert same.png == (out / "6-a-leaf.png").read_bytes()


def test_query_takes_any_server_by_its_url(running, tmp_path, capsys, monkeypatch):
    out = tmp_path / "one.png"
    argv = ["query", f"--url={running.url}", "--prompt=a lion", "--seed=1", f"--out={out}"]
    assert status_of(*argv) == 2
    assert "(status 401)" in capsys.readouterr().err
    assert not out.exists()
    assert status_of(*argv, f"--token={TOKEN}") == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    out.unlink()
    monkeypatch.setenv("LATENTMILL_TOKEN", TOKEN)
    assert status_of(*argv) == 0
    assert out.exists()


def test_query_shows_warnings_and_refusals(running, tmp_path, capsys):
    long = "a lion " * 100
    assert status_of("query", "demo", f"--prompt={long}", f"--out={tmp_path}") == 0
    assert "warning: " in capsys.readouterr().out
    assert status_of("query", "demo", "--prompt=x", "--width=7", f"--out={tmp_path}") == 2
    said = capsys.readouterr().err
    assert "width" in said
    assert "(status 422)" in said


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["query", "demo", "--prompt=a;b", "--out=x.png"], "wanted a folder for 2 prompts"),
        (["query", "--prompt=a"], "a name or --url is needed"),
        (["query", "demo", "--prompt=a", "--token=x"], "--token: is for --url"),
        (["query", "demo", "--url=http://localhost:1", "--prompt=a"], "a name or --url is needed"),
        (["query", "other", "--prompt=a"], "no server of this name; wanted one of demo"),
        (["down"], "a name or --all is needed"),
        (["down", "demo", "--all"], "a name or --all is needed"),
        (["up", "x", "--source=y", "--ray-address=auto"], "--ray-address"),
        (["up", "x", "--source=y", "--replicas=2", "--max-replicas=1"], "--max-replicas"),
    ],
)
def test_a_command_that_makes_no_sense_is_one_line(running, capsys, argv, why):
    assert status_of(*argv) == 2
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1


def test_status_lists_what_runs_and_says_once_what_has_ended(running, sleeper, capsys):
    process = ServerProcess(socket.gethostname(), sleeper.pid, "another time")
    remember(deployment_of(process, "ended"))
    running.client().images(["a", "b"])
    assert status_of("status") == 0
    _, demo, ended, note = capsys.readouterr().out.splitlines()
    name, url, _, _, state, requests, refused, images, queue = demo.split()
    assert (name, url, state, refused, queue) == ("demo", running.url, "ready", "0", "0")
    assert int(images) > int(requests) > 0
    assert ended.split()[0] == "ended"
    assert "ended has ended by itself; its log: " in note
    assert status_of("status") == 0
    assert "ended" not in capsys.readouterr().out


def test_a_port_that_is_taken_is_told_before_anything_is_started(running, source, capsys):
    port = running.url.rpartition(":")[2]
    assert status_of("up", "second", f"--source={source}", f"--port={port}") == 2
    assert f"127.0.0.1:{port} cannot be listened on" in capsys.readouterr().err
    assert find_deployment("second") is None


def test_a_server_that_cannot_start_shows_why_and_leaves_no_record(command, home, tmp_path):
    done = command("up", "broken", f"--source={tmp_path}")
    assert done.returncode == 2
    assert "serve: error: broken: the server ended while it started" in done.stderr
    assert str(tmp_path) in done.stderr.partition("  | ")[2]  # the server's own words
    assert "Traceback" not in done.stderr
    folder = home / "latentmill" / "serve"
    assert not (folder / "broken.json").exists()
    assert (folder / "broken.log").exists()


def test_a_server_that_takes_too_long_is_ended(running, source):
    slow = ServerSettings(server=ServeConfig(source=str(source), port=0))
    deployment, is_new = launch("slow", slow)
    assert is_new
    ticks: list[float] = []
    with pytest.raises(UserError, match="not ready after 0 s"):
        wait_until_ready(deployment, 0, ticks.append)
    assert deployment.is_gone
    assert find_deployment("slow") is None


def test_down_waits_for_what_was_accepted(running, command):
    """The last test: it ends the server of all the others."""
    client = running.client()
    with ThreadPoolExecutor(2) as pool:
        # Of different kinds, so that one waits for the other.
        asked = [pool.submit(client.images, "a lion", steps=steps) for steps in (60, 61)]
        while "latentmill_queued_images 1.0" not in client.metrics():
            assert not any(one.done() for one in asked)
        done = command("down", "demo")
        assert [len(one.result()) for one in asked] == [1, 1]
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "demo: down"
    assert running.is_gone
    assert all_deployments() == []
