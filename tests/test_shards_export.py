"""What is exported is what the dataset holds, as the formats' own readers read it."""

import hashlib
import itertools
import json
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import (
    REPOSITORY,
    TINY_MODEL,
    image_bytes,
    sample_members,
    smooth_image,
    status_of,
    write_tar,
)
from helpers_s3 import S3, running_s3

from shards.arrays import save_arrays
from shards.dataset import Dataset
from shards.errors import DatasetError, UserError
from shards.export import FORMATS, export
from shards.ledger import read_ledger
from shards.mds import MAX_SHARD_BYTES, MdsShard
from shards.storage import list_files, location, read_bytes, write_whole
from shards.verify import iter_problems

CAPTIONS = [
    "two lines\nand a third\r\n\tindented",
    "日本の庭園 — ünïcode ❤ \u202e gnir \U0001f600",
    "a.b.c",
    "null",
    '"quoted", \\escaped\\ {json}',
    "0",
]
BUCKET = "export"  # servers of one process share their buckets
# Neighbours of one key are one sample, and unusable; the last repeats a key, and is dropped.
ODD_KEYS = ["000", "000", "a b", "../up", "x/y", "ключ", "__meta", "-", "100% & e=mc²", "000"]


@pytest.fixture(scope="module")
def odd_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of odd names, with odd and repeated keys, odd captions, a broken and a small image."""
    folder = tmp_path_factory.mktemp("odd")
    rng = np.random.default_rng(0)
    captions = itertools.cycle(CAPTIONS)
    for shard in ("00000", "part-1 of two"):
        members: list[tuple[str, bytes]] = []
        for number, key in enumerate(ODD_KEYS):
            side = 40 if number == 5 else 72
            data = image_bytes(smooth_image(rng, side, 72))
            members += sample_members(
                key, b"broken" if number == 2 else data, next(captions), {"width": 72}
            )
        write_tar(folder / f"{shard}.tar", members)
    return folder


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory, odd_images: Path) -> Callable[..., Path]:
    """`odd(latents, text)`: those shards, stored in some way."""
    from precompute.config import PrecomputeConfig
    from precompute.job import precompute

    made: dict[tuple[str, str], Path] = {}

    def make(latents: str = "moments", text: str = "fp16") -> Path:
        if (latents, text) not in made:
            out = tmp_path_factory.mktemp("latents") / "latents"
            settings: dict[str, Any] = {"latents": latents, "text": text, "resolutions": "32,64"}
            settings |= {"model": str(TINY_MODEL), "device": "cpu"}
            precompute(PrecomputeConfig(shards=f"{odd_images}/*.tar", out=str(out), **settings))
            made[latents, text] = out
        return made[latents, text]

    return make


@pytest.fixture
def small(tmp_path: Path, make_latent_dataset: Callable[..., Dataset]) -> Dataset:
    settings = {"num_tokens": 5, "dim": 8, "dropped": 2, "too_small": 1}
    return make_latent_dataset(tmp_path / "small", [5, 0, 3], resolutions=(32,), **settings)


def exported(dataset: Dataset, out: Path, file_format: str, resolution: int = 32) -> Any:
    image = dataset.image_column(resolution)
    return export(dataset, image, dataset.text_column(), out, file_format)


def expected_samples(dataset: Dataset, resolution: int) -> list[dict[str, Any]]:
    """Every sample from the dataset's own arrays, int8 multiplied out here."""
    image, text = dataset.image_column(resolution), dataset.text_column()
    null, samples = dataset.read_null(text), []
    for shard in sorted(image.shards):
        latents, captions = image.map_shard(shard), text.map_shard(shard)
        names = ["key", "caption", "url", "width", "height", "sha256", "status"]
        ledger = read_ledger(dataset.path / "ledger" / f"{shard}.parquet", names)
        for at, row in enumerate(latents["row"].tolist()):
            numbers = latents[image.spec.latents][at]
            if image.spec.storage_dtype == "int8":
                numbers = numbers * latents["scale"][at].astype(np.float64)[:, None, None]
            caption = captions["caption"][row]
            if not text.spec.has_states:
                name, stored = "input_ids", captions["input_ids"][caption]
            else:
                name, stored = "states", captions["states"][caption]
                if text.spec.storage_dtype == "int8":
                    scale = captions["scale"][caption].astype(np.float64)[:, None]
                    stored = stored * scale * null["channel_scale"]
            assert ledger[row].pop("status") == "ok"
            samples.append(
                {
                    image.spec.latents: numbers.astype(np.float16),
                    name: stored.astype("uint16" if name == "input_ids" else "float16"),
                    "caption": ledger[row]["caption"],
                    "row": {"row": row, "shard": shard, **ledger[row]},
                }
            )
    return samples


