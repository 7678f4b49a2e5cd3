"""`python -m shards`: what it prints, its exit status, and one line instead of a traceback."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_python, status_of

from shards.dataset import Dataset


@pytest.fixture
def dataset(tmp_path: Path, make_latent_dataset: Callable[..., Dataset]) -> Path:
    small = {"num_tokens": 5, "dim": 8, "captions_per_shard": 2, "dropped": 2, "too_small": 1}
    return make_latent_dataset(tmp_path / "latents", [5, 7], resolutions=(32, 64), **small).path


def test_info_shows_columns_rows_and_what_is_absent(dataset, capsys):
    assert status_of("info", dataset) == 0
    text = capsys.readouterr().out
    assert "18 source rows in 2 shards, 4 dropped" in text
    for column in Dataset(dataset).columns.values():
        assert column.column_id in text
    assert "absent: 2 too_small" in text
    assert "4 broken_image" in text
    assert "1.000" in text


def test_info_of_a_dataset_without_a_single_row_is_still_info(tmp_path, make_latent_dataset):
    make_latent_dataset(tmp_path, [0], num_tokens=5, dim=8)
    assert status_of("info", tmp_path) == 0


@pytest.mark.parametrize("flags", [[], ["--full"]])
def test_verify_of_a_good_dataset_is_clean_and_says_what_was_checked(dataset, capsys, flags):
    assert status_of("verify", *flags, dataset) == 0
    checked = "every byte" if flags else "receipts, lengths and sums"
    assert capsys.readouterr().out == f"{dataset}: clean ({checked} checked)\n"


def test_verify_names_the_problems_and_exits_with_status_one(dataset, capsys):
    (path,) = dataset.glob("moments-64-*/00001.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert status_of("verify", dataset) == 0  # lengths are right; only --full reads the bytes
    capsys.readouterr()
    assert status_of("verify", "--full", dataset) == 1
    text = capsys.readouterr().out
    assert str(path) in text
    assert f"{dataset}: 1 problem\nRemedy: python -m shards repair {dataset}, then" in text


def test_index_rebuilds_the_manifest(dataset, capsys):
    path = dataset / "dataset.json"
    written = path.read_bytes()
    path.unlink()
    assert status_of("verify", dataset) == 1
    assert status_of("index", dataset) == 0
    assert path.read_bytes() == written
    assert "3 columns, 2 shards" in capsys.readouterr().out
    assert status_of("verify", dataset) == 0


def test_index_helps_against_any_damage_to_the_manifest(dataset, capsys):
    path = dataset / "dataset.json"
    written = path.read_bytes()
    for place in range(0, len(written), 97):
        path.write_bytes(written[:place] + b"\xff" + written[place + 1 :])
        assert status_of("verify", dataset) == 1
        assert "python -m shards index" in capsys.readouterr().out
        assert status_of("index", dataset) == 0
        assert path.read_bytes() == written


@pytest.mark.parametrize("command", ["info", "verify", "index"])
@pytest.mark.parametrize("where", ["nowhere", "an empty folder", "a file", "other folders"])
def test_a_wrong_path_ends_in_one_line_and_status_two(tmp_path, capsys, command, where):
    path = tmp_path / where
    if where == "a file":
        path.write_text("x")
    elif where == "other folders":
        (path / "src").mkdir(parents=True)
        (path / "src" / "code.py").write_text("pass")
    elif where != "nowhere":
        path.mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert status_of(command, path) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"shards {command}: error: {path}: ")
    assert captured.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["info", "index"])
def test_damage_that_stops_a_command_ends_in_one_line_and_status_two(dataset, capsys, command):
    for path in [dataset / "dataset.json", dataset / "ledger" / "00000.json"]:
        written = path.read_bytes()
        path.write_bytes(json.dumps({"format_version": 1}).encode())
        stops = command == "index" or path.name == "dataset.json"
        if command == "index" and path.name == "dataset.json":
            stops = False  # that is what index is for
        assert status_of(command, dataset) == (2 if stops else 0)
        captured = capsys.readouterr()
        assert captured.err.count("\n") == (1 if stops else 0)
        assert (str(path) in captured.err) == stops
        path.write_bytes(written)


def test_the_interpreter_shows_no_traceback_and_passes_the_status_on(dataset):
    wrong = run_python("-m", "shards", "info", dataset / "nowhere")
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    assert wrong.stderr.count("\n") == 1
    assert "Traceback" not in wrong.stderr
    right = run_python("-m", "shards", "verify", "--full", dataset)
    assert (right.returncode, right.stderr) == (0, "")
