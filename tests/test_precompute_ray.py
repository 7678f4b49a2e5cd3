"""Shards over a Ray of our own: the same bytes, whatever dies; and on the loopback interface."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import REPOSITORY, image_bytes, sample_members, smooth_image, write_tar
from helpers_precompute import (
    SHARD_LENGTH,
    arguments,
    build_small_shards,
    num_finished,
    run_here,
    start_job,
    wait_until,
)
from test_precompute_job import contents

import precompute.job
import precompute.ray_cluster
from precompute.transform import Crop
from precompute.worker_spec import WorkerSpec
from shards.errors import UserError
from shards.source_shard import SourceShard
from shards.verify import iter_problems

pytestmark = pytest.mark.skipif(not find_spec("ray"), reason="Ray is not installed")

NUM_SHARDS = 8


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_shards(tmp_path_factory.mktemp("ray-images"), NUM_SHARDS)


@pytest.fixture(scope="module")
def unbroken(
    images: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("ray-unbroken") / "latents"
    run_here(images, model_folder, out)
    return contents(out)


@pytest.fixture(scope="module")
def own_ray() -> Iterator[None]:
    """A Ray as a job starts it, but for all jobs of this process, and of two CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # is left as it was
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        patch.setattr(ray, "init", partial(ray.init, num_cpus=2))
        with precompute.ray_cluster.connected("", ["shards"], "--engine ray"):
            yield


@pytest.fixture
def run(
    own_ray: None,
    images: Path,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., None]:
    """`run(**options)`: the job with two actors."""
    monkeypatch.setattr("precompute.ray_cluster.connected", lambda *_: nullcontext())

    def run(**options: Any) -> None:
        defaults: dict[str, Any] = {"engine": "ray", "workers": 2}
        run_here(images, model_folder, tmp_path / "latents", **defaults | options)

    return run


