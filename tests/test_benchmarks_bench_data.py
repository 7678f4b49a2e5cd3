"""The data that online against offline draws for itself: whole, trainable, made once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_data, random_model
from benchmarks.bench_data import own_dataset
from benchmarks.model_configs import SD2_TEXT, SD2_VAE
from shards.dataset import Dataset
from shards.errors import UserError
from shards.verify import iter_problems
from train.presets import preset

SMALL_TEXT = {**SD2_TEXT, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
SMALL_VAE = {**SD2_VAE, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the data goes; encoders of Stable Diffusion's make, but small."""
    monkeypatch.setattr(bench_data, "_FOLDER", tmp_path / "bench")
    small_text = {**SMALL_TEXT, "num_attention_heads": 2}
    monkeypatch.setattr(bench_data, "_TEXT_ENCODERS", {"sd2-base": small_text})
    monkeypatch.setattr(random_model, "SD2_VAE", SMALL_VAE)
    return tmp_path / "bench"


def modified(folder: Path) -> dict[Path, int]:
    """When each file of images, encoders and columns was written; a manifest may be renewed."""
    files = [*folder.rglob("*.tar"), *folder.rglob("*.safetensors")]
    return {path: path.stat().st_mtime_ns for path in files}


def test_photographs_are_drawn_and_encoded_once_and_can_be_trained_on(folder):
    config = preset("sd2-base-256")
    path = own_dataset(config, 6)
    dataset = Dataset(path)
    image, text = dataset.image_column(256), dataset.text_column()
    dataset.check_trainable(image, text)  # deviation near 1, though the weights are random
    assert image.num_rows == 6
    assert dataset.text_column(holding="ids").num_rows == 6
    assert list(iter_problems(Path(path), full=True)) == []
    first = modified(folder)
    assert own_dataset(config, 6) == path
    assert modified(folder) == first
    assert own_dataset(config, 7) != path


def test_what_an_interruption_left_is_made_again(folder, monkeypatch):
    from benchmarks import stage_one_data

    write: Any = stage_one_data.write_image_shards

    def interrupted(path: Path, *rest: Any, **options: Any) -> None:
        write(path, *rest, **options)
        (path / "00003.tar").unlink()
        raise KeyboardInterrupt

    config = preset("sd2-base-256")
    with monkeypatch.context() as patch:
        patch.setattr(stage_one_data, "write_image_shards", interrupted)
        with pytest.raises(KeyboardInterrupt):
            own_dataset(config, 8)
    assert Dataset(own_dataset(config, 8)).image_column(256).num_rows == 8


def test_columns_of_encoders_that_have_changed_give_way(folder, monkeypatch):
    config = preset("sd2-base-256")
    text = Dataset(own_dataset(config, 6)).text_column()
    shutil.rmtree(folder / "random-sd2-base")
    deeper = {**SMALL_TEXT, "num_attention_heads": 2, "num_hidden_layers": 2}
    monkeypatch.setattr(bench_data, "_TEXT_ENCODERS", {"sd2-base": deeper})
    dataset = Dataset(own_dataset(config, 6))
    assert len(dataset.columns) == 3
    assert dataset.text_column().column_id != text.column_id


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "data").write_text("a file, where a folder should be")
    monkeypatch.setattr(bench_data, "_FOLDER", tmp_path / "data" / "bench")
    with pytest.raises(UserError, match="cannot be written"):
        own_dataset(preset("tiny"), 1)
