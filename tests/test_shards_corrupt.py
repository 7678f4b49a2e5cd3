"""Damage to any byte of any file is found by name, refused where it is read, and undone."""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import image_bytes, rewrite_receipt, sample_members, smooth_image, write_tar
from helpers_kill import contents

from precompute.config import PrecomputeConfig
from precompute.job import precompute
from shards.arrays import map_arrays, save_arrays
from shards.checksum import row_checksums
from shards.column import Json
from shards.dataset import Dataset
from shards.errors import CorruptFileError, DatasetError
from shards.manifest import write_manifest
from shards.quantize import channel_scale, quantize_latents, quantize_states
from shards.reader import LatentReader
from shards.receipt import NULL, Receipt, commit, read_receipt
from shards.repair import repair
from shards.verify import iter_problems
from train.unet import check_fits

LENGTHS = [9, 0, 14]
SMALL = {"num_tokens": 5, "dim": 8, "captions_per_shard": 3, "dropped": 2, "too_small": 1}


@pytest.fixture
def dataset(tmp_path: Path, make_latent_dataset: Callable[..., Dataset]) -> Dataset:
    return make_latent_dataset(tmp_path / "latents", LENGTHS, resolutions=(64,), **SMALL)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def problems(dataset: Path, *, full: bool = True) -> list[str]:
    return list(map(str, iter_problems(dataset, full=full)))


def flipped(data: bytes, place: int, mask: int = 0x10) -> bytes:
    damaged = bytearray(data)
    damaged[place] ^= mask
    return bytes(damaged)


