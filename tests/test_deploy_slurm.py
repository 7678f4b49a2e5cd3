"""The batch scripts under a stand-in for srun and scontrol, with Slurm's variables."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import REPOSITORY
from helpers_deploy import free_port
from helpers_train import flags, metrics_of, write_unet

from shards.dataset import Dataset
from shards.verify import iter_problems
from train.checkpoint import checkpoints_of

SCRIPTS = REPOSITORY / "deploy" / "slurm"

# Starts SLURM_NTASKS processes, hands signals on to them, and ends with the worst status.
SRUN = """#!{python}
import os, signal, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
tasks = []
def forward(number, frame):
    for task in tasks:
        task.send_signal(number)
signal.signal(signal.SIGUSR1, forward)
signal.signal(signal.SIGTERM, forward)
for number in range(int(os.environ["SLURM_NTASKS"])):
    variables = {{**os.environ, "SLURM_PROCID": str(number), "SLURM_LOCALID": "0"}}
    tasks.append(subprocess.Popen(command, env=variables))
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
  "show hostnames") printf '127.0.0.1\\nlocalhost\\n' ;;
  requeue*) echo "$2" >> "$REQUEUED" ;;
  *) exit 9 ;;
esac
"""
# In the place of the interpreter: shows what it got, then does what the test wants.
STUB = """#!/bin/bash
echo "task $*"
env | grep -E '^((LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_ADDR|MASTER_PORT|NCCL|FI_)' | sort
{body}
"""
WAITS = "trap 'echo checkpoint; exit 0' USR1 TERM; echo ready; while :; do sleep 0.05; done"


@dataclass
class Slurm:
    """A cluster of one machine."""

    folder: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def script(self, name: str, *args: str, **variables: str) -> subprocess.Popen[str]:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("NCCL")},
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "REQUEUED": str(self.folder / "requeued"),
            "SLURM_SUBMIT_DIR": str(REPOSITORY),
            "SLURM_JOB_ID": "41",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NTASKS": "1",
            "SLURM_NTASKS_PER_NODE": "1",
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
        }
        process = subprocess.Popen(
            ["bash", SCRIPTS / name, *args],
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def remove_all(self) -> None:
        """Also what a test that failed has left."""
        for process in self.started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def stub(self, body: str) -> str:
        path = self.folder / "python-stub"
        path.write_text(STUB.format(body=body))
        path.chmod(0o755)
        return str(path)

    @property
    def requeued(self) -> list[str]:
        path = self.folder / "requeued"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = Slurm(tmp_path)
    yield slurm
    slurm.remove_all()


ARRAY = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "1"}


@pytest.mark.parametrize("name", ["precompute.sbatch", "train.sbatch"])
def test_shellcheck_has_nothing_to_say(name: str) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [shellcheck, "--shell=bash", "--enable=all", "--exclude=SC2250,SC2312", SCRIPTS / name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("name", "variables", "wanted"),
    [
        ("precompute.sbatch", ARRAY | {"SLURM_ARRAY_TASK_ID": "1"}, "no arguments"),
        ("train.sbatch", {}, "no arguments"),
    ],
)
def test_a_script_without_arguments_says_what_it_wants(
    slurm: Slurm, name: str, variables: dict[str, str], wanted: str
) -> None:
    process = slurm.script(name, **variables)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 2
    assert wanted in out


def test_a_job_that_is_no_array_is_refused(slurm: Slurm) -> None:
    process = slurm.script("precompute.sbatch", "--out", "x")
    assert "sbatch --array=0-15" in process.communicate(timeout=30)[0]
    assert process.returncode != 0


def test_an_array_with_gaps_is_refused(slurm: Slurm) -> None:
    array = {"ID": "5", "MIN": "1", "COUNT": "3", "STEP": "1"}  # --array=1,5,9
    variables = {f"SLURM_ARRAY_TASK_{name}": value for name, value in array.items()}
    process = slurm.script("precompute.sbatch", "--out", "x", SLURM_ARRAY_JOB_ID="7", **variables)
    assert "task 5 of an array with gaps" in process.communicate(timeout=30)[0]
    assert process.returncode == 2


def test_an_interpreter_that_is_not_there_is_named(slurm: Slurm) -> None:
    process = slurm.script("train.sbatch", "tiny", PYTHON="/nowhere/python")
    assert "/nowhere/python: no interpreter there" in process.communicate(timeout=30)[0]
    assert process.returncode == 2


# Stage 1 ------------------------------------------------------------------------------------------


def test_two_tasks_of_an_array_encode_the_whole_dataset(
    slurm: Slurm, image_shards: Path, model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "latents"
    settings = flags(shards=image_shards / "*.tar", out=out, model=model_folder, resolutions=32)
    tasks = [
        slurm.script("precompute.sbatch", *settings, **ARRAY, SLURM_ARRAY_TASK_ID=task)
        for task in ("1", "2")
    ]
    for task in tasks:
        shown, _ = task.communicate(timeout=120)
        assert task.returncode == 0, shown
    assert len(Dataset(out).image_column(32).shards) == 3
    assert not list(iter_problems(out, full=True))
    assert slurm.requeued == []


def test_a_task_near_its_time_limit_ends_and_is_queued_again(slurm: Slurm) -> None:
    variables = ARRAY | {"SLURM_ARRAY_TASK_ID": "2", "PYTHON": slurm.stub(WAITS)}
    process = slurm.script("precompute.sbatch", "--out", "x", **variables)
    shown = until(process, "ready")
    assert "task -m precompute --out x --shard-range 1/2" in shown
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert slurm.requeued == ["40_2"]


def test_a_task_that_fails_says_so_and_is_not_queued_again(slurm: Slurm) -> None:
    variables = ARRAY | {"SLURM_ARRAY_TASK_ID": "1", "PYTHON": slurm.stub("exit 2")}
    process = slurm.script("precompute.sbatch", "--out", "x", **variables)
    process.communicate(timeout=30)
    assert process.returncode == 2
    assert slurm.requeued == []


# Stage 2 ------------------------------------------------------------------------------------------

TWO_NODES = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}


def test_two_nodes_train_one_run(slurm: Slurm, latent_dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = flags(
        data=latent_dataset,
        output_dir=run,
        unet=write_unet(tmp_path / "unet.json", cross_attention_dim=128),
        resolution=32,
        max_steps=4,
        global_batch_size=8,
        log_every=2,
        num_samples=0,
        validation_samples=0,
    )
    port = str(free_port())
    process = slurm.script(
        "train.sbatch", "tiny", *settings, **TWO_NODES, MASTER_PORT=port, ACCELERATE_USE_CPU="1"
    )
    shown, _ = process.communicate(timeout=200)
    assert process.returncode == 0, shown
    assert "x 2 processes" in shown
    assert [checkpoint.step for checkpoint in checkpoints_of(run)] == [4]
    assert metrics_of(run)[-1]["step"] == 4
    assert slurm.requeued == []


def test_each_process_knows_its_place(slurm: Slurm) -> None:
    stub = slurm.stub("")
    process = slurm.script("train.sbatch", "tiny", "--x", "a b", **TWO_NODES, PYTHON=stub)
    shown, _ = process.communicate(timeout=30)
    assert process.returncode == 0, shown
    lines = shown.splitlines()
    assert lines.count(f"task {REPOSITORY}/train/main.py tiny --x a b") == 2
    assert sorted(line for line in lines if line.startswith("RANK")) == ["RANK=0", "RANK=1"]
    for line in ("WORLD_SIZE=2", "LOCAL_WORLD_SIZE=1", "LOCAL_RANK=0", "MASTER_ADDR=127.0.0.1"):
        assert lines.count(line) == 2
    assert lines.count("MASTER_PORT=20041") == 2


def test_near_the_time_limit_a_checkpoint_is_written_and_the_job_queued_again(
    slurm: Slurm,
) -> None:
    process = slurm.script("train.sbatch", "tiny", **TWO_NODES, PYTHON=slurm.stub(WAITS))
    until(process, "ready", times=2)
    process.send_signal(signal.SIGUSR1)
    shown, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert shown.count("checkpoint\n") == 2
    assert slurm.requeued == ["41"]


def test_a_stop_that_fails_is_a_failure_like_any_other(slurm: Slurm) -> None:
    stub = slurm.stub(WAITS.replace("exit 0", "exit 5"))
    process = slurm.script("train.sbatch", "tiny", PYTHON=stub, MAX_RESTARTS="0")
    until(process, "ready")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 5
    assert slurm.requeued == []


@pytest.mark.parametrize(
    ("status", "restarts", "is_queued"),
    [("1", "0", True), ("137", "2", True), ("1", "3", False), ("2", "0", False)],
)
def test_a_crash_is_tried_again_so_often_and_a_mistake_never(
    slurm: Slurm, status: str, restarts: str, is_queued: bool
) -> None:
    process = slurm.script(
        "train.sbatch", "tiny", PYTHON=slurm.stub(f"exit {status}"), SLURM_RESTART_COUNT=restarts
    )
    process.communicate(timeout=30)
    assert slurm.requeued == (["41"] if is_queued else [])
    assert process.returncode == (0 if is_queued else int(status))


@pytest.mark.parametrize(
    ("network", "wanted", "unwanted"),
    [
        ("auto", [], ["FI_PROVIDER", "NCCL_NET=", "NCCL_SOCKET_IFNAME"]),
        ("efa", ["FI_PROVIDER=efa", "NCCL_SOCKET_IFNAME=^lo,docker,veth"], ["NCCL_NET="]),
        ("infiniband", ["NCCL_NET=IB"], ["FI_PROVIDER"]),
        ("ethernet", ["NCCL_NET=Socket"], ["FI_PROVIDER"]),
    ],
)
def test_nccl_is_told_of_the_network(
    slurm: Slurm, network: str, wanted: list[str], unwanted: list[str]
) -> None:
    process = slurm.script("train.sbatch", "tiny", PYTHON=slurm.stub(""), NETWORK=network)
    shown, _ = process.communicate(timeout=30)
    assert "NCCL_DEBUG=WARN" in shown
    assert all(line in shown for line in wanted)
    assert not any(line in shown for line in unwanted)


def test_a_variable_that_is_set_already_stays(slurm: Slurm) -> None:
    process = slurm.script(
        "train.sbatch", "tiny", PYTHON=slurm.stub(""), NETWORK="efa", NCCL_SOCKET_IFNAME="eth0"
    )
    assert "NCCL_SOCKET_IFNAME=eth0" in process.communicate(timeout=30)[0]


def test_a_network_of_no_known_kind_is_refused(slurm: Slurm) -> None:
    process = slurm.script("train.sbatch", "tiny", PYTHON=slurm.stub(""), NETWORK="token-ring")
    assert "wanted auto, efa, infiniband or ethernet" in process.communicate(timeout=30)[0]
    assert process.returncode == 2


def until(process: subprocess.Popen[str], word: str, times: int = 1) -> str:
    """What it says until it has said this word so often."""
    assert process.stdout is not None
    shown, deadline = "", time.monotonic() + 30
    while shown.count(word) < times:
        assert time.monotonic() < deadline
        line = process.stdout.readline()
        assert line, shown
        shown += line
    return shown
