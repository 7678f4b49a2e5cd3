import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from helpers_checkpoint import (
    PARTS,
    assert_holds,
    odd_snapshot,
    save,
    save_pieces,
    snapshot_of,
    split,
    steps_of,
)
from helpers_s3 import S3, running_s3
from helpers_train import (
    assert_same_bits,
    bitwise_equal,
    contents_of,
    interrupted_at,
    newest_checkpoint,
    run_on_memory,
    small_config,
    tensors_of,
    write_unet,
)
from safetensors.torch import load_file

from shards import storage
from shards.errors import StorageError, UserError
from shards.retry import RetryPolicy
from shards.storage import Location, location
from train.checkpoint import (
    STATE,
    WEIGHTS,
    Checkpoint,
    Snapshot,
    checkpoints_of,
    export_unet,
    find_unet,
    local_unet,
    optimizer_tensors,
    restore_optimizer,
    save_scheduler,
    save_unet,
)
from train.tensor_file import write_tensors
from train.trainer import Trainer

BUCKET = "checkpoints"
NAMES = {
    *(f"{part}/{name}" for part in ("unet", "unet_ema") for name in ("config.json", WEIGHTS)),
    *("scheduler/scheduler_config.json", "optimizer.safetensors", STATE),
}


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with running_s3(BUCKET) as running:
        yield running


@pytest.fixture(params=["local", "memory", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "local":
        return tmp_path / "run"
    if request.param == "s3":
        request.getfixturevalue("server")
    bucket = BUCKET if request.param == "s3" else "run"
    return location(f"{request.param}://{bucket}/{tmp_path.name}")


# Whole tensors ------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_to_the_bit(run):
    snapshot = odd_snapshot()
    assert_holds(save(run, snapshot), snapshot)


def test_the_layout_is_what_diffusers_and_people_expect(tmp_path):
    checkpoint = save(tmp_path, snapshot_of(300))
    assert checkpoint.path == tmp_path / "checkpoints" / "000300"
    assert contents_of(checkpoint.path).keys() == NAMES
    stated = json.loads((checkpoint.path / STATE).read_text())["files"]
    assert stated.keys() == NAMES - {STATE}


def test_without_an_average_there_is_no_folder_for_it(tmp_path):
    checkpoint = save(tmp_path, snapshot_of(average=None))
    assert contents_of(checkpoint.path).keys() == {n for n in NAMES if "unet_ema" not in n}
    with pytest.raises(UserError, match=r"not a whole checkpoint \(no unet_ema/.*delete this"):
        checkpoint.tensors("unet_ema")


def test_the_same_run_makes_the_same_bytes(tmp_path):
    first, second = (save(tmp_path / name, odd_snapshot()) for name in "ab")
    assert contents_of(first.path) == contents_of(second.path)


def test_a_file_of_tensors_is_one_that_the_library_reads_and_anyone_may(tmp_path):
    tensors = {
        "wide": torch.arange(6.0, dtype=torch.float64).reshape(2, 3).T,
        "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
        "count": torch.tensor(7),
        "none": torch.empty(0, 3),
    }
    mask = os.umask(0o022)
    write_tensors(tmp_path / "file", tensors, {"format": "pt"})
    os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].nan_to_num(), tensor.nan_to_num()), name
        assert (8 + found[name].data_ptr()) % tensor.itemsize == 0
    with safetensors.safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_state_that_is_no_json_is_refused_when_it_is_written(tmp_path):
    for value in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            save(tmp_path, snapshot_of(state={"loss": value}))
    assert checkpoints_of(tmp_path) == []


# Copies -------------------------------------------------------------------------------------------


def test_a_copy_does_not_change_when_training_goes_on():
    snapshot = odd_snapshot()
    snapshot.state["sums"] = {"loss": 1.0}
    copy, as_it_was = snapshot.to_host(), odd_snapshot()
    for tensors in snapshot.parts.values():
        for tensor in tensors.values():
            tensor.add_(1)
    snapshot.state["sums"]["loss"] = 2.0
    assert copy.state == {"config": {"seed": 100}, "sums": {"loss": 1.0}}
    for part, tensors in as_it_was.parts.items():
        assert_same_bits(copy.parts[part], tensors)
        assert [t.stride() for t in copy.parts[part].values()] == [
            t.stride() for t in tensors.values()
        ]


def test_a_copy_of_a_run_without_an_average_has_none():
    assert snapshot_of(average=None).to_host().average is None


def test_the_length_of_a_snapshot_is_that_of_its_tensors():
    assert snapshot_of().num_bytes == 3 * 3 * 4
    assert snapshot_of(average=None).num_bytes == 2 * 3 * 4


