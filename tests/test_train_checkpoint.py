import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from helpers_train import (
    Killed,
    assert_same_bits,
    bitwise_equal,
    contents_of,
    interrupted_at,
    newest_checkpoint,
    run_on_memory,
    small_config,
    tensors_of,
)
from safetensors.torch import load_file

from train.checkpoint import (
    WEIGHTS,
    checkpoints_of,
    load_weights,
    optimizer_tensors,
    read_state,
    restore_optimizer,
    save_checkpoint,
)
from train.trainer import Trainer


def write_checkpoint(run: Path, step: int, keep: int = 2) -> Path:
    """A checkpoint whose every number is its step."""
    number = torch.full((3,), float(step))
    return save_checkpoint(
        run,
        step=step,
        state={"config": {}, "batches": "", "interval": {}},
        prediction_type="epsilon",
        unet_config={"step": step},
        weights={"weight": number},
        average={"weight": number},
        optimizer={"weight.exp_avg": number},
        keep=keep,
    )


def assert_whole(checkpoint: Path) -> None:
    step = int(checkpoint.name)
    assert read_state(checkpoint)["step"] == step
    for part in ("unet", "unet_ema", "optimizer"):
        (tensor,) = load_weights(checkpoint, part).values()
        assert tensor.tolist() == [step] * 3


class FileOperations:
    """Counts the process's file operations through Python's audit events; may die at one."""

    NAMES = frozenset({"open", "os.mkdir", "os.remove", "os.rmdir", "os.rename", "shutil.rmtree"})

    def __init__(self) -> None:
        self.folder, self.count, self.die_at = "", 0, -1
        sys.addaudithook(self._hear)  # for good; an empty folder hears nothing

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folder or event not in self.NAMES:
            return
        if not str(arguments[0]).startswith(self.folder) and event not in ("os.remove", "os.rmdir"):
            return
        self.count += 1
        if self.count == self.die_at:
            raise Killed


@pytest.fixture(scope="module")
def file_operations() -> FileOperations:
    return FileOperations()


@pytest.fixture
def watched(file_operations: FileOperations, tmp_path: Path) -> Iterator[FileOperations]:
    yield file_operations
    file_operations.folder, file_operations.die_at = "", -1


def test_a_kill_at_any_file_operation_leaves_whole_checkpoints_only(tmp_path, watched, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # guards against power cuts, slowly

    def save_the_third(run: Path, die_at: int = -1) -> int:
        for step in (100, 200):
            write_checkpoint(run, step)
        watched.folder, watched.count, watched.die_at = str(run), 0, die_at
        try:
            write_checkpoint(run, 300)
        finally:
            watched.folder = ""
        return watched.count

    num_operations = save_the_third(tmp_path / "whole")
    assert num_operations > 20, "writing and removing were both heard"
    seen = set()
    for die_at in range(1, num_operations + 1):
        run = tmp_path / str(die_at)
        with pytest.raises(Killed):
            save_the_third(run, die_at)
        found = checkpoints_of(run)
        for checkpoint in found:
            assert_whole(checkpoint)
        seen.add(tuple(int(checkpoint.name) for checkpoint in found))
        write_checkpoint(run, 400)
        assert [path.name for path in (run / "checkpoints").iterdir()] != []
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert names == [f"{int(found[-1].name):06d}", "000400"], "nothing is left behind"
    assert seen == {(100, 200), (100, 200, 300), (200, 300)}


def test_checkpoints_are_in_the_order_of_their_steps_beyond_a_million(tmp_path):
    for step in (999_999, 1_000_000, 1_000_001):
        write_checkpoint(tmp_path, step)
    assert [int(path.name) for path in checkpoints_of(tmp_path)] == [1_000_000, 1_000_001]


def test_other_folders_beside_the_checkpoints_are_none_and_stay(tmp_path):
    strangers = ("000150-good", "notes", "000900.bak")
    for name in strangers:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for step in (100, 200, 300):
        write_checkpoint(tmp_path, step)
    assert [path.name for path in checkpoints_of(tmp_path)] == ["000200", "000300"]
    assert all((tmp_path / "checkpoints" / name).exists() for name in strangers)


def test_a_run_without_a_folder_has_no_checkpoints(tmp_path):
    assert checkpoints_of(tmp_path / "nowhere") == []


def test_an_optimizer_comes_back_to_the_bit_in_the_layout_of_its_parameters():
    def layer() -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return torch.nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)

    def update(module: torch.nn.Module, optimizer: torch.optim.Optimizer, turn: int) -> None:
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 * turn)
        optimizer.step()

    first, second = layer(), layer()
    names = [name for name, _ in first.named_parameters()]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, fused=True) for m in (first, second)]
    for turn in (1, 2):
        update(first, optimizers[0], turn)
    second.load_state_dict(first.state_dict())
    tensors = optimizer_tensors(optimizers[0], names)
    restore_optimizer(optimizers[1], names, tensors)
    assert_same_bits(optimizer_tensors(optimizers[1], names), tensors)
    weight = next(second.parameters())
    for moment in ("exp_avg", "exp_avg_sq"):
        assert optimizers[1].state[weight][moment].stride() == weight.stride()
    update(first, optimizers[0], 3)
    update(second, optimizers[1], 3)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


