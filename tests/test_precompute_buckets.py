"""Aspect-ratio buckets from the crop to every command that reads a dataset."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import image_bytes, sample_members, smooth_image, status_of, write_tar

from precompute.config import PrecomputeConfig
from precompute.job import precompute
from precompute.transform import Crop, build_buckets
from shards.arrays import map_arrays
from shards.checksum import row_checksums
from shards.dataset import Column, Dataset
from shards.errors import DatasetError, UserError
from shards.export import export
from shards.info import describe
from shards.receipt import read_receipt
from shards.repair import repair
from shards.verify import iter_problems

BUCKETS = build_buckets(64, 16)
# Of two shards; the second has nothing but squares, so most of its buckets have no rows.
SIZES = {
    "00000": [(64, 64), (150, 80), (80, 150), (70, 90), (300, 200), (65, 64), (20, 20), (90, 70)],
    "00001": [(64, 64), (100, 100), (65, 66)],
}
SETTINGS = [{"latents": "moments"}, {"latents": "moments-int8", "flip": True}, {"latents": "mean"}]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for shard, sizes in SIZES.items():
        members: list[tuple[str, bytes]] = []
        for number, size in enumerate(sizes):
            members += sample_members(f"{number}", image_bytes(smooth_image(rng, *size)), "a lion")
        write_tar(folder / f"{shard}.tar", members)
    return folder


def run(out: Path, images: Path, model: Path, **options: Any) -> Dataset:
    settings: dict[str, Any] = {"resolutions": "64", "bucket_step": 16, "device": "cpu"}
    settings |= {"batch_size": 2, "max_drop_frac": 1.0, **options}
    shards = f"{images}/*.tar"
    precompute(PrecomputeConfig(shards=shards, out=str(out), model=str(model), **settings))
    return Dataset(out)


def buckets_of(dataset: Dataset) -> Column[Any]:
    """Its bucketed column that is not flipped."""
    (found,) = (c for c in dataset.columns.values() if "-buckets" in c.column_id)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Data files, and receipts without what a clock says."""
    found = {}
    for path in folder.glob("*/*"):
        data = path.read_bytes()
        if path.suffix == ".json":
            data = json.dumps({**json.loads(data), "timings": None}).encode()
        found[str(path.relative_to(folder))] = data
    return found


# Which buckets there are, and which one an image goes to.


@pytest.mark.parametrize(
    ("resolution", "step"), [(64, 8), (64, 16), (512, 64), (1024, 64), (96, 40)]
)
def test_no_bucket_is_larger_than_the_square_or_longer_than_two_to_one(resolution, step):
    buckets = build_buckets(resolution, step)
    assert len({tuple(bucket) for bucket in buckets}) == len(buckets)
    assert [h for h, _ in buckets] == sorted({h for h, _ in buckets})
    for height, width in buckets:
        assert height % step == width % step == 0
        assert height * width <= resolution**2
        assert max(height, width) <= 2 * min(height, width)
        assert height * (width + step) > resolution**2 or width + step > 2 * height
    if resolution % step == 0:
        assert [resolution, resolution] in buckets


def test_an_image_goes_to_the_bucket_of_the_nearest_aspect_ratio():
    sizes = tuple((height, width) for height, width in build_buckets(512, 64))
    crop = Crop(sizes)
    for width, height in itertools.product(range(600, 3000, 97), repeat=2):
        placement = crop.place(width, height)
        assert placement is not None
        distances = [abs(math.log(w / h * height / width)) for h, w in sizes]
        assert distances[placement.bucket] == pytest.approx(min(distances))
    for number, (height, width) in enumerate(sizes):  # an image of a bucket's own shape
        placement = crop.place(width, height)
        assert placement is not None
        assert (placement.bucket, placement.height, placement.width) == (number, height, width)
        assert crop.place(width - 1, height - 1) is None


@pytest.mark.parametrize("step", [1, 12, 100])
def test_a_step_that_the_vae_cannot_encode_is_refused(tmp_path, images, model_folder, step):
    with pytest.raises(UserError, match=r"--bucket-step: .*wanted a multiple of 8"):
        run(tmp_path / "out", images, model_folder, bucket_step=step)
    assert not (tmp_path / "out").exists()


