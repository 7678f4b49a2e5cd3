"""The command as a whole in each of its modes: what is read, where it writes, how it is run."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import REPOSITORY
from helpers_train import (
    assert_same_bits,
    assert_same_runs,
    error_line,
    flags,
    metrics_of,
    newest_checkpoint,
    run_torchrun,
    start,
    tensors_of,
    write_unet,
)

from precompute.config import PrecomputeConfig
from precompute.job import precompute
from shards.dataset import Dataset
from train.checkpoint import checkpoints_of
from train.main import main
from train.metrics import read_metrics

Folder = Callable[..., Dataset]


def command(folder: Path, data: object, **changes: Any) -> list[str]:
    """Ten steps of a small U-Net on a batch of 4, on stored latents of 64 px."""
    settings: dict[str, Any] = {
        "unet": write_unet(folder / "unet.json", cross_attention_dim=128),
        "data": data,
        "output_dir": folder / "run",
        "global_batch_size": 4,
        "max_steps": 10,
        "log_every": 2,
        "checkpoint_every": 3,
        "num_samples": 0,
    }
    switches = [f"--{name.replace('_', '-')}" for name, on in changes.items() if on is True]
    settings |= {name: value for name, value in changes.items() if value is not True}
    return ["tiny", *flags(**settings), *switches]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, make_latent_dataset: Folder) -> Path:
    return Path(make_latent_dataset(tmp_path_factory.mktemp("d") / "x", [31, 29, 24], dim=128).path)


def figures(run: Path, name: str) -> list[float]:
    return [row[name] for row in metrics_of(run) if name in row]


# Two processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"follow": True, "validation_every": 5},
        {"sharding": "zero2", "checkpoint_format": "sharded", "validation_every": 5},
    ],
    ids=["follow", "zero2"],
)
def test_two_processes_measure_what_one_does(tmp_path, data, changes):
    alone = {name: value for name, value in changes.items() if name in ("follow",)}
    main(command(tmp_path / "one", data, validation_every=5, **alone))
    run_torchrun(REPOSITORY / "train" / "main.py", *command(tmp_path / "two", data, **changes))
    for name in ("train/loss", "val/loss", "val/loss_t000-099", "val/loss_t900-999"):
        one, two = (figures(tmp_path / folder / "run", name) for folder in ("one", "two"))
        assert len(one) == (5 if name == "train/loss" else 2)
        assert two == [pytest.approx(figure, rel=2e-3) for figure in one]
    if "follow" in changes:
        records = [tmp_path / folder / "run" / "epochs.jsonl" for folder in ("one", "two")]
        assert records[0].read_text() == records[1].read_text()


# Where a run is kept ------------------------------------------------------------------------------


def test_a_run_on_an_object_store_is_the_run_on_a_disk(tmp_path, data):
    """Checkpoints, metrics and the export; stopped half way and continued there as well."""
    url = f"memory://{tmp_path.name}/run"
    settings = {"lr_schedule": "constant", "warmup_steps": 0, "validation_every": 5}
    main(command(tmp_path / "local", data, **settings))
    remote = [*command(tmp_path / "remote", data, **settings), "--output-dir", url]
    main([*remote, "--max-steps", "5"])
    main(remote)
    fetched = tmp_path / "fetched"
    fsspec.filesystem("memory").get(f"/{tmp_path.name}/run", str(fetched), recursive=True)
    assert_same_bits(
        tensors_of(newest_checkpoint(fetched)),
        tensors_of(newest_checkpoint(tmp_path / "local" / "run")),
    )
    rows = [row for row in metrics_of(fetched) if row["step"] > 6]  # a run's end closes a row
    assert rows == [row for row in metrics_of(tmp_path / "local" / "run") if row["step"] > 6]
    assert (fetched / "unet" / "config.json").exists()
    assert [found.step for found in checkpoints_of(fetched)] == [9, 10]


# Signals ------------------------------------------------------------------------------------------


def test_the_signal_of_a_batch_system_writes_a_checkpoint_and_ends_with_status_0(tmp_path, data):
    process = start("train/main.py", *command(tmp_path, data, max_steps=5000))
    assert process.stdout is not None
    while not process.stdout.readline().startswith("step "):
        assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    stopped = newest_checkpoint(tmp_path / "run")
    assert f"stopped at step {int(stopped.name)}; the same command continues" in out


# Following stage 1 --------------------------------------------------------------------------------


def test_who_comes_before_the_first_shard_waits_for_it(tmp_path, data):
    place = tmp_path / "latents"
    process = start("train/main.py", *command(tmp_path, place, follow=True, max_steps=3))
    assert process.stdout is not None
    assert process.stdout.readline() == f"waiting for the first shard of {place}\n"
    shutil.copytree(data, tmp_path / "copy").rename(place)  # there at once, as stage 1's shards are
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert "step 03/3" in out or "step 3/3" in out
    (line,) = (tmp_path / "run" / "epochs.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["added"]) == ["00000", "00001", "00002"]


def test_a_followed_run_that_was_stopped_ends_as_if_it_never_was(tmp_path, data):
    constant = {"follow": True, "lr_schedule": "constant", "warmup_steps": 0}
    main(command(tmp_path / "whole", data, **constant))
    main(command(tmp_path / "parts", data, **constant, max_steps=4))
    main(command(tmp_path / "parts", data, **constant))
    whole, parts = (tmp_path / name / "run" for name in ("whole", "parts"))
    assert_same_bits(tensors_of(newest_checkpoint(whole)), tensors_of(newest_checkpoint(parts)))
    assert (whole / "epochs.jsonl").read_text() == (parts / "epochs.jsonl").read_text()


def test_a_wait_for_data_ends_with_a_signal_and_a_checkpoint(tmp_path, make_latent_dataset):
    """A dataset that is smaller than a batch: the run would wait for ever."""
    small = make_latent_dataset(tmp_path / "small", [3], dim=128).path
    process = start("train/main.py", *command(tmp_path, small, follow=True))
    assert process.stdout is not None
    while "waiting for 4, a global batch" not in (line := process.stdout.readline()):
        assert process.poll() is None, line
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert not (tmp_path / "run" / "epochs.jsonl").exists()


# Columns beside the plain ones --------------------------------------------------------------------


@pytest.fixture(scope="module")
def flipped(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, image_shards: Path
) -> Path:
    out = tmp_path_factory.mktemp("flipped") / "latents"
    settings: dict[str, Any] = {"model": str(model_folder), "resolutions": "64", "device": "cpu"}
    settings |= {"shards": str(image_shards / "*.tar"), "out": str(out), "text": "ids"}
    for flip in (False, True):
        precompute(PrecomputeConfig(**settings, flip=flip))
    return out


def test_mirrored_latents_are_trained_on_and_the_text_encoder_runs_along(tmp_path, flipped):
    """Flips, token ids and held-out samples at once; stopped half way."""
    settings = {"flip_prob": 0.5, "validation_every": 5, "lr_schedule": "constant"}
    plain = command(tmp_path / "plain", flipped, **(settings | {"flip_prob": 0.0}))
    main(plain)
    main(command(tmp_path / "whole", flipped, **settings))
    main(command(tmp_path / "parts", flipped, **settings, max_steps=5))
    main(command(tmp_path / "parts", flipped, **settings))
    runs = {name: tmp_path / name / "run" for name in ("plain", "whole", "parts")}
    assert len(figures(runs["whole"], "val/loss")) == 2
    assert figures(runs["plain"], "train/loss") != figures(runs["whole"], "train/loss")
    assert_same_bits(*(tensors_of(newest_checkpoint(runs[name])) for name in ("whole", "parts")))


def test_flips_without_a_mirrored_column_are_refused_with_the_remedy(tmp_path, data, capsys):
    line = error_line(capsys, lambda: main(command(tmp_path, data, flip_prob=0.5)))
    assert "--flip" in line


# Online -------------------------------------------------------------------------------------------


def test_online_training_is_resumable_and_has_its_grid(tmp_path, model_folder, image_shards):
    settings = {
        "online": image_shards / "*.tar",
        "model": model_folder,
        "random_crop": True,
        "flip_prob": 0.5,
        "lr_schedule": "constant",
        "num_samples": 2,
        "sample_steps": 2,
    }
    whole = command(tmp_path / "whole", "nowhere", **settings)
    main(whole)
    main([*command(tmp_path / "parts", "nowhere", **settings), "--max-steps", "4"])
    main(command(tmp_path / "parts", "nowhere", **settings))
    assert_same_runs(tmp_path / "whole" / "run", tmp_path / "parts" / "run")
    assert (tmp_path / "whole" / "run" / "samples.png").exists()


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["tiny", "--online", "x/*.tar"], "--model"),
        (["--online", "x/*.tar"], "one of tiny"),
        (["tiny", "--online", "x/*.tar", "--model", "examples/tiny-model"], "x/*.tar"),
    ],
)
def test_online_without_what_it_takes_is_refused_in_one_line(argv, found, capsys, tmp_path):
    line = error_line(capsys, lambda: main([*argv, "--output-dir", str(tmp_path / "run")]))
    assert found in line


# Seeing it learn ----------------------------------------------------------------------------------


def test_grids_validation_and_tensorboard_stand_in_the_run_folder(tmp_path, latent_dataset, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv = command(
        tmp_path,
        latent_dataset,
        num_samples=2,
        sample_every=5,
        sample_steps=2,
        validation_every=5,
        ema_start_step=6,
        trackers="tensorboard",
    )
    main(argv)
    names = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert names == ["000005.png", "000010-ema.png", "000010.png"]
    assert (tmp_path / "run" / "samples.png").exists()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "val/loss" in row] == [5, 10]
    assert [row["step"] for row in rows if "val/ema_loss" in row] == [10]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "latentmill"))
    events.Reload()
    logged = [event.step for event in events.Scalars("train/loss")]
    assert logged == [row["step"] for row in rows if "train/loss" in row]
    assert [event.step for event in events.Images("samples/raw")] == [5, 10]
    assert "val/loss" in capsys.readouterr().out


def test_a_moment_of_training_is_not_lost_to_a_crash(tmp_path, data, monkeypatch):
    """The checkpoint that is being written when training fails still gets written."""
    from train import checkpoint_writer
    from train.trainer import Trainer

    write = checkpoint_writer._write

    def slow_write(*arguments: Any) -> None:
        time.sleep(0.5)
        write(*arguments)

    def fail(self: Trainer) -> None:
        if self.step == 4:
            raise RuntimeError("device lost")

    monkeypatch.setattr(checkpoint_writer, "_write", slow_write)
    monkeypatch.setattr(Trainer, "_observe", fail)
    with pytest.raises(RuntimeError, match="device lost"):
        main(command(tmp_path, data))
    assert [found.step for found in checkpoints_of(tmp_path / "run")] == [3]