# What a run leaves for others ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def averaged_run(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = tmp_path_factory.mktemp("averaged")
    config = small_config(folder, max_steps=4, ema_decay=0.5, prediction_type="v_prediction")
    return run_on_memory(config)


def assert_holds(unet: UNet2DConditionModel, weights: dict[str, torch.Tensor]) -> None:
    loaded = unet.state_dict()
    assert loaded.keys() == weights.keys()
    for name, weight in weights.items():
        assert bitwise_equal(loaded[name].contiguous(), weight.detach().contiguous()), name


def test_the_export_is_a_diffusers_unet_with_the_averaged_weights(averaged_run):
    unet = UNet2DConditionModel.from_pretrained(averaged_run.run_dir, subfolder="unet")
    assert averaged_run.average is not None
    assert_holds(unet, averaged_run.average.weights)
    assert unet.config.sample_size == 8
    raw = averaged_run.unet.state_dict()
    assert not torch.equal(unet.state_dict()["conv_in.weight"], raw["conv_in.weight"])


def test_without_an_average_the_raw_weights_are_exported(tmp_path):
    trainer = run_on_memory(small_config(tmp_path, max_steps=2))
    unet = UNet2DConditionModel.from_pretrained(trainer.run_dir, subfolder="unet")
    assert_holds(unet, trainer.unet.state_dict())


@pytest.mark.parametrize("part", ["unet", "unet_ema"])
def test_a_checkpoint_is_a_diffusers_unet_too(averaged_run, part):
    checkpoint = newest_checkpoint(averaged_run.run_dir)
    unet = UNet2DConditionModel.from_pretrained(checkpoint, subfolder=part)
    assert averaged_run.average is not None
    raw, average = averaged_run.unet.state_dict(), averaged_run.average.weights
    assert_holds(unet, raw if part == "unet" else average)


def test_the_schedule_of_training_lies_beside_every_unet(averaged_run):
    for folder in (averaged_run.run_dir, newest_checkpoint(averaged_run.run_dir)):
        scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        assert scheduler.config.prediction_type == "v_prediction"
        assert scheduler.config.beta_schedule == "scaled_linear"
        assert scheduler.config.num_train_timesteps == 1000


def test_nothing_is_exported_before_the_last_step(tmp_path):
    config = small_config(tmp_path, checkpoint_every=2)
    trainer = run_on_memory(config, before_batch=interrupted_at(3))
    assert trainer.step == 4
    assert not (trainer.run_dir / "unet").exists()


def test_a_killed_export_leaves_no_half_weights_under_their_name(tmp_path, watched, averaged_run):
    """The export of a run that was made longer replaces the one before, or does not."""
    config = small_config(tmp_path, max_steps=2)
    trainer = run_on_memory(config)
    exported = trainer.run_dir / "unet" / WEIGHTS
    before = {name: tensor.clone() for name, tensor in load_file(exported).items()}
    longer = Trainer(small_config(tmp_path, max_steps=3), trainer.batches, trainer.accelerator)
    longer.run(3)
    watched.folder, watched.count, watched.die_at = str(trainer.run_dir / "unet"), 0, 1
    with pytest.raises(Killed):
        longer.finish()
    watched.folder = ""
    assert_same_bits(dict(load_file(exported)), before)
    longer.finish()
    assert_holds(
        UNet2DConditionModel.from_pretrained(trainer.run_dir, subfolder="unet"),
        longer.unet.state_dict(),
    )


def test_all_weights_are_float32_and_no_file_is_a_pickle(averaged_run):
    checkpoint = newest_checkpoint(averaged_run.run_dir)
    assert {tensor.dtype for tensor in tensors_of(checkpoint).values()} == {torch.float32}
    suffixes = {Path(name).suffix for name in contents_of(averaged_run.run_dir)}
    assert suffixes == {".json", ".jsonl", ".safetensors"}
