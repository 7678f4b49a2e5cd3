"""`gc` deletes what was named and what was abandoned; everything else is safe from it."""

import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import status_of
from helpers_s3 import S3, running_s3
from helpers_train import Killed

from shards.dataset import Dataset
from shards.errors import UserError
from shards.garbage import delete_garbage, find_garbage
from shards.lock import held_file, sole_writer
from shards.storage import Location, list_files, list_folders, location
from shards.verify import iter_problems

BUCKET = "garbage"  # servers of one process share their buckets
SMALL: dict[str, Any] = {"num_tokens": 5, "dim": 8, "captions_per_shard": 2, "dropped": 1}


@pytest.fixture
def dataset(tmp_path: Path, make_latent_dataset: Callable[..., Dataset]) -> Path:
    return make_latent_dataset(tmp_path / "latents", [5, 3], resolutions=(32, 64), **SMALL).path


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3(BUCKET) as server:
        yield server


def column_id(dataset: Location, name: str) -> str:
    (found,) = [folder for folder in list_folders(dataset) if folder.startswith(f"{name}-")]
    return found


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"<folder>"
        for path in sorted(folder.rglob("*"))
    }


def leave_behind(dataset: Path) -> list[Path]:
    """What killed writers leave: a temporary file, data without a receipt."""
    folder = dataset / column_id(dataset, "moments-32")
    left = [
        folder / "00007.safetensors.partial",
        folder / "00008.safetensors",
        dataset / "ledger" / "00009.parquet.partial",
        dataset / "ledger" / "00010.parquet",
    ]
    for path in left:
        path.write_bytes(b"half a file")
    return left


def test_nothing_is_garbage_in_a_finished_dataset(dataset, capsys):
    before = tree(dataset)
    for flags in ([], ["--yes"]):
        assert status_of("gc", dataset, *flags) == 0
        assert capsys.readouterr().out.startswith("0 files, 0 bytes ")
    assert tree(dataset) == before


def test_without_yes_it_only_lists(dataset, capsys):
    left = leave_behind(dataset)
    column = column_id(dataset, "moments-64")
    before = tree(dataset)
    assert status_of("gc", dataset, "--column", column) == 0
    assert tree(dataset) == before
    out = capsys.readouterr().out
    named = [dataset / column / f"0000{n}.{end}" for n in "01" for end in ("json", "safetensors")]
    for path in [*left, *named]:
        assert f"  {path}\n" in out
    total = sum(path.stat().st_size for path in [*left, *named])
    assert out.endswith(f"8 files, {total:,} bytes would be deleted; --yes does it\n")


def test_yes_deletes_what_was_listed_and_nothing_else(dataset, capsys):
    left = leave_behind(dataset)
    column = column_id(dataset, "moments-64")
    before = tree(dataset)
    listed = find_garbage(dataset, [column])
    assert status_of("gc", dataset, "--column", column, "--yes") == 0
    assert "8 files" in capsys.readouterr().out
    after = tree(dataset)
    gone = before.keys() - after.keys()
    assert gone == {str(path.relative_to(dataset)) for path in listed} | {column}
    assert {str(path.relative_to(dataset)) for path in left} < gone
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"dataset.json"}
    assert list(iter_problems(dataset, full=True)) == []
    assert column not in Dataset(dataset).columns


def test_a_dataset_that_lost_a_column_still_has_the_others(dataset):
    delete_garbage(dataset, [column_id(dataset, "moments-64")])
    left = Dataset(dataset)
    assert left.resolutions() == [32]
    left.check_trainable(left.image_column(32), left.text_column())


def test_several_columns_go_at_once(dataset):
    columns = [column_id(dataset, name) for name in ("moments-64", "moments-32", "text")]
    flags = itertools.chain.from_iterable(("--column", column) for column in columns)
    assert status_of("gc", dataset, *flags, "--yes") == 0
    assert list_folders(dataset) == ["ledger"]
    assert Dataset(dataset).columns == {}