def processes_titled(title: str) -> list[psutil.Process]:
    """Ray gives its processes the name of what they run; those below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def expect_nothing_held() -> None:
    """All CPUs and all of the object store are free again."""
    import ray

    wait_until(lambda: ray.available_resources() == ray.cluster_resources(), timeout_sec=30)


@pytest.mark.parametrize("decode_workers", [2, 100])
def test_bytes_are_those_of_the_local_engine_however_scarce_the_cpus_are(
    run, unbroken, tmp_path, decode_workers, capsys
):
    """Two CPUs, two actors of three shards each, and decoding that asks for one CPU, or all."""
    run(decode_workers=decode_workers)
    said = capsys.readouterr().out
    assert f"encoded {NUM_SHARDS * SHARD_LENGTH} samples" in said
    assert "a worker died" not in said
    assert contents(tmp_path / "latents") == unbroken
    expect_nothing_held()


@pytest.mark.parametrize(
    ("title", "why"), [("ray::Actor.encode", "actor "), ("ray::_decode_chunks", "decoding 0")]
)
def test_whatever_process_is_killed_the_bytes_are_the_same(
    run, unbroken, tmp_path, capsys, title, why
):
    killed: list[int] = []

    def kill_some() -> None:
        while len(killed) < 2 and not over.is_set():
            for process in processes_titled(title)[:1]:
                process.kill()
                killed.append(process.pid)
                time.sleep(1.0)
            time.sleep(0.002)

    over = threading.Event()
    killer = threading.Thread(target=kill_some)
    killer.start()
    try:
        run(workers=1)
    finally:
        over.set()
        killer.join()
    assert killed
    said = capsys.readouterr().out
    assert f"a worker died: {why}" in said
    assert contents(tmp_path / "latents") == unbroken
    assert list(iter_problems(tmp_path / "latents", full=True)) == []
    expect_nothing_held()


def test_a_shard_that_cannot_be_read_is_reported_and_the_job_goes_on(run, images, tmp_path, capsys):
    script = tmp_path / "read-shard"
    script.write_text(f"#!/bin/bash\n[ $1 = 00002.tar ] && exit 127\nexec cat {images}/$1\n")
    script.chmod(0o755)
    with pytest.raises(UserError, match=rf"1 of {NUM_SHARDS} shards unread; .*00002\.tar"):
        run(shards=f"pipe:{script} {{00000..{NUM_SHARDS - 1:05d}}}.tar", workers=1)
    assert num_finished(tmp_path / "latents") == NUM_SHARDS - 1
    assert "a worker died" not in capsys.readouterr().out


def test_a_model_that_an_actor_cannot_load_is_one_error(run, monkeypatch, tmp_path, model_folder):
    make_spec = precompute.job.WorkerSpec
    monkeypatch.setattr(
        "precompute.job.WorkerSpec", lambda **facts: make_spec(**{**facts, "device": "nonsense"})
    )
    with pytest.raises(UserError, match="--device: nonsense"):
        run()
    expect_nothing_held()


def test_what_was_streamed_of_an_abandoned_shard_is_freed(own_ray, tmp_path):
    """A decoding task that waits for its consumer ends with it."""
    import ray

    from precompute.ray_actor import RemoteShard

    rng = np.random.default_rng(0)
    picture = image_bytes(smooth_image(rng, 128, 128), "JPEG")
    members = [m for n in range(200) for m in sample_members(f"{n:04d}", picture, "a lion")]
    path = write_tar(tmp_path / "00000.tar", members)
    spec = WorkerSpec(
        dataset=str(tmp_path),
        model=None,  # type: ignore[arg-type]
        columns=[],
        device="cpu",
        dtype="float32",
        wanted="",
        caption_field="",
        batch_size=4,
        decode_workers=1,
        compiled=False,
    )
    source = SourceShard(url=str(path), name="00000", num_bytes=path.stat().st_size)
    shard = RemoteShard(spec, source, [Crop(((128, 128),))])
    assert next(iter(shard)).row.key == "0000"
    wait_until(lambda: ray.available_resources().get("CPU") == 1.0)
    used = ray.cluster_resources()["object_store_memory"]
    wait_until(lambda: 1e6 < used - ray.available_resources()["object_store_memory"] < 6e6)
    time.sleep(1.0)  # it does not go on by itself
    assert used - ray.available_resources()["object_store_memory"] < 6e6
    shard.close()
    del shard
    expect_nothing_held()


# As a command.


def start_command(*argv: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "precompute", "--engine=ray", *argv],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def listening(processes: list[psutil.Process]) -> dict[str, set[str]]:
    """Addresses on which they listen, by process name."""
    found: dict[str, set[str]] = {}
    for process in processes:
        try:
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.setdefault(process.name(), set()).add(connection.laddr.ip)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM to all"])
def test_a_job_listens_on_loopback_alone_and_stops_as_asked(
    images, model_folder, unbroken, tmp_path, how
):
    out = tmp_path / "latents"
    job = start_command(*arguments(images, model_folder, out, "--workers=1"))
    wait_until(lambda: num_finished(out) >= 1 or job.poll() is not None, timeout_sec=100)
    os.kill(job.pid, signal.SIGSTOP)  # it hands out nothing more while it is looked at
    processes = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    listeners = listening(processes)
    assert {"gcs_server", "raylet"} <= listeners.keys()
    addresses = set().union(*listeners.values())
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, listeners
    number = signal.Signals[how.split()[0]]
    begin = time.monotonic()
    os.kill(job.pid, signal.SIGCONT)
    (os.killpg if how.endswith("all") else os.kill)(job.pid, number)
    stdout, stderr = job.communicate(timeout=30)
    assert time.monotonic() - begin < 15
    assert job.returncode == 0, stderr
    # Ray's own core may log that its processes, told to end at once, no longer answer each other.
    of_ray = (
        re.compile(r"\[\d{4}-\d\d-\d\d .*actor_task_submitter") if how.endswith("all") else None
    )
    said = [line for line in stderr.splitlines() if not (of_ray and of_ray.match(line))]
    assert said == [
        "precompute: stopped as asked; what is written is whole. The same command again does the "
        "rest"
    ]
    assert not re.search(r"\bray\b|^\[", stdout.replace(str(tmp_path), ""), re.IGNORECASE | re.M)
    assert not psutil.wait_procs(processes, timeout=10)[1]
    assert num_finished(out) < NUM_SHARDS
    # What has begun may be listed; nothing is damaged.
    assert not [problem for problem in iter_problems(out, full=True) if problem.redo]
    run_here(images, model_folder, out)
    assert contents(out) == unbroken


def test_a_wrong_address_is_one_line_at_once(images, model_folder, tmp_path):
    for address in ("127.0.0.1:1", "nohost.invalid:6379", "ray://127.0.0.1:1"):
        begin = time.monotonic()
        argv = arguments(images, model_folder, tmp_path / "latents")
        argv += ["--engine=ray", f"--ray-address={address}", "--workers=1"]
        status, text = start_job(argv, tmp_path / "output").end()
        assert time.monotonic() - begin < 30
        assert status == 2
        error = text.splitlines()[-1]
        assert error.startswith(f"precompute: error: --ray-address: {address}: no Ray there (")
        assert "host:port of a running cluster" in error
        assert "Traceback" not in text