def assert_same_array(found: np.ndarray, wanted: np.ndarray, exact: bool) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    if exact:
        assert found.tobytes() == wanted.tobytes()
    else:  # float32 against float64, rounded to float16
        np.testing.assert_allclose(
            found.astype(np.float64), wanted.astype(np.float64), rtol=1e-3, atol=1e-7
        )


# webdataset ---------------------------------------------------------------------------------------


def read_webdataset(out: Path) -> list[dict[str, Any]]:
    import webdataset as wds

    urls = sorted(str(path) for path in out.glob("*.tar"))
    return list(wds.WebDataset(urls, shardshuffle=False, empty_check=False).decode())


@pytest.mark.parametrize(
    ("latents", "text"),
    [("moments", "fp16"), ("mean", "ids"), ("moments-int8", "int8"), ("mean-int8", "ids")],
)
@pytest.mark.parametrize("resolution", [32, 64])
def test_webdatasets_own_reader_gives_what_the_dataset_holds(
    odd, tmp_path, latents, text, resolution
):
    dataset = Dataset(odd(latents, text))
    settings = exported(dataset, tmp_path / "out", "webdataset", resolution)
    wanted = expected_samples(dataset, resolution)
    found = read_webdataset(tmp_path / "out")
    assert settings["rows"] == len(wanted) == (12 if resolution == 32 else 10)
    assert len(found) == len(wanted)
    assert len({sample["__key__"] for sample in found}) == len(found)
    for sample, expected in zip(found, wanted, strict=True):
        arrays = {name for name in expected if name not in ("caption", "row")}
        fields = {name for name in sample if not name.startswith("__")}
        assert fields == {f"{name}.npy" for name in arrays} | {"txt", "json"}
        assert sample["txt"] == expected["caption"]
        assert sample["json"] == expected["row"]
        for name in arrays:
            assert_same_array(sample[f"{name}.npy"], expected[name], "int8" not in latents + text)


def test_a_tar_holds_each_member_once_and_no_way_out_of_its_folder(odd, tmp_path):
    exported(Dataset(odd()), tmp_path / "out", "webdataset")
    for path in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(path) as tar:
            names = tar.getnames()
        assert len(set(names)) == len(names) == 6 * 4
        assert not any("/" in name or name.startswith(("_", ".")) for name in names)


def test_shards_with_dots_in_their_names_lose_no_sample(odd_images, tmp_path):
    """To webdataset a key ends at its first dot, and samples of one key are one sample."""
    from precompute.config import PrecomputeConfig
    from precompute.job import precompute

    (tmp_path / "images").mkdir()
    for name in ("laion.part-0", "laion.part-1"):
        shutil.copy(odd_images / "00000.tar", tmp_path / "images" / f"{name}.tar")
    precompute(
        PrecomputeConfig(
            shards=f"{tmp_path}/images/*.tar",
            out=str(tmp_path / "latents"),
            model=str(TINY_MODEL),
            resolutions="32",
            device="cpu",
        )
    )
    dataset = Dataset(tmp_path / "latents")
    exported(dataset, tmp_path / "out", "webdataset")
    found, wanted = read_webdataset(tmp_path / "out"), expected_samples(dataset, 32)
    assert len(found) == len(wanted) == 12
    assert len({sample["__key__"] for sample in found}) == 12
    for sample, expected in zip(found, wanted, strict=True):
        assert sample["json"] == expected["row"]
        assert sample["moments.npy"].tobytes() == expected["moments"].tobytes()


def test_one_tar_for_each_shard_that_has_rows(small, tmp_path):
    exported(small, tmp_path / "out", "webdataset")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "00000.tar",
        "00002.tar",
        "export.json",
    ]


@pytest.mark.parametrize("file_format", FORMATS)
def test_two_exports_are_equal_to_the_byte(small, tmp_path, file_format):
    for name in ("one", "two"):
        exported(small, tmp_path / name, file_format)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("file_format", FORMATS)
def test_an_export_that_lost_a_file_or_was_killed_is_finished_by_the_same_command(
    small, tmp_path, file_format
):
    out = tmp_path / "out"
    exported(small, out, file_format)
    before = contents(out)
    for name in before:
        (out / name).unlink()
        suffix = {"webdataset": "tar", "mds": "mds"}[file_format]
        (out / f"00000.{suffix}.partial").write_bytes(b"half a file")
        exported(small, out, file_format)
        (out / f"00000.{suffix}.partial").unlink(missing_ok=True)
        assert contents(out) == before, name