def test_a_column_named_twice_goes_once(dataset, capsys):
    column = column_id(dataset, "moments-64")
    assert status_of("gc", dataset, "--column", column, "--column", column, "--yes") == 0
    assert column not in list_folders(dataset)
    assert list(iter_problems(dataset, full=True)) == []


@pytest.mark.parametrize("name", ["ledger", "moments-64", "nowhere", "", ".", "..", "dataset.json"])
@pytest.mark.parametrize("flags", [[], ["--yes"]], ids=["dry", "yes"])
def test_what_is_no_column_is_refused_and_the_columns_are_listed(dataset, capsys, name, flags):
    leave_behind(dataset)
    before = tree(dataset.parent)
    assert status_of("gc", dataset, "--column", name, *flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    for column in ("moments-32", "moments-64", "text"):
        assert column_id(dataset, column) in captured.err
    assert tree(dataset.parent) == before


@pytest.mark.parametrize("flags", [[], ["--yes"]], ids=["dry", "yes"])
def test_a_temporary_file_that_a_living_process_holds_is_left_alone(dataset, flags):
    left = leave_behind(dataset)
    with held_file(left[0]):
        assert status_of("gc", dataset, *flags) == 0
        assert left[0].exists()
        assert left[0] not in find_garbage(dataset, [])
    assert left[1].exists() == (not flags)
    assert left[0] in find_garbage(dataset, [])


def test_a_job_that_is_writing_is_left_in_peace(dataset, capsys):
    left = leave_behind(dataset)
    with sole_writer(dataset):
        assert status_of("gc", dataset, "--yes") == 2
        assert "another process is writing here" in capsys.readouterr().err
        assert all(path.exists() for path in left)
        assert status_of("gc", dataset) == 0  # looking is always allowed


def test_a_temporary_file_that_gets_its_name_while_we_look_is_no_error(dataset, monkeypatch):
    """A dry run holds no lock: a job may be at work."""
    left = leave_behind(dataset)
    listed = list_files

    def list_then_rename(folder: Location) -> dict[str, int]:
        found = listed(folder)
        if left[0].exists() and folder == left[0].parent:
            left[0].rename(left[0].with_suffix(""))
        return found

    monkeypatch.setattr("shards.garbage.list_files", list_then_rename)
    assert left[0] not in find_garbage(dataset, [])


@pytest.mark.parametrize("where", ["nowhere", "empty", "model", "file"])
@pytest.mark.parametrize("flags", [[], ["--yes"]], ids=["dry", "yes"])
def test_a_folder_that_is_no_dataset_is_refused_and_never_touched(tmp_path, capsys, where, flags):
    """A diffusers model folder is full of safetensors without a receipt."""
    folder = tmp_path / where
    if where == "file":
        folder.write_text("x")
    elif where == "empty":
        folder.mkdir()
    elif where == "model":
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
        (folder / "unet" / "config.json").write_text("{}")
    before = tree(tmp_path)
    assert status_of("gc", folder, *flags) == 2
    assert tree(tmp_path) == before
    captured = capsys.readouterr()
    assert captured.err.startswith(f"shards gc: error: {folder}: ")
    assert captured.err.count("\n") == 1


def test_a_strangers_folder_inside_a_dataset_is_left_alone(dataset):
    folder = dataset / "model"
    folder.mkdir()
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"weights")
    assert weights not in find_garbage(dataset, [])
    assert status_of("gc", dataset, "--yes") == 0
    assert weights.exists()


def test_a_column_with_a_folder_inside_ends_in_one_line(dataset, capsys):
    column = column_id(dataset, "moments-64")
    (dataset / column / "notes").mkdir()
    (dataset / column / "notes" / "mine.txt").write_text("x")
    assert status_of("gc", dataset, "--column", column, "--yes") in (0, 2)
    assert capsys.readouterr().err.count("\n") <= 1
    assert (dataset / column / "notes" / "mine.txt").read_text() == "x"


# Killed -------------------------------------------------------------------------------------------