def offset_of(path: Path, array: str) -> int:
    """Where an array begins in a safetensors file."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        begin: int = json.loads(file.read(header_bytes))[array]["data_offsets"][0]
    return 8 + header_bytes + begin


# Verify.


def test_a_corrupt_byte_anywhere_in_any_file_is_found_and_that_file_named(dataset):
    rng = np.random.default_rng(0)
    for path in files_of(dataset.path):
        whole = path.read_bytes()
        header = range(min(len(whole), 8 + 400))
        places = {0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 2, len(whole) - 1}
        places |= set(rng.choice(header, 6).tolist()) | set(rng.integers(0, len(whole), 6).tolist())
        for place in sorted(places):
            path.write_bytes(flipped(whole, place, 1 << int(rng.integers(0, 8))))
            found = problems(dataset.path)
            assert any(line.startswith(f"{path}: ") for line in found), (path, place, found)
        path.write_bytes(whole)
    assert problems(dataset.path) == []


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-1], lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b + b"\0"],
    ids=["a byte short", "half", "empty", "a byte long"],
)
def test_a_corrupt_length_of_any_file_is_found_and_that_file_named(dataset, damage, full):
    for path in files_of(dataset.path):
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        found = problems(dataset.path, full=full)
        assert any(line.startswith(f"{path}: ") for line in found), (path, found)
        path.write_bytes(whole)
    assert problems(dataset.path, full=full) == []


@pytest.mark.parametrize("full", [False, True])
def test_a_missing_file_is_found_as_corrupt_and_named(dataset, full):
    for path in files_of(dataset.path):
        whole = path.read_bytes()
        path.unlink()
        found = problems(dataset.path, full=full)
        named = path.with_suffix("") if path.parent != dataset.path else path
        assert any(line.startswith(str(named)) for line in found), (path, found)
        path.write_bytes(whole)
    assert problems(dataset.path, full=full) == []


def test_corrupt_zeros_in_the_place_of_a_block_are_found_and_the_rows_named(dataset):
    """What a lost sector leaves."""
    path = dataset.path / dataset.image_column(64).column_id / "00002.safetensors"
    whole = path.read_bytes()
    row_bytes = 8 * 8 * 8 * 2
    start = whole.index(np.array(map_arrays(path)["moments"][4]).tobytes())
    path.write_bytes(whole[:start] + bytes(2 * row_bytes) + whole[start + 2 * row_bytes :])
    (line,) = problems(dataset.path)
    assert line.startswith(f"{path}: ")
    assert "2 rows damaged: 4, 5" in line


def test_two_corrupt_rows_that_changed_places_are_found(dataset):
    path = dataset.path / dataset.image_column(64).column_id / "00002.safetensors"
    whole = path.read_bytes()
    first, second = (np.array(map_arrays(path)["moments"][row]).tobytes() for row in (3, 9))
    swapped = whole.replace(first, b"\0" * len(first)).replace(second, first)
    path.write_bytes(swapped.replace(b"\0" * len(first), second))
    assert len(path.read_bytes()) == len(whole)
    assert path.read_bytes() != whole
    (line,) = problems(dataset.path)
    assert "2 rows damaged: 3, 9" in line
    with pytest.raises(CorruptFileError, match=r"00002\.safetensors: row [39] does not match"):
        read_everything(Dataset(dataset.path))


# The reader.


def reader_of(dataset: Dataset) -> LatentReader:
    image, text = dataset.image_column(64), dataset.text_column()
    options: Json = {"seed": 0, "window": 7, "global_batch_size": 1, "num_partitions": 1}
    return LatentReader(dataset, image, text, **options)


def read_everything(dataset: Dataset) -> None:
    reader = reader_of(dataset)
    for step in range(sum(LENGTHS)):
        reader.gather(step, range(1))


def as_int8(dataset: Dataset) -> Dataset:
    """The same numbers in eight bits."""
    image, text = dataset.image_column(64), dataset.text_column()
    null = dataset.read_null(text)
    static = channel_scale(np.concatenate([null["states"][None], null["states"][None]]))
    image_spec = replace(image.spec, storage_dtype="int8", quantization={"bits": 8})
    text_spec = replace(text.spec, storage_dtype="int8", quantization={"bits": 8})
    for column, spec in ((image, image_spec), (text, text_spec)):
        for shard in [*column.shards, *([NULL] if column is text else [])]:
            arrays = {n: np.array(a) for n, a in map_arrays(column.path_of(shard)).items()}
            if shard == NULL:
                arrays["channel_scale"] = static
            elif column is image:
                if len(arrays["moments"]):
                    values, scale = quantize_latents(arrays["moments"])
                else:
                    values, scale = np.empty((0, 8, 8, 8), np.int8), np.empty((0, 8), np.float32)
                arrays |= {"moments": values, "scale": scale}
            else:
                values, scale = quantize_states(arrays["states"], static)
                arrays |= {"states": values, "scale": scale}
            commit_as(column.path_of(shard), spec, arrays)
    return reopened(dataset, image, text)


def as_ids(dataset: Dataset) -> Dataset:
    """The same captions as token ids alone."""
    text = dataset.text_column()
    spec = replace(text.spec, storage_dtype="none")
    for shard in [*text.shards, NULL]:
        arrays = {n: np.array(a) for n, a in map_arrays(text.path_of(shard)).items()}
        del arrays["states"]
        commit_as(text.path_of(shard), spec, arrays)
    return reopened(dataset, text)


def commit_as(path: Path, spec: Any, arrays: dict[str, np.ndarray]) -> None:
    if "checksum" in arrays:
        arrays["checksum"] = row_checksums([arrays[name] for name in spec.row_arrays])
    fields = vars(read_receipt(path.with_suffix(".json"))) | {"column": spec.to_json()}
    commit(
        path.parent.parent / spec.column_id / path.name,
        lambda file: save_arrays(file, arrays),
        lambda written: Receipt(**{**fields, **written}),
    )


def reopened(dataset: Dataset, *without: Any) -> Dataset:
    for column in without:
        shutil.rmtree(dataset.path / column.column_id)
    write_manifest(dataset.path)
    assert problems(dataset.path) == []
    return Dataset(dataset.path)


KINDS: dict[str, tuple[Callable[[Dataset], Dataset], str, str]] = {
    "moments": (lambda dataset: dataset, "image", "moments"),
    "int8 moments": (as_int8, "image", "moments"),
    "scales of int8 moments": (as_int8, "image", "scale"),
    "states": (lambda dataset: dataset, "text", "states"),
    "int8 states": (as_int8, "text", "states"),
    "scales of int8 states": (as_int8, "text", "scale"),
    "token ids alone": (as_ids, "text", "input_ids"),
    "checksums": (lambda dataset: dataset, "image", "checksum"),
    "checksums of texts": (lambda dataset: dataset, "text", "checksum"),
}


@pytest.mark.parametrize(("convert", "column", "array"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("mask", [0x01, 0x80])
def test_a_corrupt_byte_is_refused_where_its_row_is_read_and_disturbs_no_other(
    dataset, convert, column, array, mask
):
    opened = convert(dataset)
    is_image = column == "image"
    folder = opened.image_column(64) if is_image else opened.text_column()
    path = folder.path_of("00002")
    row, row_bytes = 1, map_arrays(path)[array][0].nbytes
    place = offset_of(path, array) + row * row_bytes + row_bytes // 2
    path.write_bytes(flipped(path.read_bytes(), place, mask))

    image = opened.image_column(64).map_shard("00002")
    text = opened.text_column().map_shard("00002")
    captions = text["caption"][image["row"]].tolist()
    reader = reader_of(Dataset(dataset.path))
    refused = read = 0
    for step in range(sum(LENGTHS)):
        (shard,), (image_row,) = reader.order.locate(step, range(1))
        hit = shard == 2 and (image_row if is_image else captions[image_row]) == row
        if hit:
            with pytest.raises(CorruptFileError) as error:
                reader.gather(step, range(1))
            assert str(error.value) == (
                f"{path}: row {row} does not match its checksum. Remedy: python -m shards repair "
                f"{dataset.path}, then the same precompute again"
            )
            refused += 1
        else:
            reader.gather(step, range(1))
            read += 1
    assert refused >= 1
    assert read >= 10
    found = problems(dataset.path)
    assert any(line.startswith(f"{path}: ") for line in found)


@pytest.mark.parametrize("column", ["image", "text"])
def test_a_corrupt_header_or_length_is_refused_by_the_reader_by_name(dataset, column):
    folder = dataset.image_column(64) if column == "image" else dataset.text_column()
    path = folder.path_of("00002")
    whole = path.read_bytes()
    cut = [whole[:-1], whole[:100], whole[:4], b"", whole + b"\0"]
    other_header = [flipped(whole, 0), flipped(whole, 7), whole.replace(b"F16", b"F32", 1)]
    other_header += [whole.replace(b"checksum", b"chacksum", 1), flipped(whole, 8, 0x01)]
    for data in (*cut, *other_header):
        assert data != whole
        path.write_bytes(data)
        with pytest.raises(CorruptFileError, match=re.escape(str(path))) as error:
            read_everything(Dataset(dataset.path))
        assert f"python -m shards repair {dataset.path}" in str(error.value)
    path.unlink()
    with pytest.raises(CorruptFileError, match=re.escape(f"{path}: is missing")):
        read_everything(Dataset(dataset.path))


def test_no_corrupt_byte_of_any_shard_reaches_a_batch(dataset):
    """Every byte of the row arrays and every bit of the indices: refused, or of no effect."""
    rng = np.random.default_rng(1)
    wanted = [reader_of(dataset).gather(step, range(1)) for step in range(sum(LENGTHS))]
    changed = 0
    for column in (dataset.image_column(64), dataset.text_column()):
        path = column.path_of("00002")
        whole = path.read_bytes()
        for place in rng.integers(0, len(whole), 60).tolist():
            path.write_bytes(flipped(whole, place, 1 << int(rng.integers(0, 8))))
            reader = reader_of(Dataset(dataset.path))
            for step, batch in enumerate(wanted):
                try:
                    found = reader.gather(step, range(1))
                except CorruptFileError:
                    changed += 1
                    continue
                assert found.moments.tobytes() == batch.moments.tobytes(), (path, place)
                assert found.states.tobytes() == batch.states.tobytes(), (path, place)
        path.write_bytes(whole)
    assert changed >= 60


@pytest.mark.parametrize(("column", "array"), [("image", "row"), ("text", "caption")])
def test_a_corrupt_index_never_gives_an_image_the_caption_of_another(dataset, column, array):
    """The lowest bit of an index: it still points somewhere, at a neighbour."""
    wanted = [reader_of(dataset).gather(step, range(1)) for step in range(sum(LENGTHS))]
    path = (dataset.image_column(64) if column == "image" else dataset.text_column()).path_of(
        "00002"
    )
    whole, start = path.read_bytes(), offset_of(path, array)
    refused = 0
    for entry in range(len(map_arrays(path)[array])):
        path.write_bytes(flipped(whole, start + 4 * entry, 0x01))
        reader = reader_of(Dataset(dataset.path))
        for step, batch in enumerate(wanted):
            try:
                found = reader.gather(step, range(1))
            except CorruptFileError:
                refused += 1
                continue
            assert found.states.tobytes() == batch.states.tobytes(), f"{array} {entry}"
    assert refused


@pytest.mark.parametrize("array", ["states", "input_ids"])
def test_a_corrupt_empty_caption_is_found_by_verify(dataset, array):
    path = dataset.text_column().path_of(NULL)
    whole = path.read_bytes()
    path.write_bytes(flipped(whole, offset_of(path, array) + 3))
    (line,) = problems(dataset.path)
    assert line.startswith(f"{path}: ")


def test_a_corrupt_empty_caption_is_refused_by_the_reader(dataset):
    path = dataset.text_column().path_of(NULL)
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:20], whole.replace(b"states", b"stotes", 1)):
        path.write_bytes(data)
        with pytest.raises(CorruptFileError, match=re.escape(str(path))):
            reader_of(Dataset(dataset.path))


def test_corrupt_numbers_of_the_empty_caption_are_refused_by_the_reader(dataset):
    """It stands in for every caption that is dropped: a tenth of all samples."""
    path = dataset.text_column().path_of(NULL)
    whole = path.read_bytes()
    path.write_bytes(flipped(whole, offset_of(path, "states") + 3, 0x40))
    with pytest.raises(CorruptFileError, match=re.escape(str(path))):
        reader_of(Dataset(dataset.path))


# Other versions.


def test_another_version_of_a_receipt_is_refused_and_not_set_aside_as_corrupt(dataset, monkeypatch):
    path = dataset.image_column(64).path_of("00002")
    receipt = read_receipt(path.with_suffix(".json"))
    with monkeypatch.context() as patch:
        patch.setattr("shards.receipt.FORMAT_VERSION", 2)
        rewrite_receipt(path, receipt)
    before = {file: file.read_bytes() for file in files_of(dataset.path)}
    (line,) = problems(dataset.path)
    assert line.startswith(f"{path.with_suffix('.json')}: format version 2; wanted version 1")
    with pytest.raises(DatasetError, match="format version 2; wanted version 1"):
        repair(dataset.path)
    assert {file: file.read_bytes() for file in files_of(dataset.path)} == before
    assert not (dataset.path.parent / "latents.aside").exists()


def test_another_version_of_the_manifest_is_refused_and_not_taken_for_corrupt(dataset):
    path = dataset.path / "dataset.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format_version": 2}))
    with pytest.raises(DatasetError, match=r"dataset\.json: format version 2; wanted version 1"):
        Dataset(dataset.path)
    assert any(line.startswith(f"{path}: ") for line in problems(dataset.path))


def test_another_version_of_a_column_is_refused_and_not_taken_for_corrupt(dataset):
    path = dataset.path / "dataset.json"
    manifest = json.loads(path.read_text())
    column = dataset.image_column(64).column_id
    manifest["columns"][column]["spec"]["format_version"] = 2
    path.write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match=r"dataset\.json: format version 2; wanted version 1"):
        Dataset(dataset.path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format_version": 1}', "\0" * 100])
def test_a_corrupt_manifest_is_refused_and_index_rebuilds_it(dataset, text):
    path = dataset.path / "dataset.json"
    whole = path.read_bytes()
    path.write_text(text)
    with pytest.raises(CorruptFileError, match=r"dataset\.json: not a manifest .*shards index"):
        Dataset(dataset.path)
    write_manifest(dataset.path)
    assert path.read_bytes() == whole


# What does not fit, and what is not finite.


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"in_channels": 16, "cross_attention_dim": 8}, "latents of 4 channels .* wanted 16"),
        ({"in_channels": 4, "cross_attention_dim": 1024}, "states of width 8 .* wanted 1024"),
    ],
)
def test_a_column_of_another_encoder_is_refused_like_a_corrupt_one(dataset, config, text):
    columns = dataset.image_column(64), dataset.text_column()
    check_fits({"in_channels": 4, "cross_attention_dim": 8}, *columns)
    with pytest.raises(DatasetError, match=f"{text}.*Remedy: "):
        check_fits(config, *columns)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of four and three pictures."""
    folder = tmp_path_factory.mktemp("few-images")
    rng = np.random.default_rng(0)
    for shard, keys in (("00000", "abcd"), ("00001", "fgh")):
        members: list[tuple[str, bytes]] = []
        for key in keys:
            image = image_bytes(smooth_image(rng, 48, 44))
            members += sample_members(key, image, f"a lion {key}")
        write_tar(folder / f"{shard}.tar", members)
    return folder