def test_only_the_missing_tar_is_written_again(small, tmp_path):
    out = tmp_path / "out"
    exported(small, out, "webdataset")
    (out / "00000.tar").unlink()
    age = (out / "00002.tar").stat().st_mtime_ns
    exported(small, out, "webdataset")
    assert (out / "00002.tar").stat().st_mtime_ns == age
    assert (out / "00000.tar").exists()


@pytest.mark.parametrize("file_format", FORMATS)
def test_another_export_in_the_same_folder_is_refused_and_touches_nothing(
    odd, tmp_path, capsys, file_format
):
    dataset, out = odd(), tmp_path / "out"
    flags = ["--format", file_format, "--resolution", "32"]
    assert status_of("export", dataset, out, *flags) == 0
    before = contents(out)
    other_format = FORMATS[1 - FORMATS.index(file_format)]
    others = [
        [dataset, out, "--format", other_format, "--resolution", "32"],
        [dataset, out, "--format", file_format, "--resolution", "64"],
        [odd("mean", "ids"), out, "--format", file_format, "--resolution", "32"],
    ]
    for other in others:
        capsys.readouterr()
        assert status_of("export", *other) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err == (
            f"shards export: error: {out}: holds another export. Remedy: name an empty folder\n"
        )
        assert contents(out) == before
    assert status_of("export", dataset, out, *flags) == 0


def test_the_settings_say_all_that_another_trainer_must_do(odd, tmp_path):
    dataset = Dataset(odd("moments-int8", "int8"))
    settings = exported(dataset, tmp_path / "out", "webdataset")
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == settings
    image = dataset.image_column(32)
    assert settings["scaling_factor"] == image.spec.scaling_factor
    assert settings["latents"] == "moments"
    assert settings["model"] == image.model
    assert (settings["image_column"], settings["text_column"]) == (
        image.column_id,
        dataset.text_column().column_id,
    )
    assert settings["format"] == "webdataset"


def test_the_settings_do_not_tell_others_to_sample_where_there_is_only_a_mean(odd, tmp_path):
    settings = exported(Dataset(odd("mean", "ids")), tmp_path / "out", "webdataset")
    assert "from the moments" not in settings["to_train"]


