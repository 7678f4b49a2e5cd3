"""Opening a dataset of very many samples: the synthetic manifest is one that the reader takes."""

from __future__ import annotations

import json

import pytest
from conftest import run_python

from benchmarks.order import OrderConfig, measure_shuffle

SMALL = OrderConfig(num_samples=6400, num_shards=80, global_batch_size=64, world_size=2)


def test_the_command_opens_what_it_wrote_in_fresh_processes(tmp_path):
    sizes = ["--num-samples", 6400, "--num-shards", 80, "--global-batch-size", 64]
    out = tmp_path / "result.json"
    done = run_python(
        "-m", "benchmarks", "order", *sizes, "--world-size", 2, "--repeats", 2, "--out", out
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document == json.loads(out.read_text())
    assert len(document["runs"]) == 2
    for figure in ("open_sec", "seek_sec", "next_ms", "peak_rss_mb"):
        samples = [run[figure] for run in document["runs"]]
        assert all(value > 0 for value in samples)
        assert document[figure]["median"] == pytest.approx(sum(samples) / 2)
    assert "6,400 samples in 80 shards" in done.stdout


def test_a_larger_window_mixes_more_shards_into_a_batch():
    narrow, wide = (measure_shuffle(SMALL, window) for window in (1, 200))
    assert narrow["shards_in_a_batch"]["median"] <= wide["shards_in_a_batch"]["median"]
    assert narrow["steps_of_a_shard"]["median"] < wide["steps_of_a_shard"]["median"]
    assert wide["shards_in_a_batch"]["median"] <= 64
