"""`repair` sets aside what is damaged, with its receipt, and touches nothing else."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import status_of
from helpers_s3 import S3, running_s3
from helpers_train import Killed

from shards.dataset import Dataset
from shards.errors import UserError
from shards.lock import sole_writer
from shards.repair import repair
from shards.storage import Location, list_files, list_folders, location, read_bytes
from shards.verify import iter_problems

BUCKET = "repair"  # servers of one process share their buckets
SMALL: dict[str, Any] = {"num_tokens": 5, "dim": 8, "captions_per_shard": 2, "dropped": 1}
TIME = re.compile(r"\d{8}T\d{6}Z")


@pytest.fixture
def dataset(tmp_path: Path, make_latent_dataset: Callable[..., Dataset]) -> Path:
    return make_latent_dataset(tmp_path / "latents", [5, 3], resolutions=(32, 64), **SMALL).path


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3(BUCKET) as server:
        yield server


def data_file(dataset: Location, name: str, shard: str = "00000") -> Location:
    (folder,) = [one for one in list_folders(dataset) if one.startswith(f"{name}")]
    suffix = "parquet" if name == "ledger" else "safetensors"
    return dataset / folder / f"{shard}.{suffix}"


def damage(path: Location, place: int = -1) -> bytes:
    """Flip a bit; returns what is there then."""
    data = bytearray(read_bytes(path))
    data[place] ^= 1
    path.write_bytes(bytes(data))
    return bytes(data)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_where_nothing_is_wrong_nothing_happens(dataset, capsys):
    before = tree(dataset.parent)
    assert status_of("repair", dataset) == 0
    out = capsys.readouterr().out
    assert out == f"{dataset}: nothing to set aside; dataset.json is up to date\n"
    done = repair(dataset)
    assert (done.problems, done.aside, done.redo, done.moved) == ([], None, [], [])
    assert tree(dataset.parent) == before
    assert [path.name for path in dataset.parent.iterdir()] == ["latents"]


def test_a_damaged_file_goes_aside_with_its_receipt_and_nothing_is_lost(dataset):
    before = tree(dataset)
    path = data_file(dataset, "moments-64")
    damaged = damage(path)
    done = repair(dataset)
    assert done.redo == [(path.parent.name, "00000")]
    assert sorted(done.moved) == [path.with_suffix(".json"), path]
    assert done.aside is not None
    assert done.aside.parent == dataset.parent / "latents.aside"
    assert TIME.fullmatch(done.aside.name)
    name = f"{path.parent.name}/00000"
    aside = tree(done.aside)
    assert aside == {
        f"{name}.json": before[f"{name}.json"],
        f"{name}.safetensors": damaged,
    }
    after = tree(dataset)
    assert before.keys() - after.keys() == aside.keys()
    assert {n for n in after if after[n] != before[n]} == {"dataset.json"}


def test_after_a_repair_only_what_was_set_aside_is_missing(dataset):
    path = data_file(dataset, "moments-64")
    damage(path)
    repair(dataset)
    (problem,) = iter_problems(dataset, full=True)
    assert str(problem) == f"{path.parent}: shard 00000 is in the ledger, not here"
    assert list(Dataset(dataset).columns[path.parent.name].shards) == ["00001"]


def test_several_damaged_files_of_all_kinds_go_aside_together(dataset, capsys):
    damage(data_file(dataset, "moments-32", "00001"))
    damage(data_file(dataset, "moments-64"), 3)
    cut = data_file(dataset, "text", "00001")
    cut.write_bytes(cut.read_bytes()[:-9])
    damage(data_file(dataset, "text", "null"))
    damage(data_file(dataset, "ledger"))
    receipt = data_file(dataset, "moments-32").with_suffix(".json")
    receipt.write_text("{}")
    assert status_of("repair", dataset, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert {re.sub(r"-[0-9a-f]{8}/", "/", one) for one in document["redo"]} == {
        "ledger/00000",
        "moments-32/00000",
        "moments-32/00001",
        "moments-64/00000",
        "text/00001",
        "text/null",
    }
    aside = Path(document["aside"])
    assert len(tree(aside)) == 12
    for entry in document["redo"]:
        assert not list(dataset.glob(f"{entry}.*"))
        assert len(list(aside.glob(f"{entry}.*"))) == 2


def test_a_second_repair_finds_nothing_more_to_set_aside(dataset, capsys):
    damage(data_file(dataset, "moments-64"))
    repair(dataset)
    before = tree(dataset.parent)
    assert status_of("repair", dataset) == 0
    assert "nothing to set aside" in capsys.readouterr().out
    assert tree(dataset.parent) == before


def test_damage_of_another_day_goes_to_another_folder(dataset, monkeypatch):
    asides = set()
    for number in range(2):
        path = data_file(dataset, "moments-64", f"0000{number}")
        damaged = damage(path)
        done = repair(dataset)
        assert done.aside is not None
        kept = done.aside / path.parent.name / path.name
        assert kept.read_bytes() == damaged
        asides.add(kept)
    assert all(path.exists() for path in asides)


def test_the_same_shard_damaged_again_within_a_second_overwrites_nothing(dataset):
    """Times have whole seconds."""
    path, receipt = data_file(dataset, "moments-64"), data_file(dataset, "moments-64")
    receipt = receipt.with_suffix(".json")
    whole = path.read_bytes(), receipt.read_bytes()
    kept = []
    for place in (-1, -2, -3):
        path.write_bytes(whole[0])
        receipt.write_bytes(whole[1])
        damaged = damage(path, place)
        done = repair(dataset)
        assert done.aside is not None
        kept.append(damaged)
    found = [file.read_bytes() for file in dataset.parent.rglob("latents.aside/**/*.safetensors")]
    assert sorted(found) == sorted(kept)


def test_a_lagging_manifest_is_rebuilt(dataset, capsys):
    manifest = dataset / "dataset.json"
    written = manifest.read_bytes()
    for content in (None, b"", b"{}", written[:-2]):
        manifest.unlink()
        if content is not None:
            manifest.write_bytes(content)
        assert status_of("repair", dataset) == 0
        assert manifest.read_bytes() == written
    assert "dataset.json" in capsys.readouterr().out


def test_what_killed_writers_left_is_not_damage(dataset):
    left = data_file(dataset, "moments-64").with_name("00005.safetensors.partial")
    left.write_bytes(b"half")
    done = repair(dataset)
    assert (done.aside, done.redo) == (None, [])
    assert len(done.problems) == 1
    assert left.exists()


@pytest.mark.parametrize("form", ["trailing slash", "relative", "relative with a slash", "dot"])
def test_the_aside_folder_is_beside_the_dataset_however_it_was_named(
    dataset, monkeypatch, capsys, form
):
    path = data_file(dataset, "moments-64")
    damaged = damage(path)
    monkeypatch.chdir(dataset.parent)
    named = f"{dataset}/"
    if form.startswith("relative"):
        named = "latents" + ("/" if "slash" in form else "")
    elif form == "dot":
        monkeypatch.chdir(dataset)
        named = "."
    assert status_of("repair", named, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    (kept,) = (dataset.parent / "latents.aside").glob("*/*/00000.safetensors")
    assert kept.read_bytes() == damaged
    assert Path(document["aside"]).resolve() == kept.parent.parent
    assert {one.name for one in dataset.parent.iterdir()} == {"latents", "latents.aside"}
    assert not path.exists()


def test_the_report_names_problems_the_aside_folder_and_what_will_be_made_again(dataset, capsys):
    path = data_file(dataset, "moments-64")
    damage(path)
    assert status_of("repair", dataset) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"{path}: its bytes are not those that were written")
    assert re.search(r"set aside in .*latents\.aside/\d{8}T\d{6}Z: 2 files", out[1])
    assert "The same precompute again will make:" in out[1]
    assert out[2] == f"  {path.parent.name}/00000"


def test_verify_tells_of_repair_as_the_remedy(dataset, capsys):
    damage(data_file(dataset, "moments-64"))
    assert status_of("verify", "--full", dataset) == 1
    assert f"python -m shards repair {dataset}" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["nowhere", "an empty folder", "a file"])
def test_a_wrong_path_is_one_line_and_leaves_nothing(tmp_path, capsys, where):
    path = tmp_path / where
    if where == "a file":
        path.write_text("x")
    elif where != "nowhere":
        path.mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert status_of("repair", path) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"shards repair: error: {path}: ")
    assert captured.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_job_that_is_writing_is_not_disturbed(dataset, capsys):
    path = data_file(dataset, "moments-64")
    damage(path)
    with sole_writer(dataset):
        assert status_of("repair", dataset) == 2
    assert "another process is writing here" in capsys.readouterr().err
    assert path.exists()


def test_a_receipt_of_another_release_is_reported_and_left(dataset):
    receipt = data_file(dataset, "moments-64").with_suffix(".json")
    document = json.loads(receipt.read_text())
    receipt.write_text(json.dumps({**document, "format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        repair(dataset)
    assert receipt.exists()
    assert not (dataset.parent / "latents.aside").exists()


@pytest.mark.parametrize("step", [1, 2, 3])
def test_killed_half_way_a_file_without_receipt_is_the_worst_that_is_left(
    dataset, monkeypatch, step
):
    damage(data_file(dataset, "moments-64"))
    damage(data_file(dataset, "moments-32"))
    moved = []

    def move(where: Path, to: Path) -> None:
        if len(moved) == step:
            raise Killed
        to.parent.mkdir(parents=True, exist_ok=True)
        os.rename(where, to)  # noqa: PTH104
        moved.append(where)

    with monkeypatch.context() as patch:
        patch.setattr("shards.repair.move", move)
        with pytest.raises(Killed):
            repair(dataset)
    for name in ("moments-64", "moments-32"):
        path = data_file(dataset, name)
        assert not path.with_suffix(".json").exists() or path.exists()
    repair(dataset)
    left = [str(problem) for problem in iter_problems(dataset, full=True)]
    assert all("not here" in line or "no receipt: not finished" in line for line in left), left


def test_a_repaired_dataset_is_whole_again_after_the_same_precompute(
    tmp_path, model_folder, image_shards
):
    from precompute.config import PrecomputeConfig
    from precompute.job import precompute

    out = tmp_path / "latents"
    config = PrecomputeConfig(
        shards=f"{image_shards}/00000.tar",
        out=str(out),
        model=str(model_folder),
        resolutions="32",
        latents="mean-int8",
        text="int8",
        device="cpu",
    )
    precompute(config)
    before = {name: data for name, data in tree(out).items() if name.endswith("tensors")}
    damage(data_file(out, "mean-32-int8"))
    damage(data_file(out, "text-int8", "null"))
    assert len(repair(out).redo) == 2
    precompute(config)
    assert list(iter_problems(out, full=True)) == []
    assert {name: data for name, data in tree(out).items() if name.endswith("tensors")} == before


# On an object store -------------------------------------------------------------------------------


@pytest.mark.parametrize("slash", ["", "/"])
def test_on_s3_damage_goes_aside_beside_the_dataset(s3, make_latent_dataset, capsys, slash):
    url = f"s3://{BUCKET}/repair{len(slash)}/latents"
    dataset = location(url)
    make_latent_dataset(dataset, [5, 3], resolutions=(32,), **SMALL)
    path = data_file(dataset, "moments-32")
    column = path.parent.name
    receipt = read_bytes(dataset / column / "00000.json")
    damaged = damage(path)
    assert status_of("repair", url + slash, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["redo"] == [f"{column}/00000"]
    aside = location(document["aside"])
    assert TIME.fullmatch(aside.name)
    assert aside.parent == location(f"{url}.aside")
    assert read_bytes(aside / column / "00000.safetensors") == damaged
    assert read_bytes(aside / column / "00000.json") == receipt
    assert sorted(list_files(dataset / column)) == ["00001.json", "00001.safetensors"]
    assert sorted(list_folders(dataset)) == [
        "ledger",
        column,
        data_file(dataset, "text").parent.name,
    ]
    assert list(Dataset(dataset).columns[column].shards) == ["00001"]
    assert status_of("repair", url) == 0
    assert "nothing to set aside" in capsys.readouterr().out