def test_progress_counts_every_row_once(small, tmp_path):
    seen: list[int] = []
    export(small, small.image_column(32), small.text_column(), tmp_path / "o", "mds", seen.append)
    assert sum(seen) == 8


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_dataset_that_is_not_complete_is_refused_before_anything_is_written(
    small, tmp_path, file_format
):
    column = small.image_column(32).column_id
    for path in (small.path / column).glob("00002.*"):
        path.unlink()
    assert status_of("index", small.path) == 0
    with pytest.raises(DatasetError, match="shards missing"):
        exported(Dataset(small.path), tmp_path / "out", file_format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("name", ["moments", "text"])
def test_a_damaged_row_is_never_exported(small, tmp_path, capsys, file_format, name):
    """The bytes go out into files that have no checksum of ours."""
    (path,) = small.path.glob(f"{name}-*/00000.safetensors")
    data = bytearray(path.read_bytes())
    data[-200 if name == "moments" else -100] ^= 64
    path.write_bytes(data)
    assert list(iter_problems(small.path, full=True))
    assert status_of("export", small.path, tmp_path / "out", "--format", file_format) == 2
    assert str(path) in capsys.readouterr().err


# MDS ----------------------------------------------------------------------------------------------


def parse_mds(out: Path) -> list[dict[str, Any]]:
    """A reader from the format's description, as far as strings and static arrays go."""
    index = json.loads((out / "index.json").read_text())
    assert index["version"] == 2
    samples = []
    for entry in index["shards"]:
        assert (entry["format"], entry["version"]) == ("mds", 2)
        assert entry["zip_data"] is None
        assert entry["compression"] is None
        data = (out / entry["raw_data"]["basename"]).read_bytes()
        assert entry["raw_data"]["bytes"] == len(data)
        (count,) = struct.unpack_from("<I", data, 0)
        assert count == entry["samples"]
        offsets = struct.unpack_from(f"<{count + 1}I", data, 4)
        assert offsets[-1] == len(data)
        header = json.loads(data[4 + 4 * (count + 1) : offsets[0]])
        names, encodings = entry["column_names"], entry["column_encodings"]
        assert header["column_names"] == names == sorted(names)
        assert header["column_encodings"] == encodings
        assert header["column_sizes"] == entry["column_sizes"]
        for begin, end in itertools.pairwise(offsets):
            samples.append(_parse_sample(data[begin:end], names, encodings, entry["column_sizes"]))
    return samples


def _parse_sample(
    data: bytes, names: list[str], encodings: list[str], sizes: list[int | None]
) -> dict[str, Any]:
    lengths, at = [], 0
    for size in sizes:
        if size is None:
            lengths.append(struct.unpack_from("<I", data, at)[0])
            at += 4
        else:
            lengths.append(size)
    sample: dict[str, Any] = {}
    for name, encoding, length in zip(names, encodings, lengths, strict=True):
        part = data[at : at + length]
        at += length
        if encoding == "str":
            sample[name] = part.decode("utf-8")
        else:
            kind, dtype, shape = encoding.split(":")
            assert kind == "ndarray"
            sides = [int(side) for side in shape.split(",")]
            sample[name] = np.frombuffer(part, dtype).reshape(sides)
    assert at == len(data)
    return sample


@pytest.mark.parametrize(
    ("latents", "text"), [("moments", "fp16"), ("mean", "ids"), ("moments-int8", "int8")]
)
def test_mds_by_an_independent_parser_is_what_the_dataset_holds(odd, tmp_path, latents, text):
    dataset = Dataset(odd(latents, text))
    exported(dataset, tmp_path / "out", "mds")
    wanted = expected_samples(dataset, 32)
    found = parse_mds(tmp_path / "out")
    assert len(found) == len(wanted)
    for sample, expected in zip(found, wanted, strict=True):
        arrays = {name for name in expected if name not in ("caption", "row")}
        assert sample.keys() == {*arrays, "caption", "ledger"}
        assert sample["caption"] == expected["caption"]
        assert json.loads(sample["ledger"]) == expected["row"]
        for name in arrays:
            assert_same_array(sample[name], expected[name], "int8" not in latents + text)


def test_mds_of_shards_without_rows_leaves_them_out(small, tmp_path):
    exported(small, tmp_path / "out", "mds")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [entry["samples"] for entry in index["shards"]] == [5, 3]
    assert len(parse_mds(tmp_path / "out")) == 8


def test_an_mds_shard_beyond_32_bit_offsets_is_refused(tmp_path, monkeypatch):
    assert MAX_SHARD_BYTES == 2**32 - 1
    monkeypatch.setattr("shards.mds.MAX_SHARD_BYTES", 1000)
    shard = MdsShard("x.mds")
    shard.add({"a": np.zeros(100, np.uint8)})
    shard.save(tmp_path / "x.mds")
    for _ in range(9):
        shard.add({"a": np.zeros(100, np.uint8)})
    with pytest.raises(UserError, match="wanted at most 1,000 in a shard"):
        shard.save(tmp_path / "y.mds")
    assert not (tmp_path / "y.mds").exists()


# Its vision data sets want a torchvision that fits torch; nothing here does.
READ_WITH_STREAMING = """
import json, sys
from types import ModuleType
sys.modules["streaming.vision"] = ModuleType("streaming.vision")
import numpy as np
from streaming import StreamingDataset
found = []
for sample in StreamingDataset(local=sys.argv[1], shuffle=False, batch_size=1):
    found.append({k: [v.dtype.name, list(v.shape), v.tobytes().hex()]
                  if isinstance(v, np.ndarray) else v for k, v in sample.items()})
print("SAMPLES" + json.dumps(found))
"""


@pytest.mark.parametrize(("latents", "text"), [("moments", "fp16"), ("mean-int8", "ids")])
def test_mosaics_own_reader_gives_what_the_dataset_holds(odd, tmp_path, latents, text):
    peers = REPOSITORY / ".venv-peers"
    if not (peers / "ready").exists():
        pytest.skip("mosaicml-streaming lives in an environment of its own: make peers")
    dataset = Dataset(odd(latents, text))
    exported(dataset, tmp_path / "out", "mds")
    done = subprocess.run(
        [peers / "bin" / "python", "-c", READ_WITH_STREAMING, tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.rpartition("SAMPLES")[2])
    wanted = expected_samples(dataset, 32)
    assert len(found) == len(wanted)
    by_row = {
        (row["shard"], row["row"]): sample
        for sample in found
        if (row := json.loads(sample["ledger"]))
    }
    for expected in wanted:
        sample = by_row[expected["row"]["shard"], expected["row"]["row"]]
        assert json.loads(sample["ledger"]) == expected["row"]
        assert sample["caption"] == expected["caption"]
        for name in expected.keys() - {"caption", "row"}:
            dtype, shape, data = sample[name]
            array = np.frombuffer(bytes.fromhex(data), dtype).reshape(shape)
            assert_same_array(array, expected[name], "int8" not in latents)


# The command --------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_command_exports_and_says_where_to_read_on(small, tmp_path, capsys, file_format):
    out = tmp_path / "out"
    assert status_of("export", small.path, out, "--format", file_format) == 0
    assert capsys.readouterr().out == f"{out}: 8 samples as {file_format}; see export.json\n"
    assert status_of("export", small.path, out, "--format", file_format, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((out / "export.json").read_text())


def test_the_default_format_is_webdataset(small, tmp_path):
    assert status_of("export", small.path, tmp_path / "out") == 0
    assert list((tmp_path / "out").glob("*.tar"))


def test_several_resolutions_want_a_choice(odd, tmp_path, capsys):
    assert status_of("export", odd(), tmp_path / "out") == 2
    line = capsys.readouterr().err
    assert "resolutions [32, 64]" in line
    assert "--resolution" in line
    assert line.count("\n") == 1
    assert status_of("export", odd(), tmp_path / "out", "--resolution", "48") == 2
    assert "wanted an image column at 48 px" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_several_columns_want_a_choice_by_id(odd, tmp_path, capsys):
    dataset = shutil.copytree(odd(), tmp_path / "latents")
    others = Dataset(odd("mean", "ids"))
    for column in others.columns:
        shutil.copytree(others.path / column, dataset / column)
    assert status_of("index", dataset) == 0
    capsys.readouterr()
    assert status_of("export", dataset, tmp_path / "out", "--resolution", "32") == 2
    assert "--image-column" in capsys.readouterr().err
    image, text = others.image_column(32).column_id, others.text_column().column_id
    flags = ["--resolution", "32", "--image-column", image, "--text-column", text]
    assert status_of("export", dataset, tmp_path / "out", *flags, "--json") == 0
    settings = json.loads(capsys.readouterr().out)
    assert (settings["image_column"], settings["text_column"]) == (image, text)


@pytest.mark.parametrize("where", ["nowhere", "a file"])
def test_no_dataset_is_one_line_and_nothing_is_written(tmp_path, capsys, where):
    if where == "a file":
        (tmp_path / where).write_text("x")
    assert status_of("export", tmp_path / where, tmp_path / "out") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_a_folder_is_one_line(small, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert status_of("export", small.path, tmp_path / "file") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("shards export: error: ")
    assert captured.err.count("\n") == 1


def test_a_null_file_that_is_gone_is_one_line(small, tmp_path, capsys):
    (path,) = small.path.glob("text-*/null.safetensors")
    save_arrays(path, {"input_ids": np.zeros(5, np.uint16)})
    assert status_of("export", small.path, tmp_path / "out") == 2
    assert str(path) in capsys.readouterr().err


# On an object store -------------------------------------------------------------------------------


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[S3]:
    with running_s3(BUCKET) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield server


def test_from_s3_to_s3_is_the_same_to_the_byte(s3, small, tmp_path, capsys):
    url = f"s3://{BUCKET}/latents"
    for path in small.path.rglob("*"):
        if path.is_file():
            place = location(url) / path.relative_to(small.path).as_posix()
            place.write_bytes(path.read_bytes())
    for file_format in FORMATS:
        here, there = tmp_path / file_format, f"s3://{BUCKET}/{file_format}"
        assert status_of("export", small.path, here, "--format", file_format) == 0
        for _ in range(2):  # the second finds all there
            assert status_of("export", url, there, "--format", file_format) == 0
        remote = location(there)
        assert sorted(list_files(remote)) == sorted(path.name for path in here.iterdir())
        for path in here.iterdir():
            assert read_bytes(remote / path.name) == path.read_bytes(), path.name
    assert status_of("export", url, f"s3://{BUCKET}/mds", "--format", "webdataset") == 2
    assert "holds another export" in capsys.readouterr().err


def test_a_remote_dataset_is_exported_through_the_cache_that_was_named(s3, small, tmp_path):
    folder = f"s3://{BUCKET}/named"
    for path in sorted(small.path.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            where = location(folder) / str(path.relative_to(small.path))
            write_whole(where, lambda file, data=data: file.write_bytes(data) and None)
    cache = tmp_path / "named-cache"
    assert status_of("export", folder, tmp_path / "out", "--cache-dir", cache) == 0
    assert list(cache.glob("*.safetensors"))
    too_small = ("--cache-dir", tmp_path / "tiny", "--cache-gib", "1e-7")
    assert status_of("export", folder, tmp_path / "other", *too_small) == 2