# Damage -------------------------------------------------------------------------------------------


def flip_a_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + b"\0",
    "a bit flipped": flip_a_bit,
    "garbage": lambda data: b"x" * 500,
}


def read_all(checkpoint: Checkpoint) -> None:
    checkpoint.read_state()
    for part in PARTS:
        checkpoint.tensors(part)


@pytest.mark.parametrize("damage", [*DAMAGES, "missing", "a folder"])
@pytest.mark.parametrize("name", sorted(NAMES))
def test_damage_anywhere_is_found_and_named(tmp_path, name, damage):
    checkpoint = save(tmp_path, odd_snapshot())
    path = checkpoint.path / name
    data = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(DAMAGES[damage](data))
    is_read_on_resuming = not name.endswith("config.json")
    for read in (Checkpoint.verify, read_all)[: 1 + is_read_on_resuming]:
        with pytest.raises(UserError) as refusal:
            read(Checkpoint(checkpoint.path))
        message = str(refusal.value)
        assert message.startswith(f"{checkpoint.path}: not a whole checkpoint (")
        assert name in message
        assert message.endswith("continues from the checkpoint before it")
        assert "\n" not in message
        assert not isinstance(refusal.value, StorageError)


def test_damage_says_what_was_found_and_what_was_wanted(tmp_path):
    checkpoint = save(tmp_path, snapshot_of())
    path = checkpoint.path / "optimizer.safetensors"
    length = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=f"{length - 4} bytes .*; wanted {length} bytes"):
        checkpoint.tensors("optimizer")


@pytest.mark.parametrize("text", ["{}", "[]", "3", "null", '{"step": 14}', '{"files": {}}', "\xff"])
def test_a_state_of_something_else_is_refused(tmp_path, text):
    checkpoint = save(tmp_path, snapshot_of())
    (checkpoint.path / STATE).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"not a whole checkpoint \(state.json .*delete this"):
        checkpoint.read_state()


def test_a_state_edited_by_hand_is_refused(tmp_path):
    checkpoint = save(tmp_path, snapshot_of())
    path = checkpoint.path / STATE
    path.write_text(path.read_text().replace('"seed": 100', '"seed": 101'))
    with pytest.raises(UserError, match=r"state.json does not match its own hash"):
        checkpoint.read_state()


def test_a_transfer_that_was_damaged_is_tried_again(tmp_path, monkeypatch):
    run = location(f"memory://run/{tmp_path.name}")
    snapshot = odd_snapshot()
    checkpoint = save(run, snapshot)
    whole, broken = run.fs.get_file, []

    def damaged(path: str, to: str, **options: object) -> None:
        whole(path, to, **options)
        if path not in broken:
            broken.append(path)
            Path(to).write_bytes(flip_a_bit(Path(to).read_bytes()))

    monkeypatch.setattr(run.fs, "get_file", damaged)
    assert_holds(checkpoint, snapshot)
    assert len(broken) == len(NAMES) - 1


def test_a_storage_that_is_down_is_no_reason_to_delete_a_checkpoint(server, monkeypatch, tmp_path):
    monkeypatch.setattr("shards.storage.REMOTE", RetryPolicy(attempts=2, first_delay_sec=0.0))
    monkeypatch.setitem(
        storage._S3_OPTIONS, "config_kwargs", {"retries": {"total_max_attempts": 1}}
    )
    run = location(f"s3://{BUCKET}/{tmp_path.name}")
    checkpoint = save(run, snapshot_of())
    for part in ("state.json", "optimizer.safetensors"):
        server.faults.plan("500", times=99, where=lambda method, path, part=part: part in path)
        with pytest.raises(StorageError, match="endpoint") as refusal:
            checkpoint.tensors("optimizer")
        assert "delete this folder" not in str(refusal.value)
        server.faults.clear()
    assert checkpoint.tensors("optimizer").keys() == {"weight.exp_avg"}


# Pieces -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counters_in_all", [True, False])
@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
def test_the_pieces_of_any_number_of_processes_make_up_the_whole(
    tmp_path, num_processes, counters_in_all
):
    whole = odd_snapshot()
    pieces = split(whole, num_processes, counters_in_all=counters_in_all)
    assert num_processes < 3 or any(0 in t.shape for t in pieces[-1].weights.values())
    checkpoint = save_pieces(tmp_path, pieces)
    assert checkpoint.is_sharded
    assert_holds(checkpoint, whole)
    assert_holds(Checkpoint(checkpoint.path), whole)


