"""An arm in a process of its own: the figures of one here, its errors, and no process left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import pytest
import torch
from conftest import REPOSITORY

from benchmarks.train_step.case import is_out_of_memory, open_arm
from benchmarks.train_step.data import columns_for, write_latents
from benchmarks.train_step.remote_arm import RemoteArm
from benchmarks.train_step.rungs import base_case
from shards.errors import DatasetError, UserError
from train.presets import preset

CASE = base_case("tiny", (2,), "no", (), "off")
MAX_STEPS = 100


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("remote") / "latents"
    write_latents(path, *columns_for(preset("tiny")), 64, 4)
    return path


@pytest.fixture(scope="module")
def arm(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteArm]:
    before = children()
    arm = RemoteArm(CASE, data, tmp_path_factory.mktemp("remote") / "run", MAX_STEPS)
    pid = arm._call(os.getpid)
    yield arm
    assert is_alive(pid)
    arm.close()
    assert not is_alive(pid), "closing waits for the end"
    assert children() == before


def fails_with_oom() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def fails_with_a_dataset_error() -> None:
    raise DatasetError("latents", "no shards", remedy="make some")


def fails_with_an_error_that_does_not_survive_pickling() -> None:
    class CompilerFailedError(Exception):
        def __init__(self, backend: str, inner: Exception) -> None:
            super().__init__(f"{backend}: {inner}")

    raise CompilerFailedError("inductor", ValueError("no such kernel"))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


def children() -> set[int]:
    return {process.pid for process in multiprocessing.active_children() if process.pid}


def test_its_rows_and_facts_are_those_of_an_arm_here(arm, data, tmp_path):
    with closing(open_arm(CASE, data, tmp_path / "run", MAX_STEPS)) as local:
        here = [local.run(2), local.run(3)]
    there = [arm.run(2), arm.run(3)]
    assert [row.keys() for row in there] == [row.keys() for row in here]
    assert [row["step"] for row in there] == [2, 5]
    for row, other in zip(there, here, strict=True):
        assert row["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)
        assert row["perf/images_per_sec"] > 0
    for name in ("case", "device", "attention", "plan", "flops_per_image"):
        assert getattr(arm, name) == getattr(local, name)
    assert arm.matmul_flops_per_sec > 0


@pytest.mark.parametrize(
    ("function", "kind", "text"),
    [
        (fails_with_oom, torch.OutOfMemoryError, "Tried to allocate 2.00 GiB"),
        (fails_with_a_dataset_error, DatasetError, "latents: no shards. Remedy: make some"),
        (
            fails_with_an_error_that_does_not_survive_pickling,
            RuntimeError,
            "CompilerFailedError: inductor: no such kernel",
        ),
    ],
)
def test_an_error_of_the_process_arrives_as_itself_and_the_process_goes_on(
    arm, function, kind, text
):
    with pytest.raises(kind) as raised:
        arm._call(function)
    assert type(raised.value) is kind
    assert text in str(raised.value)
    if kind is torch.OutOfMemoryError:
        assert is_out_of_memory(raised.value)
    assert arm._call(os.getpid) != os.getpid()


def test_a_case_that_cannot_be_built_says_why_and_leaves_no_process(data, tmp_path):
    before = children()
    unknown = replace(CASE, preset="huge")
    with pytest.raises(UserError, match="'huge' is unknown"):
        RemoteArm(unknown, data, tmp_path / "run", MAX_STEPS)
    assert children() == before


def test_a_process_that_is_killed_is_an_error_that_names_the_case(data, tmp_path, capfd):
    before = children()
    arm = RemoteArm(CASE, data, tmp_path / "run", MAX_STEPS)
    pid = arm._call(os.getpid)
    assert arm.run(1)["step"] == 1
    os.kill(pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"process of its own died that ran tiny, latentm"):
            arm.run(1)
    arm.close()
    assert not is_alive(pid)
    assert children() == before
    assert capfd.readouterr().out == "", "as quiet as an arm here"


def test_a_parent_that_is_killed_takes_the_process_along():
    script = (
        "import os, signal\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from benchmarks.train_step.remote_arm import _end_with_parent\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, get_context('spawn'), initializer=_end_with_parent)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    pid, began = int(found.stdout), monotonic()
    while is_alive(pid) and monotonic() - began < 20:
        sleep(0.05)
    assert not is_alive(pid)