def test_a_step_larger_than_any_bucket_is_refused(tmp_path, images, model_folder):
    with pytest.raises(UserError, match="--bucket-step"):
        run(tmp_path / "out", images, model_folder, bucket_step=128)
    assert not (tmp_path / "out").exists()


# What is stored.


@pytest.fixture(scope="module", params=SETTINGS, ids=str)
def dataset(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    images: Path,
    model_folder: Path,
) -> Dataset:
    return run(tmp_path_factory.mktemp("out") / "latents", images, model_folder, **request.param)


def test_rows_are_bucket_major_as_the_format_says(dataset):
    crop = Crop(tuple((height, width) for height, width in BUCKETS))
    for column in dataset.columns.values():
        if column.spec.kind != "image":
            continue
        for shard, sizes in SIZES.items():
            arrays = map_arrays(column.path_of(shard))
            placed = [crop.place(*size) for size in sizes]
            wanted: list[list[int]] = [[] for _ in BUCKETS]
            for row, placement in enumerate(placed):
                if placement:
                    wanted[placement.bucket].append(row)
            assert arrays["row"].tolist() == list(itertools.chain(*wanted))
            sums = []
            for (height, width), rows in zip(BUCKETS, wanted, strict=True):
                suffix = f".{height // 8}x{width // 8}"
                latents = arrays[f"{column.spec.latents}{suffix}"]
                channels = 4 if column.spec.latents == "mean" else 8
                assert latents.shape == (len(rows), channels, height // 8, width // 8)
                group = [latents]
                if column.spec.storage_dtype == "int8":
                    group.append(arrays[f"scale{suffix}"])
                    assert group[1].shape == (len(rows), channels)
                sums.append(row_checksums(group))
            assert np.array_equal(arrays["checksum"], np.concatenate(sums))
            receipt = read_receipt(column.path_of(shard).with_suffix(".json"))
            counts = [len(rows) for rows in wanted]
            assert list(receipt.stats["buckets"].values()) == counts
            assert receipt.rows == sum(counts)
            assert receipt.absent == ({"too_small": placed.count(None)} if None in placed else {})


def test_a_shard_may_leave_buckets_empty(dataset):
    column = next(c for c in dataset.columns.values() if "-buckets" in c.column_id)
    counts = read_receipt(column.path_of("00001").with_suffix(".json")).stats["buckets"]
    assert counts["64x64"] == 3
    assert sum(counts.values()) == 3
    assert list(iter_problems(dataset.path, full=True)) == []


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_verify_info_repair_and_decode_work_on_buckets(
    tmp_path, images, model_folder, settings, capsys
):
    dataset = run(tmp_path / "latents", images, model_folder, **settings)
    assert status_of("verify", dataset.path, "--full", "--decode", 9) == 0
    shown = capsys.readouterr().out
    count = 2 if settings.get("flip") else 1
    assert shown.count("samples decoded, PSNR") == count
    assert status_of("info", dataset.path) == 0
    assert status_of("info", dataset.path, "--json") == 0
    assert repair(dataset.path).problems == []


def test_infos_components_add_up_to_the_bytes_of_a_bucketed_column(dataset):
    for column in describe(dataset)["columns"].values():
        components = dict(column["bytes_per_sample_by_component"])
        assert sum(components.values()) == pytest.approx(column["bytes_per_sample"], rel=0.01)
    column = next(c for c in dataset.columns.values() if "-buckets" in c.column_id)
    components = describe(dataset)["columns"][column.column_id]["bytes_per_sample_by_component"]
    for bucket in range(len(BUCKETS)):
        name, _ = column.spec.array_names(bucket)
        stored = sum(map_arrays(column.path_of(shard))[name].nbytes for shard in SIZES)
        assert components.get(name, 0) == pytest.approx(stored / column.num_rows, abs=0.1)


def test_a_flipped_byte_in_any_array_of_any_bucket_is_found_and_made_again(
    tmp_path, images, model_folder
):
    settings = {"latents": "moments-int8"}
    dataset = run(tmp_path / "latents", images, model_folder, **settings)
    whole, path = contents(dataset.path), buckets_of(dataset).path_of("00000")
    good = path.read_bytes()
    header_bytes = int.from_bytes(good[:8], "little")
    arrays = json.loads(good[8 : 8 + header_bytes])
    arrays.pop("__metadata__", None)
    hit = set()
    for name, entry in arrays.items():
        begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
        if begin == end:
            continue
        hit.add(name.partition(".")[0])
        spoiled = bytearray(good)
        spoiled[(begin + end) // 2] ^= 1
        path.write_bytes(spoiled)
        (problem,) = iter_problems(dataset.path, full=True)
        assert problem.where == path, name
        if name.startswith("moments"):
            assert "1 rows damaged" in problem.text
    assert hit == {"moments", "scale", "row", "checksum", "index_checksum"}
    assert repair(dataset.path).redo == [(path.parent.name, "00000")]
    again = run(dataset.path, images, model_folder, **settings)
    assert contents(again.path) == whole


def test_a_job_that_is_taken_up_again_writes_the_same_bytes(tmp_path, images, model_folder):
    settings: dict[str, Any] = {"latents": "moments-int8", "flip": True}
    whole = contents(run(tmp_path / "a", images, model_folder, **settings).path)
    run(tmp_path / "b", images, model_folder, shard_range="0:1", **settings)
    part = contents(tmp_path / "b")
    assert part.items() < whole.items()
    run(tmp_path / "b", images, model_folder, **settings)
    assert contents(tmp_path / "b") == whole
    run(tmp_path / "c", images, model_folder, latents="moments-int8")  # the flips later
    run(tmp_path / "c", images, model_folder, **settings)
    assert contents(tmp_path / "c") == whole


def test_trainer_and_export_refuse_buckets_and_say_which_column_instead(
    tmp_path, images, model_folder
):
    run(tmp_path / "latents", images, model_folder)
    dataset = run(tmp_path / "latents", images, model_folder, bucket_step=0)
    buckets, text = buckets_of(dataset), dataset.text_column()
    for refuse in (
        lambda: dataset.check_trainable(buckets, text),
        lambda: export(dataset, buckets, text, tmp_path / "out", "webdataset"),
    ):
        with pytest.raises(DatasetError, match=f"{buckets.column_id}: holds .* shapes") as error:
            refuse()
        assert "--image-column <one without -buckets>" in str(error.value)
    assert not (tmp_path / "out").exists()
    plain = dataset.image_column(64)
    assert not plain.spec.buckets
    dataset.check_trainable(plain, text)
    assert export(dataset, plain, text, tmp_path / "out", "webdataset")["rows"] == plain.num_rows


def test_a_dataset_of_buckets_alone_is_refused_by_its_columns(
    tmp_path, images, model_folder, capsys
):
    dataset = run(tmp_path / "latents", images, model_folder)
    column_id = buckets_of(dataset).column_id
    with pytest.raises(DatasetError, match=column_id):
        dataset.image_column(64)
    assert status_of("export", dataset.path, tmp_path / "out") == 2
    assert "resolutions [] of plain squares" in capsys.readouterr().err
    assert dataset.image_column(64, column_id).column_id == column_id


def test_buckets_without_a_single_row_cost_no_command(tmp_path, model_folder, capsys):
    """All images are too small for theirs."""
    image = image_bytes(smooth_image(np.random.default_rng(0), 70, 40))
    write_tar(tmp_path / "images" / "00000.tar", sample_members("0", image, "a lion"))
    dataset = run(tmp_path / "latents", tmp_path / "images", model_folder)
    column = buckets_of(dataset)
    assert (column.num_rows, column.absent) == (0, {"too_small": 1})
    assert status_of("verify", dataset.path, "--full") == 0
    assert status_of("info", dataset.path) == 0
    assert status_of("verify", dataset.path, "--decode", 3) == 2
    assert "1 image columns without a row; wanted one to decode" in capsys.readouterr().err
    run(tmp_path / "latents", tmp_path / "images", model_folder, resolutions="40", bucket_step=0)
    assert status_of("verify", dataset.path, "--decode", 3) == 0  # the other has one
    assert "1 samples decoded" in capsys.readouterr().out
    with pytest.raises(DatasetError, match="shapes of latents"):
        dataset.check_trainable(column, dataset.text_column())