@pytest.fixture
def job(images: Path, model_folder: Path, tmp_path: Path) -> PrecomputeConfig:
    return PrecomputeConfig(
        shards=f"{images}/*.tar",
        out=str(tmp_path / "out"),
        model=str(model_folder),
        resolutions="32",
        batch_size=2,
        device="cpu",
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("latents", ["moments", "mean", "moments-int8", "mean-int8"])
def test_corrupt_numbers_of_a_vae_are_never_written_in_any_storage(
    job, tmp_path, monkeypatch, value, latents
):
    """The log-variance counts too where it is not stored: the sample is not what it should be."""
    from diffusers import AutoencoderKL

    encode = AutoencoderKL.encode
    calls = []

    def poisoned(self: AutoencoderKL, x: Any, *args: Any) -> Any:
        encoded = encode(self, x, *args)
        calls.append(len(x))
        encoded.latent_dist.parameters[-1, 0, 0, 0] = value
        return encoded

    monkeypatch.setattr(AutoencoderKL, "encode", poisoned)
    manifest = precompute(replace(job, latents=latents))
    assert calls
    (entry,) = (e for e in manifest["columns"].values() if e["spec"]["kind"] == "image")
    assert entry["absent"]["not_finite"] >= 2
    assert sum(s["rows"] for s in entry["shards"].values()) + entry["absent"]["not_finite"] == 7
    for path in (tmp_path / "out").glob("m*/*.safetensors"):
        for array in map_arrays(path).values():
            assert np.isfinite(array).all()
    for path in (tmp_path / "out").glob("m*/*.json"):
        assert all(math.isfinite(number) for number in read_receipt(path).stats.values())
    assert problems(tmp_path / "out") == []


# Repair.

REPAIRS = {
    "image data": "moments-*/00000.safetensors",
    "image data of another shard": "moments-*/00001.safetensors",
    "text data": "text-*/00001.safetensors",
    "ledger": "ledger/00000.parquet",
    "null": "text-*/null.safetensors",
    "receipt of image data": "moments-*/00000.json",
    "receipt of text data": "text-*/00000.json",
    "receipt of the ledger": "ledger/00001.json",
    "receipt of null": "text-*/null.json",
    "dataset.json": "dataset.json",
}
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "flipped": lambda data: flipped(data, len(data) // 2),
    "cut": lambda data: data[:-3],
    "longer": lambda data: data + b"\0",
    "gone": lambda data: None,
}


@pytest.fixture(scope="module")
def made(
    images: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PrecomputeConfig, Path]:
    """A dataset, and the job that made it."""
    out = tmp_path_factory.mktemp("made") / "out"
    config = PrecomputeConfig(
        shards=f"{images}/*.tar",
        out=str(out),
        model=str(model_folder),
        resolutions="32",
        batch_size=2,
        device="cpu",
    )
    precompute(config)
    return config, out


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("pattern", REPAIRS.values(), ids=REPAIRS)
def test_a_corrupt_file_is_set_aside_and_made_again_and_nothing_else(
    tmp_path, made, pattern, damage
):
    config, original = made
    out = shutil.copytree(original, tmp_path / "out")
    job = replace(config, out=str(out))
    before = contents(out)
    (path,) = out.glob(pattern)
    damaged = damage(path.read_bytes())
    if damaged is None:
        path.unlink()
    else:
        path.write_bytes(damaged)
    ages = {file: file.stat().st_mtime_ns for file in files_of(out)}
    pair = {f"{path.relative_to(out).with_suffix('')}.{end}" for end in ("json", *DATA_ENDS)}

    done = repair(out)

    assert any(str(problem).startswith(str(path.with_suffix(""))) for problem in done.problems)
    is_manifest = path.name == "dataset.json"
    if is_manifest:
        assert (done.aside, done.moved) == (None, [])
    elif damaged is None and path.suffix == ".json":
        assert done.moved == []  # without a receipt the file does not count: it is overwritten
    else:
        assert done.aside is not None
        assert done.aside.parent == tmp_path / "out.aside"
        assert {str(file.relative_to(out)) for file in done.moved} <= pair
        if damaged is not None:
            assert (done.aside / path.relative_to(out)).read_bytes() == damaged
    precompute(job)
    assert contents(out) == before
    assert problems(out) == []
    again = {str(f.relative_to(out)) for f in files_of(out) if ages.get(f) != f.stat().st_mtime_ns}
    assert again <= pair | {"dataset.json"}
    assert is_manifest or str(path.relative_to(out)) in again
    assert repair(out).problems == []


DATA_ENDS = ("safetensors", "parquet")


def test_many_corrupt_files_at_once_are_all_made_again(tmp_path, made):
    config, original = made
    out = shutil.copytree(original, tmp_path / "out")
    before = contents(out)
    for pattern in REPAIRS.values():
        (path,) = out.glob(pattern)
        path.write_bytes(flipped(path.read_bytes(), 20))
    repair(out)
    precompute(replace(config, out=str(out)))
    assert contents(out) == before
    assert problems(out) == []


def test_a_repair_of_what_is_not_corrupt_moves_nothing(tmp_path, made):
    _, original = made
    out = shutil.copytree(original, tmp_path / "out")
    ages = {file: file.stat().st_mtime_ns for file in files_of(out)}
    done = repair(out)
    assert (done.problems, done.aside, done.moved) == ([], None, [])
    assert {file: file.stat().st_mtime_ns for file in files_of(out)} == ages
    assert not (tmp_path / "out.aside").exists()
