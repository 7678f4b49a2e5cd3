"""The manifest follows from the receipts; what does not fit its reader is refused by name."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import rewrite_receipt

from shards.column import ImageColumn, Json
from shards.dataset import Dataset
from shards.errors import CorruptFileError, DatasetError
from shards.manifest import build_manifest, write_manifest
from shards.receipt import Receipt, read_receipt

SMALL = {"num_tokens": 5, "dim": 8, "captions_per_shard": 2}


@pytest.fixture
def dataset(tmp_path: Path, make_latent_dataset: Callable[..., Dataset]) -> Dataset:
    lengths, resolutions = [5, 0, 7], (32, 64)
    return make_latent_dataset(
        tmp_path / "latents", lengths, resolutions=resolutions, dropped=2, too_small=1, **SMALL
    )


def change_manifest(path: Path, change: Callable[[Json], Any]) -> None:
    manifest = json.loads((path / "dataset.json").read_text())
    change(manifest)
    (path / "dataset.json").write_text(json.dumps(manifest))


def change_receipts(folder: Path, change: Callable[[Json], Any]) -> None:
    """Change receipts the way a faulty writer would have written them: with a matching hash."""
    for path in folder.glob("0*.json"):
        fields = dict(vars(read_receipt(path)))
        change(fields)
        rewrite_receipt(path.with_suffix(".safetensors"), Receipt(**fields))


def check(path: Path, resolution: int = 64) -> None:
    dataset = Dataset(path)
    dataset.check_trainable(dataset.image_column(resolution), dataset.text_column())


def test_the_manifest_accounts_for_every_row(dataset):
    assert [entry["rows_in"] for entry in dataset.ledger.values()] == [8, 3, 10]
    assert [entry["rows"] for entry in dataset.ledger.values()] == [6, 1, 8]
    image, text = dataset.image_column(64), dataset.text_column()
    assert (image.num_rows, image.absent) == (12, {"broken_image": 6, "too_small": 3})
    assert (text.num_rows, text.absent) == (15, {"broken_image": 6})
    files = [dataset.path / image.column_id / f"0000{n}.safetensors" for n in range(3)]
    assert image.num_bytes == sum(file.stat().st_size for file in files)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text("{}"),
        lambda path: path.write_bytes(b"\xff\xfe\x00"),
        lambda path: path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")),
        lambda path: path.write_bytes(path.read_bytes().replace(b"\n", b"\r")),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: None,
    ],
    ids=["missing", "empty", "no text", "CRLF", "CR", "cut", "good"],
)
def test_whatever_the_manifest_was_it_is_rebuilt_as_it_was_written(dataset, spoil):
    path = dataset.path / "dataset.json"
    written = path.read_bytes()
    spoil(path)
    manifest = write_manifest(dataset.path)
    assert path.read_bytes() == written
    assert manifest == json.loads(written)


def test_the_manifest_of_a_job_is_what_its_receipts_say(latent_dataset):
    assert json.loads((latent_dataset / "dataset.json").read_bytes()) == build_manifest(
        latent_dataset
    )


def test_an_index_that_is_right_is_left_alone(dataset):
    before = (dataset.path / "dataset.json").stat().st_mtime_ns
    write_manifest(dataset.path)
    assert (dataset.path / "dataset.json").stat().st_mtime_ns == before


def test_a_receipt_that_lies_in_another_column_makes_no_manifest(dataset):
    theirs, ours = (dataset.path / dataset.image_column(r).column_id for r in (32, 64))
    shutil.copy(theirs / "00001.json", ours)
    with pytest.raises(CorruptFileError, match=r"00001\.json: is the receipt of moments-32-"):
        write_manifest(dataset.path)


def test_the_pooled_deviation_is_that_of_all_latents(latent_dataset):
    dataset = Dataset(latent_dataset)
    column = dataset.image_column(64)
    parts = [column.map_shard(shard)["moments"] for shard in column.shards]
    mean, logvar = np.split(np.concatenate(parts).astype(np.float64), 2, axis=1)
    factor = column.spec.scaling_factor
    std = factor * np.sqrt(mean.var() + np.exp(logvar).mean())
    assert column.stats["latent_std"] == pytest.approx(std, abs=2e-5)
    assert column.stats["latent_mean"] == pytest.approx(factor * mean.mean(), abs=2e-5)


def test_no_dataset_says_how_to_get_one(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", Path(__file__)):
        with pytest.raises(DatasetError, match=r"no latent dataset.*make precompute") as error:
            Dataset(path)
        assert str(path) in str(error.value)


def test_another_format_version_is_refused_with_all_that_one_needs_to_know(dataset):
    change_manifest(dataset.path, lambda manifest: manifest.update(format_version=7))
    with pytest.raises(DatasetError) as error:
        Dataset(dataset.path)
    path = re.escape(str(dataset.path / "dataset.json"))
    assert re.fullmatch(
        rf"{path}: format version 7; wanted version 1\. Remedy: .+", str(error.value)
    )


def test_a_column_of_another_format_version_is_refused_by_name(dataset):
    def age(manifest: Json) -> None:
        for column in manifest["columns"].values():
            column["spec"]["format_version"] = 0

    change_manifest(dataset.path, age)
    with pytest.raises(DatasetError, match=r"dataset\.json: format version 0; wanted version 1"):
        Dataset(dataset.path)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.clear(),
        lambda manifest: manifest.pop("ledger"),
        lambda manifest: manifest.pop("columns"),
        lambda manifest: manifest.update(columns=[]),
        lambda manifest: manifest.update(columns={"text-1": None}),
        lambda manifest: manifest["columns"].popitem()[1].clear(),
        lambda manifest: [column.clear() for column in manifest["columns"].values()],
        lambda manifest: [column.update(spec=None) for column in manifest["columns"].values()],
    ],
    ids=range(8),
)
def test_a_manifest_with_parts_missing_is_refused_by_name_or_read_as_it_is(dataset, change):
    change_manifest(dataset.path, change)
    try:
        opened = Dataset(dataset.path)
    except DatasetError as error:
        assert "dataset.json" in str(error)  # noqa: PT017 - any other error fails the test
    else:
        assert len(opened.columns) == 2  # the one that was taken out is not there


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{", "[" * 100_000])
def test_what_is_no_manifest_is_refused_with_a_remedy(dataset, text):
    (dataset.path / "dataset.json").write_text(text)
    with pytest.raises(CorruptFileError, match=r"dataset\.json: not a manifest.*shards index"):
        Dataset(dataset.path)


def test_columns_are_found_by_resolution_and_kind(dataset):
    assert dataset.resolutions() == [32, 64]
    assert dataset.image_column(32).spec.resolution == 32
    assert dataset.text_column().spec.dim == 8
    image = dataset.image_column(64)
    assert dataset.image_column(64, image.column_id).column_id == image.column_id


def test_a_column_that_is_not_there_is_refused_with_what_is(dataset):
    with pytest.raises(DatasetError, match=r"moments-32-.*wanted an image column at 512 px"):
        dataset.image_column(512)
    with pytest.raises(DatasetError, match="wanted a text column with id text-00000000"):
        dataset.text_column("text-00000000")
    with pytest.raises(DatasetError, match="wanted an image column at 64 px with id"):
        dataset.image_column(64, dataset.image_column(32).column_id)


def test_two_columns_that_fit_must_be_told_apart(tmp_path, make_latent_dataset):
    for seed in (1, 2):
        make_latent_dataset(tmp_path, [3], seed=seed, **SMALL)
    dataset = Dataset(tmp_path)
    with pytest.raises(DatasetError, match="--image-column") as error:
        dataset.image_column(64)
    for column_id in (c.column_id for c in dataset.columns.values()):
        kind = "image" if isinstance(dataset.columns[column_id].spec, ImageColumn) else "text"
        assert (column_id in str(error.value)) == (kind == "image")
    with pytest.raises(DatasetError, match="--text-column"):
        dataset.text_column()


def test_a_good_dataset_is_trainable(dataset, latent_dataset):
    for path in (dataset.path, latent_dataset):
        check(path, 32)
        check(path, 64)


def test_a_column_that_lacks_a_shard_is_refused(dataset):
    for column in (dataset.image_column(64), dataset.text_column()):
        path = dataset.path.with_name(column.column_id)
        shutil.copytree(dataset.path, path)
        for file in (path / column.column_id).glob("00001.*"):
            file.unlink()
        write_manifest(path)
        with pytest.raises(DatasetError, match=r"1 of 3 shards missing \(00001") as error:
            check(path)
        assert column.column_id in str(error.value)


def test_a_shard_that_the_ledger_lacks_counts_in_no_column(dataset):
    """Its ledger is written last: a job is at it, or was killed."""
    for file in (dataset.path / "ledger").glob("00002.*"):
        file.unlink()
    write_manifest(dataset.path)
    check(dataset.path)
    for column in Dataset(dataset.path).columns.values():
        assert sorted(column.shards) == ["00000", "00001"]


def test_a_manifest_with_a_shard_that_its_ledger_lacks_is_refused(dataset):
    path = dataset.path / "dataset.json"
    manifest = json.loads(path.read_text())
    del manifest["ledger"]["00002"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match=r"moments-64.*ledger lacks \(00002"):
        check(dataset.path)


def test_sums_that_do_not_hold_are_refused(dataset):
    def lose_rows(fields: Json) -> None:
        fields.update(rows_in=fields["rows_in"] - 1, absent={"broken_image": 2})

    column = dataset.image_column(64)
    change_receipts(dataset.path / column.column_id, lose_rows)
    write_manifest(dataset.path)
    with pytest.raises(DatasetError, match=r"18 rows accounted for; wanted the 21 of the ledger"):
        check(dataset.path)


def test_a_column_of_no_rows_is_refused(tmp_path, make_latent_dataset):
    make_latent_dataset(tmp_path, [0, 0], too_small=3, **SMALL)
    with pytest.raises(DatasetError, match="no rows"):
        check(tmp_path)


@pytest.mark.parametrize("std", [0.18215, 0.49, 2.01, 5.49])
def test_latents_of_the_wrong_deviation_are_refused(dataset, std):
    def scale(fields: Json) -> None:
        fields["stats"] = {"latent_mean": 0.0, "latent_std": std}

    change_receipts(dataset.path / dataset.image_column(64).column_id, scale)
    write_manifest(dataset.path)
    with pytest.raises(DatasetError, match=rf"{std:.3f}; wanted near 1 .*scaling_factor"):
        check(dataset.path)


def test_a_column_that_never_measured_its_latents_is_refused(dataset):
    change_receipts(
        dataset.path / dataset.image_column(64).column_id, lambda fields: fields.update(stats={})
    )
    write_manifest(dataset.path)
    with pytest.raises(DatasetError, match="moments-64"):
        check(dataset.path)


def test_a_shard_of_another_length_is_refused_by_name(dataset):
    column = dataset.image_column(64)
    path = dataset.path / column.column_id / "00002.safetensors"
    whole = path.read_bytes()
    for data in (whole[:-2], whole + b"xx", b""):
        path.write_bytes(data)
        with pytest.raises(CorruptFileError, match=r"00002\.safetensors") as error:
            column.map_shard("00002")
        assert f"{len(data)} bytes; wanted {len(whole)}" in str(error.value)
    path.unlink()
    with pytest.raises(CorruptFileError, match=r"00002\.safetensors: is missing"):
        column.map_shard("00002")


def test_the_states_of_the_empty_caption_are_those_of_the_null_file(dataset):
    assert dataset.read_null(dataset.text_column())["states"].shape == (5, 8)
