"""The benchmark of stage 1: both arms do the same work, and the arithmetic is honest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, run_python

from benchmarks.stage_one import StageOneConfig, _Bench, _with_encoders, measure
from benchmarks.stage_one_arms import NullImageEncoder, StageOne, run_naive, run_ours, stages_alone
from benchmarks.stage_one_data import write_image_shards
from precompute.image_encoder import ImageEncoder
from precompute.text_encoder import TextEncoder
from shards.arrays import map_arrays
from shards.errors import UserError
from shards.image_shards import ShardStream
from shards.manifest import write_manifest
from shards.source_shard import SourceShard
from shards.verify import iter_problems

SHORT = StageOneConfig(
    images=12,
    model_images=12,
    megapixels="0.1,0.3",
    resolutions="64,320",
    shards=2,
    blocks=1,
    model_blocks=1,
    batch_size=4,
    device="cpu",
    model=str(TINY_MODEL),
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> _Bench:
    return _Bench(SHORT, tmp_path_factory.mktemp("bench"), (0.1, 0.3))


@pytest.fixture(scope="module")
def job(bench: _Bench) -> StageOne:
    cpu, model = torch.device("cpu"), bench._model
    job = bench._job(12, "float32")
    image = ImageEncoder(model, cpu, torch.float32)
    return _with_encoders(job, image, TextEncoder(model, cpu, torch.float32))


def test_both_arms_store_the_same_numbers(bench, job, tmp_path):
    spec = bench._spec(job.columns, "cpu", "float32", 2)
    seconds = run_ours(job, spec, tmp_path / "ours")
    wasted = run_naive(job, tmp_path / "naive", 4)
    assert {"read", "decode", "transform", "write", "encode text"} <= seconds.keys()
    num_rows = 0
    for source in job.sources:
        naive = np.load(tmp_path / "naive" / f"{source.name}.npz")
        for column in job.images:
            path = tmp_path / "ours" / column.column_id / f"{source.name}.safetensors"
            ours = map_arrays(path)["moments"]
            theirs = naive[f"moments_{column.resolution}"]
            assert ours.shape == theirs.shape
            # PIL's resizing and torch's differ by one level here and there
            assert np.abs(ours.astype(float) - theirs).mean() < 0.02 * np.abs(theirs).mean()
            num_rows += len(ours)
    assert wasted == 12 * len(job.images) - num_rows


def test_what_ours_writes_is_a_whole_dataset(bench, job, tmp_path):
    run_ours(job, bench._spec(job.columns, "cpu", "float32", 1), tmp_path)
    write_manifest(tmp_path)
    problems = [problem for problem in iter_problems(tmp_path, full=True)]
    assert all("empty caption" in problem.text for problem in problems)  # it writes no null file


def test_stages_alone_do_all_of_the_work(bench, job, tmp_path):
    seconds = stages_alone(job, bench._spec(job.columns, "cpu", "float32", 1), tmp_path)
    assert seconds.keys() == {"read", "read, decode, transform", "encode", "write"}
    assert min(seconds.values()) > 0
    assert len(list(tmp_path.glob("*.safetensors"))) == len(job.sources) * len(job.columns)


def test_the_null_encoder_gives_shapes_and_no_work():
    found = NullImageEncoder(8, 8).launch(torch.empty(3, 3, 64, 96, device="meta"))
    assert (found.shape, float(found.abs().sum())) == ((3, 8, 8, 12), 0.0)


def test_images_are_many_sizes_and_some_are_small(tmp_path):
    paths = write_image_shards(
        tmp_path / "images", 60, 3, (0.1, 0.2), small_frac=0.5, duplicate_frac=0.5
    )
    samples = [s for p in paths for s in ShardStream(SourceShard(str(p), p.stem, None))]
    assert len(samples) == 60
    assert not any(sample.problem for sample in samples)
    assert len({sample.key for sample in samples}) == 60
    assert 10 < len({sample.caption for sample in samples}) < 50


def test_the_command_ends_with_one_json_document(tmp_path):
    arguments: list[Any] = ["--images", 8, "--model-images", 4, "--blocks", 1, "--shards", 2]
    arguments += ["--model-blocks", 1, "--resolutions", "64", "--megapixels", "0.1"]
    arguments += ["--device", "cpu", "--scratch", tmp_path, "--out", tmp_path / "result.json"]
    done = run_python("-m", "benchmarks", "precompute", *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "result.json").read_text())
    null, model = result["null_encoder"], result["model"]
    cores = [null["arms"][arm]["images_per_core_sec"]["median"] for arm in ("ours", "naive")]
    assert null["ours_over_naive_per_core"]["median"] == pytest.approx(cores[0] / cores[1])
    wall = model["arms"]["ours"]["seconds"][0]
    slowest = model["alone_sec"][model["slowest_stage"]]["median"]
    assert model["wall_over_slowest_alone"]["median"] == pytest.approx(wall / slowest)
    assert model["flops"]["ours_per_row"] <= model["flops"]["naive_per_row"]
    assert sorted(Path(tmp_path).iterdir()) == [tmp_path / "result.json"]  # nothing is left


@pytest.mark.parametrize("changed", [{"images": 0}, {"megapixels": "0"}, {"blocks": 0}])
def test_settings_that_measure_nothing_are_refused(tmp_path, changed):
    with pytest.raises(UserError, match="no images, shards or blocks"):
        measure(StageOneConfig(scratch=str(tmp_path), **changed))
