"""A job with two workers that is killed in every way, or asked to stop, and begun again."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import REPOSITORY
from helpers_precompute import (
    GONE_SEC,
    NUM_SHARDS,
    ForkedJob,
    arguments,
    build_small_shards,
    num_finished,
    run_here,
    start_job,
    wait_until,
)
from test_precompute_job import contents

from shards.verify import iter_problems

NUM_KILLS = 50


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_shards(tmp_path_factory.mktemp("kill-images"))


@pytest.fixture(scope="module")
def unbroken(
    images: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("kill-unbroken") / "latents"
    run_here(images, model_folder, out)
    return contents(out)


def kill_something(job: ForkedJob, rng: random.Random) -> str:
    """A worker, more often than not; or the job; or all at once."""
    what = rng.choice(["worker", "worker", "worker", "job", "group"])
    if what == "group":
        job.send_to_group(signal.SIGKILL)
    elif what == "job":
        job.send(signal.SIGKILL)
    elif workers := job.workers():
        try:
            rng.choice(workers).kill()
        except psutil.NoSuchProcess:
            return "nothing"
    else:
        return "nothing"
    return what


def test_killed_at_fifty_random_moments_it_ends_in_the_same_bytes(
    images, model_folder, unbroken, tmp_path
):
    out, output = tmp_path / "latents", tmp_path / "output"
    argv = arguments(images, model_folder, out, "--workers=2")
    begin = time.monotonic()
    assert start_job(argv, output).end()[0] == 0
    longest_sec = time.monotonic() - begin
    assert contents(out) == unbroken
    rng = random.Random(0)
    killed: list[str] = []
    progress: set[int] = set()
    shutil.rmtree(out)
    while len(killed) < NUM_KILLS:
        job = start_job(argv, output)
        while job.process.is_alive() and len(killed) < NUM_KILLS:
            time.sleep(rng.uniform(0.0, longest_sec / 2))
            if job.process.is_alive() and (what := kill_something(job, rng)) != "nothing":
                killed.append(what)
                progress.add(num_finished(out))
        status, text = job.end()
        assert status in (0, 2, -signal.SIGKILL), text
        if status == 2:  # that was too often
            assert "worker died 3 times" in text or "died 3 times while they loaded" in text
        if status == 0:
            assert contents(out) == unbroken
            shutil.rmtree(out)
    assert set(killed) == {"worker", "job", "group"}
    assert len(progress) >= 8, progress
    assert start_job(argv, output).end()[0] == 0
    assert contents(out) == unbroken
    assert list(iter_problems(out, full=True)) == []
    assert {path.name for path in tmp_path.iterdir()} == {"latents", "output"}


def test_workers_of_a_job_that_is_killed_while_they_start_do_not_outlive_it(
    images, model_folder, tmp_path
):
    argv = arguments(images, model_folder, tmp_path / "latents", "--workers=2")
    with subprocess.Popen(
        [sys.executable, "-m", "precompute", *argv],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as job:
        wait_until(lambda: len(psutil.Process(job.pid).children()) >= 2)
        children = psutil.Process(job.pid).children()
        time.sleep(1.0)
        job.kill()
        _, alive = psutil.wait_procs(children, timeout=4 * GONE_SEC)  # importing takes its time
        assert not alive
        assert job.stderr is not None
        assert job.stderr.read() == ""


# Asked to stop.


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGTERM to all", "SIGINT to all"])
def test_a_signal_stops_it_and_the_same_command_goes_on(
    images, model_folder, unbroken, tmp_path, workers, how
):
    out, output = tmp_path / "latents", tmp_path / "output"
    argv = arguments(images, model_folder, out, f"--workers={workers}")
    job = start_job(argv, output)
    wait_until(lambda: num_finished(out) >= 2)
    number = signal.Signals[how.split()[0]]
    begin = time.monotonic()
    (job.send_to_group if how.endswith("all") else job.send)(number)
    status, text = job.end()
    assert time.monotonic() - begin < GONE_SEC
    assert status == 0, text
    assert "stopped as asked" in text
    assert "The same command again does the rest" in text
    assert "Traceback" not in text
    assert "died" not in text
    assert 2 <= num_finished(out) < NUM_SHARDS
    # What has begun may be listed; nothing is damaged.
    assert not [problem for problem in iter_problems(out, full=True) if problem.redo]
    assert start_job(argv, output).end()[0] == 0
    assert contents(out) == unbroken


def test_signals_to_all_while_workers_start_are_quiet(images, model_folder, tmp_path):
    argv = arguments(images, model_folder, tmp_path / "latents", "--workers=2")
    for number in (signal.SIGINT, signal.SIGTERM):
        with subprocess.Popen(
            [sys.executable, "-m", "precompute", *argv],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        ) as job:
            wait_until(lambda job=job: len(psutil.Process(job.pid).children()) >= 2)
            children = psutil.Process(job.pid).children()
            time.sleep(0.5)
            os.killpg(job.pid, number)
            _, stderr = job.communicate(timeout=30)
            assert job.returncode == 0
            assert stderr.count("\n") == 1, stderr
            assert "stopped as asked" in stderr
            assert not psutil.wait_procs(children, timeout=GONE_SEC)[1]
