"""Runs that are killed, starved of disk, cut off from their storage or left by their launcher."""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from conftest import REPOSITORY
from diffusers import UNet2DConditionModel
from fsspec.implementations.memory import MemoryFileSystem
from helpers_train import (
    Killed,
    MemoryBatches,
    assert_same_runs,
    contents_of,
    flags,
    metrics_of,
    newest_checkpoint,
    run_on_memory,
    run_torchrun,
    small_config,
    start,
    write_unet,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from shards.dataset import Dataset
from shards.errors import UserError
from shards.retry import RetryPolicy
from train import main as command_line
from train.checkpoint import checkpoints_of
from train.checkpoint_writer import CheckpointWriter
from train.main import main
from train.metrics import read_metrics
from train.trainer import Trainer, build_accelerator, train


def command(folder: Path, data: object, **changes: Any) -> list[str]:
    """A few steps of a small U-Net on a batch of 8."""
    settings: dict[str, Any] = {
        "unet": write_unet(folder / "unet.json", cross_attention_dim=128),
        "data": data,
        "output_dir": folder / "run",
        "global_batch_size": 8,
        "max_steps": 9,
        "log_every": 2,
        "checkpoint_every": 3,
        "num_samples": 0,
    }
    return ["tiny", *flags(**(settings | changes))]


@pytest.fixture(scope="module")
def data(
    tmp_path_factory: pytest.TempPathFactory, make_latent_dataset: Callable[..., Dataset]
) -> Path:
    folder = tmp_path_factory.mktemp("hardship") / "latents"
    return Path(make_latent_dataset(folder, [31, 29, 40], dim=128).path)


# Killed -------------------------------------------------------------------------------------------


def test_another_process_continues_a_killed_run_to_the_byte(tmp_path, data):
    """Everything that keeps a state of its own at once; nothing depends on Python's hash seed."""
    settings = {
        "mixed_precision": "fp16",
        "max_steps": 6,
        "micro_batch_size": 4,
        "timestep_sampling": "sobol",
        "offset_noise": 0.1,
        "ema_start_step": 2,
        "ema_every": 3,
        "validation_samples": 2,
        "validation_every": 4,
    }
    whole = command(tmp_path / "unbroken", data, **settings)
    unbroken = start("train/main.py", *whole, PYTHONHASHSEED="2")
    argv = command(tmp_path, data, **settings)
    process = start("-u", "train/main.py", *argv, PYTHONHASHSEED="1")
    assert process.stdout is not None
    while not process.stdout.readline().startswith("step 4"):
        assert process.poll() is None
    process.kill()
    process.communicate()
    main(argv)
    _, err = unbroken.communicate(timeout=90)
    assert unbroken.returncode == 0, err
    one, other = tmp_path / "run", tmp_path / "unbroken" / "run"
    assert_same_runs(one, other)
    assert contents_of(newest_checkpoint(one)) == contents_of(newest_checkpoint(other))


# A full disk --------------------------------------------------------------------------------------


@pytest.fixture
def limit_files() -> Iterator[Callable[[int], None]]:
    """`limit_files(bytes)`: no file may grow beyond; what is written there is cut short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(num_bytes: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
def test_a_full_disk_costs_no_step_and_no_row(tmp_path, limit_files, capsys):
    """Neither checkpoint, nor row, nor TensorBoard can be written for a while; then all can."""
    config = small_config(
        tmp_path, max_steps=12, checkpoint_every=2, trackers="tensorboard", learning_rate=1e-4
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    seen: dict[str, Any] = {}

    def before_batch(step: int) -> None:
        if step == 4:
            seen["rows"] = metrics.read_text()
            limit_files(len(seen["rows"]) + 50)  # a row is longer: it is cut
        if step == 9:
            seen["torn"] = metrics.read_text()
            limit_files(resource.RLIM_INFINITY)

    train(config, MemoryBatches(before_batch=before_batch))
    assert len(seen["torn"]) == len(seen["rows"]) + 50
    run_on_memory(small_config(tmp_path / "good", max_steps=12, learning_rate=1e-4))
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "good" / "run")
    assert [found.step for found in checkpoints_of(tmp_path / "run")] == [10, 12]
    said = capsys.readouterr().out
    assert said.count("warning: ") == said.count("File too large") >= 3
    for what in ("checkpoint 6 is not written", "metrics.jsonl", "tensorboard is told no more"):
        assert what in said


@pytest.mark.usefixtures("capsys")  # in memory: the limit is that of pytest's own files as well
def test_a_row_that_was_cut_short_does_not_hinder_the_run_that_goes_on(tmp_path, limit_files):
    """Killed while the disk is full: what stands in metrics.jsonl is still a run's."""

    def before_batch(step: int) -> None:
        if step == 4:
            limit_files((tmp_path / "run" / "metrics.jsonl").stat().st_size + 50)
        if step == 6:
            raise Killed

    settings = {"max_steps": 8, "checkpoint_every": 3, "learning_rate": 1e-4}
    with pytest.raises(Killed):
        train(small_config(tmp_path, **settings), MemoryBatches(before_batch=before_batch))
    limit_files(resource.RLIM_INFINITY)
    run_on_memory(small_config(tmp_path, **settings))
    run_on_memory(small_config(tmp_path / "good", **settings))
    assert_same_runs(tmp_path / "run", tmp_path / "good" / "run")


def test_a_grid_that_cannot_be_written_costs_the_picture_alone(
    tmp_path, latent_dataset, capsys, monkeypatch
):
    argv = command(tmp_path, latent_dataset, num_samples=2, sample_steps=1, max_steps=4)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").write_text("in the way")
    main([*argv, "--sample-every", "2"])
    said = capsys.readouterr().out
    for name in ("000002.png", "000004.png"):
        assert f"warning: {tmp_path}/run/samples/{name}: cannot be written" in said
    assert (tmp_path / "run" / "samples.png").exists()
    assert newest_checkpoint(tmp_path / "run").name == "000004"


# Storage that is down -----------------------------------------------------------------------------


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bool]]:
    """Of `memory://`: `store["down"] = True` refuses every file."""
    state = {"down": False}
    put = MemoryFileSystem.put_file

    def put_file(self: Any, *arguments: Any, **options: Any) -> Any:
        if state["down"]:
            raise ConnectionError("nobody answers")
        return put(self, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    for module in ("shards.storage", "shards.retry"):
        monkeypatch.setattr(f"{module}.REMOTE", RetryPolicy(attempts=1))
    yield state
    fsspec.filesystem("memory").store.clear()


def test_a_store_that_is_down_for_a_while_costs_no_step_and_no_row(tmp_path, store, capsys):
    url = f"memory://{tmp_path.name}/run"

    def before_batch(step: int) -> None:
        store["down"] = 4 <= step < 9

    settings = {"max_steps": 12, "checkpoint_every": 2, "checkpoint_in_background": False}
    config = small_config(tmp_path, **settings, output_dir=url)
    train(config, MemoryBatches(before_batch=before_batch))
    run_on_memory(small_config(tmp_path, **settings))
    fsspec.filesystem("memory").get(f"/{tmp_path.name}/run", str(tmp_path / "got"), recursive=True)
    assert_same_runs(tmp_path / "got", tmp_path / "run")
    said = capsys.readouterr().out
    assert f"warning: {url}/metrics.jsonl" in said.replace("memory:///", "memory://")
    assert "nobody answers" in said


def test_rows_are_in_the_store_before_the_checkpoint_that_they_lead_to_counts(
    tmp_path, store, monkeypatch
):
    url = f"memory://{tmp_path.name}/run"
    save = CheckpointWriter.save

    def save_and_die(self: CheckpointWriter, snapshot: Any) -> None:
        save(self, snapshot)
        store["down"] = True  # as for a process that is no more
        raise Killed

    settings = {"max_steps": 6, "checkpoint_every": 3, "checkpoint_in_background": False}
    config = small_config(tmp_path, **settings, output_dir=url)
    monkeypatch.setattr(CheckpointWriter, "save", save_and_die)
    with pytest.raises(Killed):
        run_on_memory(config)
    monkeypatch.setattr(CheckpointWriter, "save", save)
    store["down"] = False
    run_on_memory(config)
    fsspec.filesystem("memory").get(f"/{tmp_path.name}/run", str(tmp_path / "got"), recursive=True)
    assert [row["step"] for row in read_metrics(tmp_path / "got" / "metrics.jsonl")] == [
        *range(1, 7)
    ]


# Weights to start from ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> UNet2DConditionModel:
    folder = tmp_path_factory.mktemp("unet")
    run_on_memory(small_config(folder, max_steps=1))
    return UNet2DConditionModel.from_pretrained(folder / "run" / "unet")


def start_from(folder: Path, source: object) -> dict[str, Tensor]:
    config = small_config(folder, init_from=str(source), seed=7)
    return Trainer(config, MemoryBatches(), build_accelerator(config)).model.weights.tensors


@pytest.mark.parametrize("place", ["folder", "url"])
def test_weights_that_are_there_as_fp16_alone_are_taken(tmp_path, unet, place):
    half = deepcopy(unet).half()
    half.save_pretrained(tmp_path / "model" / "unet", variant="fp16")
    source: object = tmp_path / "model"
    if place == "url":
        source = f"memory://{tmp_path.name}/model"
        fsspec.filesystem("memory").put(str(tmp_path / "model"), str(source), recursive=True)
    for name, weight in start_from(tmp_path, source).items():
        assert torch.equal(weight, half.state_dict()[name].float()), name


def test_weights_that_a_file_lacks_are_not_drawn_at_random(tmp_path, unet):
    unet.save_pretrained(tmp_path / "model" / "unet")
    path = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["mid_block.resnets.0.conv1.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights .* mid_block.resnets.0.conv1.weight"):
        start_from(tmp_path, tmp_path / "model")


def test_a_pickle_is_not_opened(tmp_path, unet):
    unet.save_pretrained(tmp_path / "model" / "unet", safe_serialization=False)
    with pytest.raises(UserError, match=r"no U-Net weights .*safetensors"):
        start_from(tmp_path, tmp_path / "model")


def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(UserError, match="nothing: no such folder"):
        start_from(tmp_path, tmp_path / "nothing")


# Launchers and signals ----------------------------------------------------------------------------


def processes_with(word: str) -> list[int]:
    """Processes that have a word on their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if word.encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def test_a_process_that_waits_for_stage_1_ends_with_a_launcher_that_is_killed(tmp_path):
    place = str(tmp_path / "nowhere")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1")
    argv = ("train/main.py", *command(tmp_path, place), "--follow")
    process = start(*launcher, *argv, PYTHONUNBUFFERED="1")
    try:
        assert process.stdout is not None
        assert "waiting for the first shard" in process.stdout.readline()
        process.kill()
        process.wait()
        deadline = time.monotonic() + 60
        while left := processes_with(place):
            assert time.monotonic() < deadline, f"{len(left)} still wait"
            time.sleep(0.1)
    finally:
        for number in processes_with(place):
            os.kill(number, signal.SIGKILL)


def signalled_early(argv: list[str]) -> None:
    """A signal reaches the second process alone, before it has begun to train."""
    open_latents = command_line.open_latents

    def open_and_be_told(*arguments: Any) -> Any:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return open_latents(*arguments)

    command_line.open_latents = open_and_be_told
    main(argv)


def test_a_signal_to_one_process_before_the_first_step_ends_all(tmp_path, data):
    out = run_torchrun(Path(__file__), *command(tmp_path, data))
    assert "step" not in out
    assert not (tmp_path / "run" / "checkpoints").exists()


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    signalled_early(sys.argv[1:])