def dies_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends before the how-manieth change to the disk."""
    steps = itertools.count(1)

    def dying(change: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if next(steps) == step:
                raise Killed
            return change(*args, **kwargs)

        return counted

    import shards.garbage

    monkeypatch.setattr(shards.garbage, "remove", dying(shards.garbage.remove))
    monkeypatch.setattr(shards.garbage, "write_manifest", dying(shards.garbage.write_manifest))
    monkeypatch.setattr(Path, "rmdir", dying(Path.rmdir))


def test_killed_at_any_step_the_same_command_again_finishes(
    tmp_path, make_latent_dataset, monkeypatch
):
    for step in itertools.count(1):
        path = tmp_path / str(step) / "latents"
        make_latent_dataset(path, [5, 3], resolutions=(32, 64), **SMALL)
        leave_behind(path)
        column = column_id(path, "moments-64")
        with monkeypatch.context() as patch:
            dies_at(step, patch)
            try:
                delete_garbage(path, [column])
                break
            except Killed:
                pass
        assert status_of("gc", path, "--column", column, "--yes") == 0, f"killed at step {step}"
        assert list(iter_problems(path, full=True)) == [], f"killed at step {step}"
        assert column not in list_folders(path)
    assert step > 8


def test_killed_half_way_a_column_never_counts_with_a_receipt_and_no_data(dataset, monkeypatch):
    column = column_id(dataset, "moments-64")
    for step in range(1, 4):
        with monkeypatch.context() as patch:
            dies_at(step, patch)
            with pytest.raises(Killed):
                delete_garbage(dataset, [column])
        names = {path.name for path in (dataset / column).iterdir()}
        for shard in ("00000", "00001"):
            assert f"{shard}.json" not in names or f"{shard}.safetensors" in names


# On an object store -------------------------------------------------------------------------------


def test_on_s3_named_columns_and_temporary_files_go_and_nothing_else(
    s3, make_latent_dataset, capsys
):
    path = location(f"s3://{BUCKET}/gc/latents")
    make_latent_dataset(path, [5, 3], resolutions=(32, 64), **SMALL)
    column = column_id(path, "moments-64")
    kept = column_id(path, "moments-32")
    (path / kept / "00007.safetensors.partial").write_bytes(b"half a file")
    (path / kept / "00008.safetensors").write_bytes(b"about to get a receipt, for all we know")
    assert status_of("gc", path, "--column", column, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["files"]) == 5
    assert not document["deleted"]
    assert list_files(path / column)
    assert status_of("gc", path, "--column", column, "--yes", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {**document, "deleted": True}
    assert list_files(path / column) == {}
    assert "00008.safetensors" in list_files(path / kept)
    assert "00007.safetensors.partial" not in list_files(path / kept)
    assert column not in Dataset(path).columns


def test_on_s3_a_place_that_is_no_dataset_is_refused(s3, capsys):
    path = location(f"s3://{BUCKET}/elsewhere")
    (path / "logs" / "a.txt.partial").write_bytes(b"someone else's")
    assert status_of("gc", path, "--yes") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list_files(path / "logs") == {"a.txt.partial": 14}
    assert "dataset.json" not in list_files(path)


# What is printed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--yes"]], ids=["dry", "yes"])
def test_json_is_one_document_that_says_what_was_done(dataset, capsys, flags):
    left = leave_behind(dataset)
    assert status_of("gc", dataset, "--json", *flags) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {
        "files": {str(path): 11 for path in sorted(left)},
        "bytes": 44,
        "deleted": bool(flags),
    }


def test_a_file_that_cannot_be_deleted_is_one_line(dataset, capsys, monkeypatch):
    leave_behind(dataset)

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "remove", refuse)
    monkeypatch.setattr(os, "unlink", refuse)
    assert status_of("gc", dataset, "--yes") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_unknown_columns_are_an_error_of_the_user_for_callers_too(dataset):
    with pytest.raises(UserError, match=r"--column: no column x in .*; wanted .*text-"):
        find_garbage(dataset, ["x"])
