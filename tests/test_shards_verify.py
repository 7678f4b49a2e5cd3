"""`verify` finds whatever is wrong with a dataset, and says where."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import rewrite_receipt

from shards.arrays import map_arrays, save_arrays
from shards.dataset import Dataset
from shards.errors import DatasetError
from shards.manifest import write_manifest
from shards.receipt import Receipt, file_facts, read_receipt
from shards.verify import iter_problems


@pytest.fixture
def dataset(tmp_path: Path, make_latent_dataset: Callable[..., Dataset]) -> Path:
    small = {"num_tokens": 5, "dim": 8, "captions_per_shard": 2, "dropped": 2, "too_small": 1}
    return make_latent_dataset(tmp_path / "latents", [5, 0], resolutions=(32,), **small).path


def files_of(dataset: Path) -> list[Path]:
    return sorted(path for path in dataset.rglob("*") if path.is_file())


def column_folder(dataset: Path, name: str) -> Path:
    (folder,) = dataset.glob(f"{name}-*")
    return folder


def problems(dataset: Path, *, full: bool = True) -> list[str]:
    return list(map(str, iter_problems(dataset, full=full)))


def replace_arrays(path: Path, **changed: np.ndarray) -> None:
    """Write other arrays with a receipt that fits: what a faulty writer would leave."""
    arrays = {name: np.array(array) for name, array in map_arrays(path).items()}
    fields = vars(read_receipt(path.with_suffix(".json")))
    save_arrays(path, {**arrays, **changed})
    rewrite_receipt(path, Receipt(**{**fields, **file_facts(path)}))


@pytest.mark.parametrize("full", [False, True])
def test_a_good_dataset_is_clean(dataset, latent_dataset, full):
    assert problems(dataset, full=full) == []
    assert problems(latent_dataset, full=full) == []


def test_every_kind_of_file_is_there_to_be_damaged(dataset):
    kinds = {path.relative_to(dataset).parts[0].split("-")[0] for path in files_of(dataset)}
    assert kinds == {"dataset.json", "ledger", "moments", "text"}
    assert (column_folder(dataset, "text") / "null.safetensors").exists()


def test_a_flipped_byte_in_any_file_is_found_and_the_file_named(dataset):
    rng = np.random.default_rng(0)
    for path in files_of(dataset):
        whole = path.read_bytes()
        places = {0, 7, 8, len(whole) - 1, *rng.integers(0, len(whole), 12).tolist()}
        for place in sorted(places):
            damaged = bytearray(whole)
            damaged[place] ^= int(rng.integers(1, 256))
            path.write_bytes(damaged)
            found = problems(dataset)
            assert any(str(path) in line for line in found), (path, place, damaged[place], found)
        path.write_bytes(whole)
    assert problems(dataset) == []


def test_a_manifest_with_other_line_ends_is_found(dataset):
    path = dataset / "dataset.json"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r", 1))
    assert any("dataset.json" in line for line in problems(dataset))


@pytest.mark.parametrize("full", [False, True])
def test_any_missing_file_is_found_and_named(dataset, full):
    for path in files_of(dataset):
        whole = path.read_bytes()
        path.unlink()
        found = problems(dataset, full=full)
        assert any(str(path.with_suffix("")) in line for line in found), (path, found)
        path.write_bytes(whole)
    assert problems(dataset) == []


@pytest.mark.parametrize("full", [False, True])
def test_a_file_missing_together_with_its_receipt_is_found(dataset, full):
    for receipt in sorted(dataset.glob("*/*.json")):
        pair = list(receipt.parent.glob(f"{receipt.stem}.*"))
        assert len(pair) == 2
        kept = {path: path.read_bytes() for path in pair}
        for path in pair:
            path.unlink()
        write_manifest(dataset)  # so that a lagging index is not what gives it away
        found = problems(dataset, full=full)
        assert any(receipt.stem in line for line in found), (receipt, found)
        for path, data in kept.items():
            path.write_bytes(data)
    write_manifest(dataset)
    assert problems(dataset) == []


@pytest.mark.parametrize("full", [False, True])
def test_a_data_file_cut_short_or_too_long_is_found(dataset, full):
    for path in files_of(dataset):
        whole = path.read_bytes()
        for data in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0"):
            path.write_bytes(data)
            found = problems(dataset, full=full)
            assert any(str(path) in line for line in found), (path, len(data))
        path.write_bytes(whole)


def test_what_a_killed_writer_left_is_reported_as_unfinished(dataset):
    folder = column_folder(dataset, "moments")
    (folder / "00009.safetensors").write_bytes(b"whole, but without a receipt")
    (folder / "00010.safetensors.partial").write_bytes(b"half")
    found = problems(dataset, full=False)
    assert len(found) == 2
    assert "00009.safetensors: no receipt: not finished" in found[0]
    assert "00010.safetensors.partial: a temporary file" in found[1]


def test_a_manifest_that_lags_is_found_and_index_repairs_it(dataset):
    path = dataset / "dataset.json"
    manifest = json.loads(path.read_text())
    manifest["ledger"].popitem()
    path.write_text(json.dumps(manifest))
    (line,) = problems(dataset, full=False)
    assert "python -m shards index" in line
    write_manifest(dataset)
    assert problems(dataset) == []


def test_two_shards_that_changed_places_are_found(dataset):
    folder = column_folder(dataset, "text")
    for suffix in (".json", ".safetensors"):
        (folder / f"00000{suffix}").rename(folder / "aside")
        (folder / f"00001{suffix}").rename(folder / f"00000{suffix}")
        (folder / "aside").rename(folder / f"00001{suffix}")
    found = problems(dataset, full=False)
    assert {line.split(": ")[0] for line in found} >= {
        str(folder / "00000.json"),
        str(folder / "00001.json"),
    }


def test_a_shard_from_another_column_is_found(dataset, tmp_path, make_latent_dataset):
    small = {"num_tokens": 5, "dim": 8, "captions_per_shard": 2, "dropped": 2, "too_small": 1}
    other = make_latent_dataset(tmp_path / "other", [5, 0], resolutions=(32,), seed=9, **small).path
    theirs, ours = column_folder(other, "moments"), column_folder(dataset, "moments")
    for suffix in (".json", ".safetensors"):
        shutil.copy(theirs / f"00001{suffix}", ours)
    found = problems(dataset, full=False)
    assert any(line.startswith(f"{ours / '00001.json'}: ") for line in found), found


def test_a_folder_that_was_renamed_is_found(dataset):
    folder = column_folder(dataset, "moments")
    folder.rename(dataset / "moments-32-00000000")
    assert any("moments-32-00000000" in line for line in problems(dataset, full=False))


@pytest.mark.parametrize(
    "row", [[0, 1, 2, 3, 99], [-1, 0, 1, 2, 3], [0, 1, 2, 3]], ids=["beyond", "below", "too few"]
)
def test_rows_that_point_outside_the_ledger_are_found_by_full(dataset, row):
    path = column_folder(dataset, "moments") / "00000.safetensors"
    replace_arrays(path, row=np.array(row, np.int32))
    write_manifest(dataset)
    assert problems(dataset, full=False) == []
    (line,) = problems(dataset)
    assert line.startswith(f"{path}: ")


def test_captions_that_point_outside_are_found_by_full(dataset):
    path = column_folder(dataset, "text") / "00000.safetensors"
    caption = np.array(map_arrays(path)["caption"])
    caption[caption == 1] = 2
    replace_arrays(path, caption=caption)
    write_manifest(dataset)
    (line,) = problems(dataset)
    assert line == f"{path}: an index points outside"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "array"), [("moments", "moments"), ("text", "states")])
def test_a_number_that_is_not_finite_is_found_by_full(dataset, name, array, value):
    path = column_folder(dataset, name) / "00000.safetensors"
    values = np.array(map_arrays(path)[array])
    values[-1, -1, -1] = value
    replace_arrays(path, **{array: values})
    write_manifest(dataset)
    (line,) = problems(dataset)
    assert line == f"{path}: {array}: a number is not finite"


def test_a_ledger_whose_statuses_are_not_those_of_its_receipt_is_found(dataset):
    path = dataset / "ledger" / "00000.parquet"
    fields = vars(read_receipt(path.with_suffix(".json")))
    rewrite_receipt(path, Receipt(**{**fields, "rows": 5, "absent": {"broken_image": 3}}))
    write_manifest(dataset)
    assert any(line.startswith(f"{path}: ") for line in problems(dataset))


def test_accounts_of_different_lengths_are_found(dataset):
    path = column_folder(dataset, "text") / "00000.safetensors"
    fields = vars(read_receipt(path.with_suffix(".json")))
    rewrite_receipt(path, Receipt(**{**fields, "rows_in": 9, "absent": {"broken_image": 3}}))
    write_manifest(dataset)
    assert problems(dataset, full=False) == [f"{path}: accounts for 9 rows; ledger has 8"]


def test_reading_changes_nothing(dataset):
    def facts() -> list[tuple[Path, int, bytes]]:
        return [(path, path.stat().st_mtime_ns, path.read_bytes()) for path in files_of(dataset)]

    before = facts()
    problems(dataset)
    assert facts() == before


def test_no_dataset_is_an_error_and_not_a_clean_bill(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", Path(__file__)):
        with pytest.raises(DatasetError, match="no latent dataset"):
            problems(path)
