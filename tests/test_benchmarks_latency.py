"""`python -m benchmarks latency`: arms in turns, raw samples, counts, and what is not measured."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import run_python

from benchmarks.latency import latency
from benchmarks.latency.arms import list_arms
from benchmarks.latency.config import LatencyConfig, check_config
from benchmarks.latency.counts import _count_around
from benchmarks.latency.device_watch import DeviceWatch
from benchmarks.latency.models import parts_of, random_parts
from benchmarks.latency.room import obstacle
from benchmarks.report.latency import latency_card
from benchmarks.report.sources import find_sources
from serve.fast_path import FastPath
from shards.canonical import canonical_json
from shards.errors import UserError

SMALL = LatencyConfig(steps=2, trials=3, warmup=1, batch_sizes=(1, 2), height=32)


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    images = tmp_path_factory.mktemp("latency")
    return latency.measure(replace(SMALL, images=str(images)))


def test_all_samples_of_all_arms_are_kept(document):
    rows = document["rows"]
    assert [(row["arm"], row["batch_size"]) for row in rows] == [
        (arm, batch) for batch in (1, 2) for arm in ("plain float32", "fast path")
    ]
    for row in rows:
        assert len(row["samples_sec"]) == 3
        assert row["call_sec"]["median"] == sorted(row["samples_sec"])[1]
        assert row["call_sec"]["median"] <= row["p95_sec"] <= max(row["samples_sec"])
        assert len(row["parts"]["samples"]) == 3
        parts = {name: each["median"] for name, each in row["parts"].items() if name != "samples"}
        assert parts.keys() == {"text_sec", "denoise_sec", "vae_sec", "png_sec"}
        assert all(seconds > 0 for seconds in parts.values())


def test_ours_is_held_against_the_fastest_plain_pipeline():
    rows = [
        {"arm": arm, "samples_sec": samples, "call_sec": {"median": samples[1]}}
        for arm, samples in (
            ("plain float32", [3.0, 3.0, 3.0]),
            ("plain float16", [1.0, 1.2, 2.0]),  # another user of the machine came
            ("fast path", [0.5, 0.6, 1.0]),
        )
    ] + [{"arm": "+ compile", "samples_sec": [1.0], "not_measured": "out of memory"}]
    latency._compare_speeds(rows)
    found = rows[2]["speedup"]
    assert found == {"over": "plain float16", "median": 2.0, "p10": 2.0, "p90": 2.0}
    assert not any("speedup" in row for row in (rows[0], rows[1], rows[3]))


def test_images_and_their_differences_are_saved(document):
    from pathlib import Path

    for row in document["rows"][1::2]:
        found = row["image_diff"]
        assert found["reference"] == "plain float32"
        assert found["max_levels"] <= 2
        folder = Path(found["folder"])
        assert len(list(folder.glob("fast-path-*.png"))) == row["batch_size"]
        assert (folder / "image-diff.json").exists()


def test_without_a_gpu_the_result_says_that_it_shows_no_gpus_speed(document, capsys):
    latency.print_table(document)
    printed = capsys.readouterr().out
    assert "says nothing about a GPU" in document["note"]
    assert document["note"] in printed
    assert "waits a step" in printed
    assert json.loads(json.dumps(document, allow_nan=False))["rows"] == document["rows"]


def test_the_report_can_show_the_result(document, tmp_path):
    (tmp_path / "latency.json").write_text(canonical_json(document))
    (found,) = find_sources(tmp_path, tmp_path / "none").documents
    card = latency_card(found)
    titles = [getattr(block, "title", "") for block in card.blocks]
    assert sum("1 image" in title for title in titles) == 3, "bars, parts and a table"
    assert sum("2 images" in title for title in titles) == 3
    (bars, *_) = (block for block in card.blocks if block.kind == "bars")
    assert [bar.kind for bar in bars.bars] == ["other", "ours"]
    assert any("says nothing about a GPU" in getattr(block, "text", "") for block in card.blocks)


def test_arms_take_turns(document, monkeypatch, tmp_path):
    """What slows the machine for a while must slow them all."""
    order, clock = [], itertools.count()

    def time_call(arm, call):
        order.append(arm.spec.name)
        return float(next(clock)), [np.zeros((8, 8, 3), np.uint8)] * call.batch

    monkeypatch.setattr(latency, "time_call", time_call)
    monkeypatch.setattr(latency, "time_parts", lambda *_: dict.fromkeys(latency.PARTS, 1.0))
    monkeypatch.setattr(latency, "count_all", lambda *_: document["counts"])
    found = latency.measure(replace(SMALL, batch_sizes=(1,), images=str(tmp_path)))
    assert order == ["plain float32", "fast path"] * 4
    assert [row["samples_sec"] for row in found["rows"]] == [[2.0, 4.0, 6.0], [3.0, 5.0, 7.0]]


def test_an_arm_without_memory_is_a_row_that_says_so(document, monkeypatch, tmp_path):
    def time_call(arm, call):
        if arm.spec.name == "plain float32":
            raise torch.OutOfMemoryError("no memory")
        return 1.0, [np.zeros((8, 8, 3), np.uint8)] * call.batch

    monkeypatch.setattr(latency, "time_call", time_call)
    monkeypatch.setattr(latency, "count_all", lambda *_: document["counts"])
    found = latency.measure(replace(SMALL, batch_sizes=(1,), images=str(tmp_path)))
    plain, fast = found["rows"]
    assert plain["not_measured"] == "out of memory"
    assert "call_sec" not in plain
    assert "speedup" not in fast
    assert "image_diff" not in fast
    latency.print_table(found)


def test_when_the_time_is_over_three_rounds_are_made_and_no_more(document, monkeypatch, tmp_path):
    monkeypatch.setattr(latency, "time_parts", lambda *_: dict.fromkeys(latency.PARTS, 1.0))
    monkeypatch.setattr(latency, "count_all", lambda *_: document["counts"])
    monkeypatch.setattr(latency, "obstacle", lambda *_: "")
    config = replace(SMALL, trials=50, max_minutes=1e-9, batch_sizes=(1,), images=str(tmp_path))
    found = latency.measure(config)
    assert [len(row["samples_sec"]) for row in found["rows"]] == [3, 3]


def test_the_ladder_adds_one_switch_after_another():
    config = LatencyConfig(ladder=True).resolved(on_gpu=True)
    *plain, first, second, _, _, _, _, last = list_arms(config, ("1x512x512",))
    assert [arm.baseline for arm in plain] == ["float32", "tf32", "float16", "bfloat16"]
    assert (first.fast.dtype, first.fast.channels_last) == ("auto", "off")
    assert (second.fast.channels_last, second.fast.compile) == ("auto", "off")
    assert last.fast == FastPath(compiled_shapes=("1x512x512",))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"trials": 0},
        {"warmup": -1},
        {"height": 100},
        {"width": -8},
        {"batch_sizes": ()},
        {"batch_sizes": (0,)},
        {"guidance": 0.5},
        {"scheduler": "fastest"},
        {"max_minutes": 0},
    ],
)
def test_what_cannot_be_measured_is_refused(wrong):
    with pytest.raises(UserError):
        check_config(replace(SMALL, **wrong))


# Without a GPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["dpm++", "ddim", "pndm"])
def test_ours_never_waits_in_a_step_and_the_plain_pipeline_does(scheduler):
    config = replace(SMALL, scheduler=scheduler)
    plain, fast = (_count_around(config, is_fast=is_fast) for is_fast in (False, True))
    assert fast["waits_per_step"] == fast["waits_per_image"] == 0
    assert plain["waits_per_image"] >= 2
    assert (plain["waits_per_step"] > 0) == (scheduler != "dpm++")


def test_the_watch_follows_what_is_computed_on_the_device_and_nothing_else():
    table, latents = torch.arange(4.0), torch.ones(2, 3)
    watch = DeviceWatch()
    watch.follow(latents)
    with watch:
        assert table[2].item() == 2.0  # the host's own
        halved = (latents * table[1])[0] / 2
        with watch.unwatched():
            assert halved.sum().item() == 1.5
        assert bool(halved[0] < 1)
    assert watch.num_waits == 1
    assert watch.num_operators == 3, "product, quotient and comparison; views are none"


def test_fewer_launches_and_bytes_are_counted_for_ours(document):
    plain, fast = document["counts"]["step"]
    assert fast["unet_operators"] < plain["unet_operators"]
    assert fast["unet_gb"] < plain["unet_gb"]
    assert fast["launches_by_the_host"] < plain["launches_by_the_host"] / 5


def test_a_model_in_full_size_is_predicted_and_not_run(monkeypatch, document):
    config = LatencyConfig(model="random-sd2", out="-").resolved(on_gpu=False)
    monkeypatch.setattr(latency, "open_pipeline", None)
    monkeypatch.setattr(latency, "count_all", lambda *_: document["counts"])
    monkeypatch.setattr("train.host_memory.available_bytes", lambda: 2**30)
    found = latency.measure(config)
    assert found["rows"] == []
    assert "3 pipelines take 14 GiB" in found["not_measured"]


def test_the_time_of_a_cpu_is_predicted_from_flops(monkeypatch):
    monkeypatch.setattr("train.host_memory.available_bytes", lambda: 2**40)
    monkeypatch.setattr("train.flops.matmul_flops_per_sec", lambda *_: 1e11)
    config = LatencyConfig(steps=50, trials=8, warmup=2, batch_sizes=(1, 4), max_minutes=9)
    flops = {"text": 1e11, "vae": 9e11, "unet_step": 1e12}
    reason = obstacle(config, random_parts("random-sd15"), flops, 2)
    assert "850 minutes for 100 images of 51.0 TFLOP at 100 GFLOP/s" in reason
    assert not obstacle(replace(config, max_minutes=851), random_parts("random-sd15"), flops, 2)


def test_random_models_have_stable_diffusions_size():
    from benchmarks.latency.models import open_pipeline

    with torch.device("meta"):
        for model, millions in (("random-sd2", 866), ("random-sd15", 860)):
            unet, vae, text = random_parts(model).build()
            assert round(sum(p.numel() for p in unet.parameters()) / 1e6) == millions
            assert unet.config.cross_attention_dim == text.config.hidden_size
            assert unet.config.in_channels == vae.config.latent_channels
    assert parts_of(open_pipeline("tiny")).vae_scale_factor == 8


def test_help_answers_without_loading_torch():
    code = (
        "import sys; from benchmarks.__main__ import main\n"
        "try: main(['latency', '--help'])\n"
        "except SystemExit: pass\n"
        "print('heavy:', [m for m in ('torch', 'diffusers') if m in sys.modules])"
    )
    done = run_python("-c", code)
    assert "--image-diff" in done.stdout
    assert "heavy: []" in done.stdout, done.stderr[-500:]
