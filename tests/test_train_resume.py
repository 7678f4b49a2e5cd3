import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_train import (
    Killed,
    assert_same_bits,
    assert_same_runs,
    contents_of,
    error_line,
    flags,
    interrupted_at,
    metrics_of,
    newest_checkpoint,
    run_on_memory,
    small_config,
    start,
    tensors_of,
    write_unet,
)

from shards.dataset import Dataset
from shards.errors import UserError
from train.checkpoint import checkpoints_of
from train.config import TrainConfig
from train.main import main
from train.trainer import Trainer

MakeDataset = Callable[..., Dataset]


def eventful_config(folder: Path, **changes: Any) -> TrainConfig:
    """A run in which warm-up, cosine, average, log and checkpoint all fall on different steps."""
    settings: dict[str, Any] = {
        "max_steps": 14,
        "warmup_steps": 3,
        "lr_schedule": "cosine",
        "ema_decay": 0.5,
        "ema_start_step": 6,
        "log_every": 4,
        "checkpoint_every": 5,
        "caption_drop_prob": 0.3,
    }
    return small_config(folder, **(settings | changes))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `eventful_config` without any interruption."""
    folder = tmp_path_factory.mktemp("unbroken")
    run_on_memory(eventful_config(folder))
    return folder / "run"


@pytest.mark.parametrize(
    ("step", "by"),
    [*((step, signal.SIGTERM) for step in (0, 3, 4, 7, 13)), (6, signal.SIGINT)],
)
def test_a_run_that_was_asked_to_stop_ends_as_if_it_never_was(tmp_path, unbroken, step, by, capsys):
    config = eventful_config(tmp_path)
    trainer = run_on_memory(config, before_batch=interrupted_at(step, by))
    assert trainer.step == step + 1, "the step in progress is finished, no other is begun"
    assert newest_checkpoint(trainer.run_dir).name == f"{step + 1:06d}"
    if step < 13:
        assert f"stopped at step {step + 1}; the same command continues" in capsys.readouterr().out
        assert run_on_memory(config).step == 14
        assert f"continuing {trainer.run_dir} at step {step + 1}" in capsys.readouterr().out
    assert_same_runs(trainer.run_dir, unbroken)


@pytest.mark.parametrize("step", [2, 5, 8, 9, 12])
def test_a_killed_run_ends_as_if_it_never_was(tmp_path, unbroken, step):
    config = eventful_config(tmp_path)
    with pytest.raises(Killed):
        run_on_memory(config, before_batch=interrupted_at(step, Killed))
    run_on_memory(config)
    assert_same_runs(tmp_path / "run", unbroken)


def test_many_interruptions_in_a_row_leave_no_trace(tmp_path, unbroken):
    config = eventful_config(tmp_path)
    stops, kills = (1, 4, 6, 11), (3, 9, 8, 13)
    for stop, kill in zip(stops, kills, strict=True):
        run_on_memory(config, before_batch=interrupted_at(stop))
        with pytest.raises(Killed):
            run_on_memory(config, before_batch=interrupted_at(kill, Killed))
    run_on_memory(config)
    assert_same_runs(tmp_path / "run", unbroken)


def test_the_free_settings_may_change_in_mid_run(tmp_path, unbroken):
    run_on_memory(eventful_config(tmp_path), before_batch=interrupted_at(7, signal.SIGTERM))
    changes = {"keep_checkpoints": 1, "checkpoint_every": 3, "num_samples": 0, "attention": "sdpa"}
    run_on_memory(eventful_config(tmp_path, **changes))
    assert_same_runs(tmp_path / "run", unbroken)


def test_the_unet_may_move_to_another_path_in_mid_run(tmp_path, unbroken):
    run_on_memory(eventful_config(tmp_path), before_batch=interrupted_at(7, signal.SIGTERM))
    run_on_memory(eventful_config(tmp_path, unet=write_unet(tmp_path / "moved" / "config.json")))
    assert_same_runs(tmp_path / "run", unbroken)


def test_signals_reach_their_former_handlers_after_the_run(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run_on_memory(small_config(tmp_path, max_steps=1))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_sigterm_does_not_spoil_the_checkpoint_of_the_first(tmp_path, monkeypatch):
    """Schedulers repeat themselves; whatever a handler from before the run does, it must wait."""
    came_through: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came_through.append(number))
    save = Trainer.save

    def save_under_fire(trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(trainer)

    monkeypatch.setattr(Trainer, "save", save_under_fire)
    try:
        run_on_memory(small_config(tmp_path), before_batch=interrupted_at(2))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not came_through
    assert newest_checkpoint(tmp_path / "run").name == "000003"


def test_a_second_ctrl_c_interrupts(tmp_path):
    def press_twice(step: int) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_on_memory(small_config(tmp_path), before_batch=press_twice)


# The end of a run ---------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, capsys):
    config = eventful_config(tmp_path)
    run_on_memory(config)
    before = contents_of(tmp_path / "run")
    capsys.readouterr()
    run_on_memory(config)
    assert f"{tmp_path / 'run'} is at step 14 of 14 already" in capsys.readouterr().out
    assert contents_of(tmp_path / "run") == before


def test_a_constant_run_can_be_made_longer(tmp_path):
    def config(name: str, max_steps: int) -> TrainConfig:
        return small_config(tmp_path / name, max_steps=max_steps, warmup_steps=2, ema_decay=0.9)

    run_on_memory(config("short", 4))
    exported = tmp_path / "short" / "run" / "unet" / "diffusion_pytorch_model.safetensors"
    at_four = exported.read_bytes()
    run_on_memory(config("short", 9))
    run_on_memory(config("long", 9))
    assert_same_runs(tmp_path / "short" / "run", tmp_path / "long" / "run")
    assert exported.read_bytes() != at_four


@pytest.mark.parametrize(("keep", "kept"), [(1, [14]), (2, [12, 14]), (9, [3, 6, 9, 12, 14])])
def test_only_the_newest_checkpoints_are_kept(tmp_path, keep, kept):
    config = eventful_config(tmp_path, checkpoint_every=3, keep_checkpoints=keep)
    run_on_memory(config)
    assert [found.step for found in checkpoints_of(tmp_path / "run")] == kept
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == len(kept)


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 2e-3}, "learning_rate 0.001 -> 0.002"),
        ({"seed": 1}, "seed 0 -> 1"),
        ({"max_steps": 20}, "max_steps 14 -> 20"),
        ({"prediction_type": "v_prediction"}, "prediction_type epsilon -> v_prediction"),
        ({"ema_decay": 0.9, "warmup_steps": 0}, "warmup_steps 3 -> 0; ema_decay 0.5 -> 0.9"),
        ({"adam_betas": (0.9, 0.99)}, "adam_betas"),
        ({"caption_drop_prob": 0.0}, "caption_drop_prob 0.3 -> 0.0"),
    ],
)
def test_changed_settings_are_refused_by_name(tmp_path, unbroken, changes, named):
    shutil.copytree(unbroken, tmp_path / "run")
    before = contents_of(tmp_path / "run")
    with pytest.raises(UserError, match="belongs to another run") as refusal:
        run_on_memory(eventful_config(tmp_path, **changes))
    message = str(refusal.value)
    assert set(named.split("; ")) <= set(re.split(r"; |: ", message)) or named in message
    assert str(newest_checkpoint(tmp_path / "run")) in message
    assert "another --output-dir" in message
    assert contents_of(tmp_path / "run") == before


@pytest.mark.parametrize(
    "changes", [{"block_out_channels": [32, 32]}, {"norm_eps": 1e-3}, {"act_fn": "mish"}]
)
def test_another_unet_under_the_same_name_is_refused(tmp_path, unbroken, changes):
    shutil.copytree(unbroken, tmp_path / "run")
    config = eventful_config(tmp_path)
    write_unet(Path(config.unet), **changes)
    (name,) = changes
    with pytest.raises(UserError, match=f"belongs to another run: .*{name}"):
        run_on_memory(config)


def test_another_dataset_is_refused(tmp_path, unbroken):
    shutil.copytree(unbroken, tmp_path / "run")
    with pytest.raises(UserError, match="the dataset has other columns or shards"):
        run_on_memory(eventful_config(tmp_path), num_samples=63)


# The command, killed from outside -----------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, make_latent_dataset: MakeDataset) -> Path:
    folder = tmp_path_factory.mktemp("dataset") / "latents"
    return make_latent_dataset(folder, [13, 0, 21, 9], dim=32, num_tokens=5, dropped=1).path


def command(folder: Path, data: Path, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {
        "unet": write_unet(folder / "unet.json"),
        "data": data,
        "output_dir": folder / "run",
        "max_steps": 72,
        "global_batch_size": 8,
        "ema_decay": 0.5,
        "ema_start_step": 20,
        "log_every": 4,
        "checkpoint_every": 7,
        "num_samples": 0,
    }
    return ["tiny", *flags(**(settings | changes))]


def stop_by(
    number: signal.Signals, argv: list[str], launcher: tuple[object, ...] = ()
) -> tuple[int, str, str]:
    """Run the command and send it a signal a moment after its second log line.

    Returns:
        exit status, output and errors, once the last process that can write them has ended.
    """
    process = start(*launcher, "train/main.py", *argv)
    assert process.stdout is not None
    assert process.stderr is not None
    out, delay = "", random.uniform(0, 0.1)
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    while out.count("\nstep ") < 2 and (line := process.stdout.readline()):
        out += line
    time.sleep(delay)
    process.send_signal(number)
    out += process.stdout.read()
    err = process.stderr.read()
    process.wait()
    watchdog.cancel()
    print(f"{number.name} {delay:.3f} s after:\n{out}")
    return process.returncode, out, err


def test_the_command_survives_kill_9_and_sigterm_to_the_bit(tmp_path, dataset):
    """Killed, stopped, stopped again by way of its launcher, and ended: as if never interrupted."""
    argv = command(tmp_path, dataset)
    status, _, err = stop_by(signal.SIGKILL, argv)
    assert status == -signal.SIGKILL, err
    status, out, err = stop_by(signal.SIGTERM, argv)
    assert status == 0, err
    assert "the same command continues" in out
    accelerate = Path(sys.executable).with_name("accelerate")
    _, out, err = stop_by(signal.SIGTERM, argv, launcher=(accelerate, "launch"))
    assert "the same command continues" in out, err
    main(argv)
    unbroken = command(tmp_path / "unbroken", dataset)
    main(unbroken)
    assert sum("train/loss" in row for row in metrics_of(tmp_path / "run")) == 18
    assert sum("val/loss" in row for row in metrics_of(tmp_path / "run")) == 1
    assert_same_runs(tmp_path / "run", tmp_path / "unbroken" / "run")


@pytest.mark.parametrize(
    "part",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "unet_ema/diffusion_pytorch_model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "garbage"])
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, unbroken, part, damage):
    shutil.copytree(unbroken, tmp_path / "run")
    newest = newest_checkpoint(tmp_path / "run")
    whole = (newest / part).read_bytes()
    if damage == "missing":
        (newest / part).unlink()
    else:
        cut = whole[: len(whole) // 2]
        (newest / part).write_bytes({"empty": b"", "cut short": cut, "garbage": b"x" * 500}[damage])
    before = contents_of(tmp_path / "run")
    with pytest.raises(UserError, match=r"not a whole checkpoint .*delete this folder") as refusal:
        run_on_memory(eventful_config(tmp_path))
    assert str(newest) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert contents_of(tmp_path / "run") == before


def test_a_checkpoint_without_its_average_is_refused(tmp_path, unbroken):
    shutil.copytree(unbroken, tmp_path / "run")
    shutil.rmtree(newest_checkpoint(tmp_path / "run") / "unet_ema")
    with pytest.raises(UserError, match="not a whole checkpoint"):
        run_on_memory(eventful_config(tmp_path))


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"step": 14}'])
def test_a_checkpoint_with_another_state_is_refused(tmp_path, unbroken, text):
    shutil.copytree(unbroken, tmp_path / "run")
    (newest_checkpoint(tmp_path / "run") / "state.json").write_text(text)
    with pytest.raises(UserError, match="not a whole checkpoint"):
        run_on_memory(eventful_config(tmp_path))


def test_the_remedy_for_a_damaged_checkpoint_works(tmp_path, dataset, capsys):
    argv = command(tmp_path, dataset, max_steps=14)
    main(argv)
    whole = tensors_of(newest_checkpoint(tmp_path / "run"))
    metrics = metrics_of(tmp_path / "run")
    newest = newest_checkpoint(tmp_path / "run")
    (newest / "optimizer.safetensors").write_bytes(b"")
    line = error_line(capsys, lambda: main(argv))
    assert line.startswith(f"train: error: {newest}: not a whole checkpoint")
    shutil.rmtree(newest)
    main(argv)
    assert_same_bits(tensors_of(newest), whole)
    assert metrics_of(tmp_path / "run") == metrics


def test_a_dataset_may_move_in_mid_run(tmp_path, dataset):
    stay, move = command(tmp_path / "stay", dataset), command(tmp_path / "move", dataset)
    main([*stay, "--max-steps", "6", "--lr-schedule", "constant"])
    main([*move, "--max-steps", "4", "--lr-schedule", "constant"])
    moved = shutil.copytree(dataset, tmp_path / "elsewhere")
    main([*move, "--max-steps", "6", "--lr-schedule", "constant", "--data", str(moved)])
    ours, theirs = (newest_checkpoint(tmp_path / name / "run") for name in ("move", "stay"))
    assert ours.name == theirs.name == "000006"
    assert_same_bits(tensors_of(ours), tensors_of(theirs))
