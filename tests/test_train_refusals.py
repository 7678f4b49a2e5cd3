"""What train/main.py refuses: one line on stderr, status 2, and nothing written."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_train import MemoryBatches, error_line, flags, small_config, start, write_unet

from shards.dataset import Dataset
from shards.errors import UserError
from shards.lock import sole_writer
from train.main import main, parse
from train.presets import PRESETS
from train.trainer import Trainer

MakeDataset = Callable[..., Dataset]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, make_latent_dataset: MakeDataset) -> Path:
    folder = tmp_path_factory.mktemp("data") / "latents"
    return make_latent_dataset(folder, [24], dim=32, num_tokens=5).path


def argv_for(folder: Path, data: Path, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {
        "unet": write_unet(folder / "unet.json"),
        "data": data,
        "output_dir": folder / "run",
        "global_batch_size": 8,
        "max_steps": 2,
        "num_samples": 0,
    }
    return ["tiny", *flags(**(settings | changes))]


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, data: Path, **changes: Any) -> str:
    """The error line of a run that must leave no checkpoint, metrics or export."""
    line = error_line(capsys, lambda: main(argv_for(folder, data, **changes)))
    assert line.startswith("train: error: ")
    assert not [path for path in (folder / "run").rglob("*") if path.is_file()]
    return line


def test_a_dataset_that_is_not_there(tmp_path, capsys):
    missing = tmp_path / "nowhere"
    line = refusal(capsys, tmp_path, missing)
    assert f"{missing}: no latent dataset" in line
    assert "make precompute SHARDS=" in line
    assert f"OUT={missing}" in line


def test_the_bare_command_without_a_dataset_says_how_to_get_one(tmp_path):
    script = Path(sys.modules["train.main"].__file__ or "").resolve()
    process = start(script, cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    (line,) = err.splitlines()
    assert line.startswith("train: error: data/latents: no latent dataset")
    assert "make precompute SHARDS=" in line
    assert not out
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_that_is_no_manifest(tmp_path, data, capsys):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "dataset.json").write_text('{"format_version": 1}')
    assert "not a manifest" in refusal(capsys, tmp_path, folder)


@pytest.mark.parametrize(
    ("unet", "found", "wanted"),
    [
        ({"cross_attention_dim": 48}, "text states of width 32", "48, the U-Net's cross_attention"),
        ({"in_channels": 16}, "latents of 4 channels", "16, the U-Net's in_channels"),
    ],
)
def test_a_dataset_that_was_encoded_for_another_unet(tmp_path, data, capsys, unet, found, wanted):
    other = write_unet(tmp_path / "other.json", **unet)
    line = refusal(capsys, tmp_path, data, unet=other)
    assert found in line
    assert f"wanted {wanted}" in line
    assert "synthetic" in line, "says what the dataset was encoded with"


def test_a_resolution_that_the_dataset_does_not_have(tmp_path, data, capsys):
    line = refusal(capsys, tmp_path, data, resolution=512)
    assert "wanted an image column at 512 px" in line
    assert "moments-64-" in line


def test_a_column_id_that_the_dataset_does_not_have(tmp_path, data, capsys):
    line = refusal(capsys, tmp_path, data, text_column="text-00000000")
    assert "text-00000000" in line


def test_latents_of_a_wrong_deviation(tmp_path, data, make_latent_dataset, capsys):
    folder = make_latent_dataset(tmp_path / "wrong", [24], dim=32, num_tokens=5).path
    manifest = json.loads((folder / "dataset.json").read_text())
    for column in manifest["columns"].values():
        column["stats"].update({"latent_std": 5.1} if column["stats"] else {})
    (folder / "dataset.json").write_text(json.dumps(manifest))
    line = refusal(capsys, tmp_path, folder)
    assert "standard deviation 5.100; wanted near 1" in line


@pytest.mark.parametrize("command", [["sd3"], ["sd3", "--max-steps", "3"]])
def test_an_unknown_preset(command, capsys):
    line = error_line(capsys, lambda: main(command))
    assert "'sd3' is unknown; wanted one of tiny, sd2-base-256, sd2-base-512" in line


def test_an_unknown_unet(tmp_path, data, capsys):
    line = refusal(capsys, tmp_path, data, unet="enormous")
    assert (
        "no U-Net configuration 'enormous'; wanted one of sd15, sd2-base, tiny, or a path" in line
    )


@pytest.mark.parametrize(
    ("micro_batch_size", "remedy"), [(3, "2 or 4"), (6, "4 or 8"), (7, "4 or 8"), (99, "4 or 8")]
)
def test_micro_batches_that_do_not_divide_the_batch(
    tmp_path, data, capsys, micro_batch_size, remedy
):
    line = refusal(capsys, tmp_path, data, micro_batch_size=micro_batch_size)
    assert f"{micro_batch_size} does not divide a process's share of 8" in line
    assert line.endswith(f"Remedy: --micro-batch-size {remedy}")


@pytest.mark.parametrize(
    ("world_size", "batch", "remedy"), [(3, 8, "6 or 9"), (16, 8, "16"), (5, 32, "30 or 35")]
)
def test_batches_that_do_not_divide_among_processes(tmp_path, world_size, batch, remedy):
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), process_index=0, num_processes=world_size
    )
    config = small_config(tmp_path, global_batch_size=batch)
    with pytest.raises(UserError, match=f"{batch} does not divide among {world_size} processes"):
        Trainer(config, MemoryBatches(), accelerator)
    with pytest.raises(UserError, match=rf"--global-batch-size {remedy}$"):
        Trainer(config, MemoryBatches(), accelerator)


def test_partitions_that_do_not_divide_the_batch(tmp_path, data, capsys):
    line = refusal(capsys, tmp_path, data, num_partitions=3)
    assert "--num-partitions: 3; wanted a divisor of the global batch 8" in line


def test_a_batch_larger_than_the_dataset(tmp_path, data, capsys):
    line = refusal(capsys, tmp_path, data, global_batch_size=32, num_partitions=32)
    assert "23 samples; wanted at least 32" in line, "one of the 24 is held out"


def test_attention_that_does_not_run_here(tmp_path, data, capsys):
    if torch.cuda.is_available():
        pytest.skip("xFormers may well run: there is a CUDA device")
    line = refusal(capsys, tmp_path, data, attention="xformers")
    assert "--attention: xformers does not run here" in line
    assert line.endswith("--attention sdpa or flash or math")


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_launcher_that_shards_in_its_own_way(tmp_path, data, capsys, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    line = refusal(capsys, tmp_path, data)
    assert f"accelerate launch: is set to use {name}" in line
    assert "--sharding zero2" in line


def test_a_run_that_another_process_is_writing(tmp_path, data, capsys, monkeypatch):
    monkeypatch.setattr("train.main._LOCK_WAIT_SEC", 0.0)
    with sole_writer(tmp_path / "run"):
        line = refusal(capsys, tmp_path, data)
    assert f"{tmp_path / 'run'}: another process is writing here" in line


def test_an_output_folder_that_cannot_be_one(tmp_path, data, capsys):
    (tmp_path / "file").write_text("")
    line = refusal(capsys, tmp_path, data, output_dir=tmp_path / "file")
    assert f"{tmp_path / 'file'}: cannot be written to" in line


def test_a_shard_that_was_cut_short_after_precompute(tmp_path, make_latent_dataset, capsys):
    folder = make_latent_dataset(tmp_path / "latents", [24], dim=32, num_tokens=5).path
    (shard,) = folder.glob("moments-64-*/00000.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    capsys.readouterr()
    line = error_line(capsys, lambda: main(argv_for(tmp_path, folder)))
    assert str(shard) in line
    assert "as its receipt says" in line


# The preset that fits -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "resolution", "dim"),
    [
        ("tiny", 64, 128),
        ("sd2-base-256", 256, 1024),
        ("sd2-base-512", 512, 1024),
        ("sd15-512", 512, 768),
    ],
)
def test_without_a_preset_the_one_that_fits_is_taken_and_named(
    tmp_path, make_latent_dataset, monkeypatch, capsys, name, resolution, dim
):
    make_latent_dataset(tmp_path / "data" / "latents", [2], dim=dim, resolutions=(resolution,))
    monkeypatch.chdir(tmp_path)
    assert parse([]) == PRESETS[name]
    out = capsys.readouterr().out
    assert f"preset {name} fits data/latents ({resolution} px, synthetic)" in out


def test_flags_go_on_top_of_the_preset_that_fits(tmp_path, make_latent_dataset):
    data = make_latent_dataset(tmp_path / "x", [2], dim=1024, resolutions=(512, 256)).path
    config = parse(["--max-steps", "5", f"--data={data}"])
    assert config.resolution == 256, "the first phase of the two that fit"
    assert (config.max_steps, config.data, config.unet) == (5, str(data), "sd2-base")


def test_a_dataset_that_fits_no_preset_is_refused_with_what_it_holds(
    tmp_path, make_latent_dataset, capsys
):
    data = make_latent_dataset(tmp_path / "x", [2], dim=640, resolutions=(64, 512)).path
    line = error_line(capsys, lambda: main(["--data", str(data)]))
    assert "images at [64, 512] px, text states of width 640" in line
    assert "name a preset and --unet, --resolution" in line


def test_of_several_columns_the_flags_choose_without_a_preset_too(tmp_path, make_latent_dataset):
    one, other = (
        make_latent_dataset(tmp_path / name, [2], seed=seed) for name, seed in (("a", 0), ("b", 1))
    )
    manifest = json.loads((one.path / "dataset.json").read_text())
    manifest["columns"] |= json.loads((other.path / "dataset.json").read_text())["columns"]
    (one.path / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="--text-column"):
        parse(["--data", str(one.path)])
    chosen = {"text_column": other.text_column().column_id}
    chosen["image_column"] = other.image_column(64).column_id
    config = parse(["--data", str(one.path), *flags(**chosen)])
    assert config.resolution == PRESETS["tiny"].resolution
    assert (config.text_column, config.image_column) == tuple(chosen.values())