def test_pieces_make_up_the_whole_behind_a_url(run):
    whole = odd_snapshot()
    assert_holds(save_pieces(run, split(whole, 2)), whole)
    (found,) = checkpoints_of(run)
    assert_holds(found, whole)


def test_what_is_put_together_may_be_changed_without_changing_the_checkpoint(tmp_path):
    whole = odd_snapshot()
    checkpoint = save_pieces(tmp_path, split(whole, 2))
    for part in PARTS:
        for tensor in checkpoint.tensors(part).values():
            tensor.zero_()
    assert_holds(checkpoint, whole)


def test_a_sharded_checkpoint_has_one_file_of_tensors_from_each_process(tmp_path):
    checkpoint = save_pieces(tmp_path, split(odd_snapshot(), 2))
    found = {name for name in contents_of(checkpoint.path) if name.endswith(".safetensors")}
    assert found == {f"pieces-0000{n}-of-00002.safetensors" for n in (0, 1)}
    stated = json.loads((checkpoint.path / STATE).read_text())["files"]
    assert found < stated.keys()


@pytest.mark.parametrize("damage", [*DAMAGES, "missing"])
@pytest.mark.parametrize("process", [0, 1])
def test_a_damaged_piece_is_found_and_named(tmp_path, process, damage):
    checkpoint = save_pieces(tmp_path, split(odd_snapshot(), 2))
    name = f"pieces-0000{process}-of-00002.safetensors"
    data = (checkpoint.path / name).read_bytes()
    (checkpoint.path / name).unlink()
    if damage != "missing":
        (checkpoint.path / name).write_bytes(DAMAGES[damage](data))
    for part in PARTS:
        with pytest.raises(UserError, match=rf"not a whole checkpoint \(.*{name}.*delete this"):
            Checkpoint(checkpoint.path).tensors(part)


def test_pieces_between_which_rows_are_missing_are_refused(tmp_path):
    first, second, third = split(odd_snapshot(), 3)
    for left_out in ("conv.weight", "conv.bias"):
        weights = {n: t for n, t in second.weights.items() if n != left_out}
        without = Snapshot(**{**vars(second), "weights": weights})
        checkpoint = save_pieces(tmp_path / left_out, [first, without, third])
        with pytest.raises(UserError, match=rf"{left_out}: no row [23]\); wanted [47] rows"):
            checkpoint.tensors("unet")
        checkpoint.tensors("unet_ema")


def test_pieces_without_an_average_have_none(tmp_path):
    whole = Snapshot(**{**vars(odd_snapshot()), "average": None})
    pieces = [Snapshot(**{**vars(piece), "average": None}) for piece in split(whole, 2)]
    checkpoint = save_pieces(tmp_path, pieces)
    assert_same_bits(
        checkpoint.tensors("unet"), {n: t.contiguous() for n, t in whole.weights.items()}
    )
    with pytest.raises(UserError, match="no unet_ema"):
        checkpoint.tensors("unet_ema")


@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_optimizer_that_has_not_stepped_has_no_tensors(tmp_path, num_processes):
    whole = Snapshot(**{**vars(odd_snapshot()), "optimizer": {}})
    checkpoint = save_pieces(tmp_path, split(whole, num_processes))
    assert checkpoint.tensors("optimizer") == {}
    assert_holds(save(tmp_path / "full", whole), whole)


def test_whole_tensors_of_several_processes_are_refused():
    with pytest.raises(AssertionError):
        snapshot_of(num_processes=2)


# Which are there ----------------------------------------------------------------------------------


def test_checkpoints_are_in_the_order_of_their_steps_beyond_a_million(run):
    for step in (999_999, 1_000_000, 1_000_001):
        save(run, snapshot_of(step))
    assert steps_of(checkpoints_of(run)) == [1_000_000, 1_000_001]


def test_other_folders_beside_the_checkpoints_are_none_and_stay(tmp_path):
    strangers = ("000150-good", "notes", "000900.bak", "notes.partial", "٣")
    for name in strangers:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "000700").write_text("a file")
    for step in (100, 200, 300):
        save(tmp_path, snapshot_of(step))
    assert steps_of(checkpoints_of(tmp_path)) == [200, 300]
    assert all((tmp_path / "checkpoints" / name).exists() for name in strangers)


def test_a_run_without_a_folder_has_no_checkpoints(run):
    assert checkpoints_of(run) == []


