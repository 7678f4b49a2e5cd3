"""Opening a dataset of very many samples: the synthetic manifest is one that the reader takes."""

from __future__ import annotations

import pytest

from benchmarks import order
from benchmarks.order import OrderConfig, measure, measure_shuffle, print_table

SMALL = OrderConfig(num_samples=6400, num_shards=80, global_batch_size=64, world_size=2, repeats=2)


def test_fresh_processes_open_what_was_written(monkeypatch, capsys):
    monkeypatch.setattr(order, "_WINDOWS", (50,))  # larger ones are for larger datasets
    document = measure(SMALL)
    assert len(document["runs"]) == 2
    for figure in ("open_sec", "seek_sec", "next_ms", "peak_rss_mb"):
        samples = [run[figure] for run in document["runs"]]
        assert all(value > 0 for value in samples)
        assert document[figure]["median"] == pytest.approx(sum(samples) / 2)
    print_table(document)
    assert "6,400 samples in 80 shards" in capsys.readouterr().out


def test_in_a_larger_window_a_shard_takes_longer_to_pass():
    narrow, wide = (measure_shuffle(SMALL, window) for window in (1, 50))
    assert narrow["steps_of_a_shard"]["median"] < wide["steps_of_a_shard"]["median"]
    assert 1 < wide["shards_in_a_batch"]["median"] <= 64