def test_a_checkpoint_that_was_moved_and_linked_still_counts(tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.move(save(tmp_path, snapshot_of(100)).path, moved)
    (tmp_path / "checkpoints" / "000100").symlink_to(moved)
    save(tmp_path, snapshot_of(200))
    assert steps_of(checkpoints_of(tmp_path)) == [100, 200]
    for step in (300, 400):
        save(tmp_path, snapshot_of(step))
    assert steps_of(checkpoints_of(tmp_path)) == [300, 400]
    assert contents_of(moved).keys() == NAMES, "what lies elsewhere is not ours to delete"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_behind_a_url_what_has_no_state_does_not_count(tmp_path):
    run = location(f"memory://run/{tmp_path.name}")
    save(run, snapshot_of(100))
    checkpoint = save(run, snapshot_of(200))
    checkpoint.path.fs.rm_file((checkpoint.path / STATE).path)
    assert steps_of(checkpoints_of(run)) == [100]


# A U-Net for others -------------------------------------------------------------------------------


def unet_snapshot(folder: Path, step: int = 100) -> Snapshot:
    """Of a real U-Net."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step)
        unet = UNet2DConditionModel.from_config(json.loads(Path(write_unet(folder)).read_text()))
    unet.to(memory_format=torch.channels_last)
    weights = {name: p.detach() for name, p in unet.named_parameters()}
    return snapshot_of(
        step,
        unet_config=dict(unet.config),
        weights=weights,
        average={name: weight * 0.5 for name, weight in weights.items()},
        optimizer={},
    )


@pytest.mark.parametrize("num_processes", [1, 3])
@pytest.mark.parametrize(("kind", "part"), [("raw", "unet"), ("ema", "unet_ema")])
@pytest.mark.parametrize("run", ["local", "memory"], indirect=True)
def test_a_unet_is_found_and_loaded_from_wherever_it_lies(run, tmp_path, num_processes, kind, part):
    snapshot = unet_snapshot(tmp_path / "unet.json")
    if num_processes == 1:
        save(run, snapshot)
    else:
        save_pieces(run, split(snapshot, num_processes))
    for place in (run, checkpoints_of(run)[-1].path):
        folder = find_unet(place, kind)
        assert folder == checkpoints_of(run)[-1].path / part
        with local_unet(folder) as copy:
            assert (copy == folder) == (num_processes == 1 and isinstance(run, Path))
            loaded = UNet2DConditionModel.from_pretrained(copy)
        assert_unet_holds(loaded, snapshot.parts[part])
        assert copy.exists() == (copy == folder)


def test_an_export_behind_a_url_is_found_and_loaded(tmp_path):
    run = location(f"memory://run/{tmp_path.name}")
    snapshot = unet_snapshot(tmp_path / "unet.json")
    save_unet(run / "unet", snapshot.unet_config, snapshot.weights)
    with local_unet(find_unet(run)) as copy:
        assert_unet_holds(UNet2DConditionModel.from_pretrained(copy), snapshot.weights)


def test_a_sharded_checkpoint_is_exported_for_diffusers(tmp_path):
    snapshot = unet_snapshot(tmp_path / "unet.json")
    checkpoint = save_pieces(tmp_path, split(snapshot, 2))
    export_unet(checkpoint, tmp_path / "export", "unet_ema")
    assert snapshot.average is not None
    assert_unet_holds(UNet2DConditionModel.from_pretrained(tmp_path / "export"), snapshot.average)


def test_a_damaged_sharded_checkpoint_is_not_exported(tmp_path):
    checkpoint = save_pieces(tmp_path, split(unet_snapshot(tmp_path / "unet.json"), 2))
    path = checkpoint.path / "pieces-00001-of-00002.safetensors"
    path.write_bytes(flip_a_bit(path.read_bytes()))
    with (
        pytest.raises(UserError, match="pieces-00001-of-00002"),
        local_unet(find_unet(tmp_path, "raw")),
    ):
        pass


@pytest.mark.parametrize("kind", ["auto", "ema", "raw"])
def test_a_unet_that_is_not_there_is_an_error_with_the_remedy(run, kind):
    with pytest.raises(UserError, match=r"no .*U-Net; wanted .* --output-dir <run>"):
        find_unet(run, kind)


def test_a_schedule_is_one_that_diffusers_loads(tmp_path):
    save_scheduler(tmp_path, {"_class_name": "DDPMScheduler", "beta_start": 0.25})
    assert DDPMScheduler.from_pretrained(tmp_path).config.beta_start == 0.25


def test_two_who_export_at_once_leave_one_whole_unet(tmp_path):
    snapshot = unet_snapshot(tmp_path / "unet.json")
    threads = [
        threading.Thread(
            target=save_unet, args=(tmp_path / "unet", snapshot.unet_config, snapshot.weights)
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {path.name for path in (tmp_path / "unet").iterdir()} == {"config.json", WEIGHTS}
    assert_unet_holds(UNet2DConditionModel.from_pretrained(tmp_path / "unet"), snapshot.weights)


# The optimizer ------------------------------------------------------------------------------------


def channels_last_weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 4, 3, 3, generator=generator)
    return [weight.to(memory_format=torch.channels_last), torch.randn(4, generator=generator)]


def update(tensors: list[torch.Tensor], optimizer: torch.optim.Optimizer, turn: int) -> None:
    for tensor in tensors:
        tensor.grad = torch.full_like(tensor, 0.1 * turn)
    optimizer.step()


def test_an_optimizer_comes_back_to_the_bit_in_the_layout_of_its_parameters(tmp_path):
    first, second = channels_last_weights(), channels_last_weights()
    names = ["weight", "bias"]
    optimizers = [torch.optim.AdamW(tensors, lr=0.1, fused=True) for tensors in (first, second)]
    for turn in (1, 2):
        update(first, optimizers[0], turn)
    tensors = optimizer_tensors(optimizers[0], names)
    checkpoint = save(
        tmp_path, snapshot_of(weights=dict(zip(names, first, strict=True)), optimizer=tensors)
    )
    for tensor, name in zip(second, names, strict=True):
        tensor.copy_(checkpoint.tensors("unet")[name])
    restore_optimizer(optimizers[1], names, checkpoint.tensors("optimizer"))
    shutil.rmtree(checkpoint.path)
    assert_same_bits(optimizer_tensors(optimizers[1], names), tensors)
    for moment in ("exp_avg", "exp_avg_sq"):
        assert optimizers[1].state[second[0]][moment].stride() == second[0].stride()
    update(first, optimizers[0], 3)
    update(second, optimizers[1], 3)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_an_optimizer_that_has_not_stepped_comes_back_as_such():
    weights = channels_last_weights()
    optimizer = torch.optim.AdamW(weights, lr=0.1, fused=True)
    assert optimizer_tensors(optimizer, ["weight", "bias"]) == {}
    restore_optimizer(optimizer, ["weight", "bias"], {})
    update(weights, optimizer, 1)
    assert optimizer.state[weights[0]]["step"] == 1


# What a run leaves for others ---------------------------------------------------------------------


def assert_unet_holds(unet: UNet2DConditionModel, weights: dict[str, torch.Tensor]) -> None:
    loaded = unet.state_dict()
    assert loaded.keys() == weights.keys()
    for name, weight in weights.items():
        assert bitwise_equal(loaded[name].contiguous(), weight.detach().contiguous()), name


@pytest.fixture(scope="module")
def averaged_run(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = tmp_path_factory.mktemp("averaged")
    config = small_config(folder, max_steps=4, ema_decay=0.5, prediction_type="v_prediction")
    return run_on_memory(config)


def test_the_export_is_a_diffusers_unet_with_the_averaged_weights(averaged_run):
    unet = UNet2DConditionModel.from_pretrained(averaged_run.run_dir, subfolder="unet")
    assert averaged_run.model.average is not None
    assert_unet_holds(unet, averaged_run.model.average.weights)
    assert unet.config.sample_size == 8
    raw = averaged_run.model.unet.state_dict()
    assert not torch.equal(unet.state_dict()["conv_in.weight"], raw["conv_in.weight"])


def test_without_an_average_the_raw_weights_are_exported(tmp_path):
    trainer = run_on_memory(small_config(tmp_path, max_steps=2))
    unet = UNet2DConditionModel.from_pretrained(trainer.run_dir, subfolder="unet")
    assert_unet_holds(unet, trainer.model.unet.state_dict())


@pytest.mark.parametrize("part", ["unet", "unet_ema"])
def test_a_checkpoint_is_a_diffusers_unet_too(averaged_run, part):
    checkpoint = newest_checkpoint(averaged_run.run_dir)
    unet = UNet2DConditionModel.from_pretrained(checkpoint, subfolder=part)
    assert averaged_run.model.average is not None
    raw, average = averaged_run.model.unet.state_dict(), averaged_run.model.average.weights
    assert_unet_holds(unet, raw if part == "unet" else average)


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


def test_all_weights_are_float32_and_no_file_is_a_pickle(averaged_run):
    checkpoint = newest_checkpoint(averaged_run.run_dir)
    assert {tensor.dtype for tensor in tensors_of(checkpoint).values()} == {torch.float32}
    suffixes = {Path(name).suffix for name in contents_of(averaged_run.run_dir)}
    assert suffixes == {".json", ".jsonl", ".safetensors"}
