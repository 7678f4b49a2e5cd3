"""The benchmark of the training step: honest rows, whatever does not run or fit, and its data."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import train_step
from benchmarks.__main__ import main
from benchmarks.result import gpu_state
from benchmarks.train_step import Sweep, TrainStepConfig, check_config, measure, print_table
from benchmarks.train_step_case import Case, Timing, Visit, build_trainer, is_out_of_memory
from benchmarks.train_step_data import columns_for, write_latents
from shards.dataset import Dataset
from shards.errors import UserError
from shards.verify import iter_problems
from train.main import open_columns, open_latents
from train.model import Model
from train.presets import preset
from train.trainer import build_accelerator

CASE = Case(preset="tiny", micro_batch=2, attention="auto", precision="no", compile="off", ema="on")
SHORT = TrainStepConfig(
    micro_batches=(2,), steps=1, warmup=1, blocks=1, rounds=1, num_samples=64, emas=("off",)
)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("train-step") / "latents"
    return write_latents(path, *columns_for(preset("tiny")), num_samples=70, num_shards=3)


# The data -----------------------------------------------------------------------------------------


def test_the_synthetic_shards_are_a_whole_dataset(latents):
    assert list(iter_problems(latents, full=True)) == []


def test_the_reader_gets_latents_and_states_of_realistic_scale_and_no_row_twice(latents):
    config = CASE.train_config(latents, latents / "run", 3)
    config = replace(config, global_batch_size=64, micro_batch_size=64)
    accelerator = build_accelerator(config)
    reader: Any = open_latents(config, open_columns(config), accelerator, SimpleNamespace()).batches
    batch = reader.gather(0, range(64))
    mean, logvar = np.split(batch.moments.astype(np.float32), 2, axis=1)
    latents_std = (mean * reader.scaling_factor).std()
    states = batch.states.astype(np.float32)
    assert 0.95 < latents_std < 1.05
    assert -10.1 < logvar.mean() < -9.9
    assert 0.95 < states.std() < 1.05
    assert 0.9 < reader.null_states.astype(np.float32).std() < 1.1
    for rows in (mean, logvar, states):
        assert len(np.unique(rows.reshape(64, -1), axis=0)) == 64


@pytest.mark.parametrize(
    ("name", "latent_shape", "dim"),
    [("sd2-base-256", (4, 32, 32), 1024), ("sd15-512", (4, 64, 64), 768)],
)
def test_the_shards_have_the_shapes_of_the_preset(tmp_path, name, latent_shape, dim):
    path = write_latents(tmp_path / "d", *columns_for(preset(name)), num_samples=4, num_shards=2)
    config = replace(preset(name), data=str(path))
    columns = open_columns(config)  # refuses what does not fit the U-Net
    assert columns.image.spec.latent_shape == latent_shape
    assert columns.text.spec.dim == dim
    assert Dataset(path).image_column(config.resolution).num_rows == 4


# One case -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", ["on", "off"])
def test_the_row_with_ema_really_has_an_average_that_moves(latents, tmp_path, ema):
    case = replace(CASE, ema=ema)
    trainer = build_trainer(case.train_config(latents, tmp_path, 3))
    try:
        trainer.run(1)
        average = trainer.model.average
        assert (average is not None) == (ema == "on")
        if average:
            before = {name: weight.clone() for name, weight in average.weights.items()}
            trainer.run(3)
            assert all(not torch.equal(average.weights[name], before[name]) for name in before)
    finally:
        trainer.close()


def test_a_visit_times_every_block_by_the_loops_own_figures(latents, tmp_path):
    found = train_step.visit(CASE, latents, tmp_path, Timing(warmup=2, steps=3, blocks=2))
    assert [block["step"] for block in found.blocks] == [5, 8]
    for block in found.blocks:
        assert math.isfinite(block["train/loss"])
        assert block["perf/images_per_sec"] == pytest.approx(2 * block["perf/iters_per_sec"])
        achieved = block["perf/images_per_sec"] * found.flops_per_image
        assert block["perf/mfu"] == pytest.approx(achieved / found.matmul_flops_per_sec)
        assert 0 <= block["perf/data_wait_frac"] <= 1
        assert block["perf/peak_mem_gib"] > 0
    assert not (tmp_path / "checkpoints").exists()
    assert found.attention.startswith("sdpa ")


def test_a_loss_that_is_not_finite_is_a_row_with_its_reason(tmp_path, monkeypatch, capsys):
    losses = Model._losses
    monkeypatch.setattr(Model, "_losses", lambda *arguments: losses(*arguments) * math.nan)
    (row,) = measure(replace(SHORT, scratch=str(tmp_path)))["rows"]
    assert "not finite" in row["not_measured"]
    assert row["visits"] == []
    assert "not finite" in capsys.readouterr().out


def test_what_does_not_fit_is_a_row_and_its_memory_is_free_for_the_next(tmp_path, monkeypatch):
    step, unets = Model.train_step, []

    def limited(model: Model, number: int, moments: torch.Tensor, *others: Any) -> Any:
        gc.collect()
        assert all(unet() in (None, model.unet) for unet in unets), "an earlier model is alive"
        unets.append(weakref.ref(model.unet))
        if len(moments) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
        return step(model, number, moments, *others)

    monkeypatch.setattr(Model, "train_step", limited)
    settings = {"micro_batches": (16, 8, 2, 4), "emas": ("off", "on")}
    result = measure(replace(SHORT, **settings, scratch=str(tmp_path)))
    found = [(row["micro_batch"], row["ema"], row["not_measured"]) for row in result["rows"]]
    assert found == [
        (2, "on", None),
        (4, "on", None),
        (8, "on", "out of memory"),
        (16, "on", "not tried: out of memory at 8"),
        (4, "off", None),
    ]
    assert [len(row["visits"]) for row in result["rows"]] == [1, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), False),
    ],
)
def test_a_lack_of_memory_is_told_by_what_the_libraries_say(error, is_it):
    assert is_out_of_memory(error) == is_it


def test_another_error_of_the_runtime_is_no_lack_of_memory(tmp_path, monkeypatch):
    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Model, "train_step", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measure(replace(SHORT, scratch=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


# The sweep ----------------------------------------------------------------------------------------


class FakeRuns:
    """Takes the place of `visit`: a run takes as many seconds as its batch has samples."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.cases, self.datasets = 0.0, [], set()
        monkeypatch.setattr(train_step, "monotonic", lambda: self.now)
        monkeypatch.setattr(train_step, "release_memory", lambda: None)
        monkeypatch.setattr(train_step, "visit", self)

    def __call__(self, case: Case, data: Path, run_dir: Path, timing: Timing) -> Visit:
        self.now += case.micro_batch
        self.cases.append(case)
        self.datasets.add((data, data.stat().st_ino))
        names = [*train_step._FIGURES.values(), "perf/peak_mem_gib"]
        return Visit(
            device="cuda",
            attention="flash",
            setup_sec=1.0,
            blocks=[dict.fromkeys(names, 1.0)] * timing.blocks,
            flops_per_image=1,
            matmul_flops_per_sec=1.0,
            gpu={},
        )


FULL = TrainStepConfig(
    presets=("tiny",),
    micro_batches=(8, 16),
    attentions=("auto", "flash", "cudnn"),
    precisions=("bf16", "bf16-weights"),
    compiles=("off", "full"),
    emas=("off", "on"),
    num_samples=64,
    blocks=2,
)


def varied(case: Case) -> tuple[int, str, str, str, str]:
    return (case.micro_batch, case.attention, case.precision, case.compile, case.ema)


def test_one_setting_is_varied_at_a_time_and_rows_repeat_in_turns(tmp_path, monkeypatch):
    runs = FakeRuns(monkeypatch)
    sweep = Sweep(FULL, tmp_path)
    sweep.run()
    once = [
        (8, "auto", "bf16-weights", "off", "on"),
        (16, "auto", "bf16-weights", "off", "on"),
        (16, "auto", "bf16-weights", "off", "off"),
        (16, "flash", "bf16-weights", "off", "on"),
        (16, "cudnn", "bf16-weights", "off", "on"),
        (16, "auto", "bf16", "off", "on"),
        (16, "auto", "bf16-weights", "full", "on"),
    ]
    assert [varied(case) for case in runs.cases] == once + once
    assert [len(row.visits) for row in sweep.rows] == [2] * len(once)
    assert len(runs.datasets) == 1
    assert sweep.left_out == []


def test_the_base_is_the_first_setting_where_the_usual_one_is_not_listed(tmp_path, monkeypatch):
    runs = FakeRuns(monkeypatch)
    listed = {"attentions": ("math", "flash"), "precisions": ("no",), "emas": ("off",)}
    Sweep(replace(FULL, **listed, compiles=("off",), rounds=1), tmp_path).run()
    assert [varied(case) for case in runs.cases] == [
        (8, "math", "no", "off", "off"),
        (16, "math", "no", "off", "off"),
        (16, "flash", "no", "off", "off"),
    ]


def test_the_budget_ends_the_run_before_the_row_that_would_pass_it(tmp_path, monkeypatch, capsys):
    runs = FakeRuns(monkeypatch)
    config = replace(FULL, attentions=("auto",), max_minutes=50 / 60, scratch=str(tmp_path))
    result = measure(config)
    assert len(runs.cases) == 3  # 8 + 16 + 16 seconds; another 16 would end after 50
    assert runs.now <= 60 * config.max_minutes
    assert len(result["rows"]) == 3
    assert result["left_out"] == [
        "tiny, batch 16, attention auto, precision bf16, compile off, EMA on",
        "tiny, batch 16, attention auto, precision bf16-weights, compile full, EMA on",
        *(f"{case}, round 2" for case in runs.cases),
    ]
    print_table(result)
    assert "left out" in capsys.readouterr().out


def test_each_preset_has_its_own_dataset_and_nothing_stays(tmp_path, monkeypatch):
    runs = FakeRuns(monkeypatch)
    measure(replace(FULL, presets=("tiny", "sd2-base-256"), rounds=1, scratch=str(tmp_path)))
    assert len(runs.datasets) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"presets": ("sd3",)}, "sd3"),
        ({"presets": ()}, "--presets"),
        ({"micro_batches": (8, 0)}, "--micro-batches"),
        ({"warmup": 0}, "--warmup"),
        ({"steps": 0}, "--steps"),
        ({"max_minutes": 0.0}, "--max-minutes"),
        ({"num_samples": 63}, "--num-samples"),
    ],
)
def test_settings_that_make_no_row_are_refused_at_once(tmp_path, settings, where):
    with pytest.raises(UserError, match=where):
        measure(replace(SHORT, **settings, scratch=str(tmp_path / "scratch")))
    assert not (tmp_path / "scratch").exists()
    check_config(SHORT)


# The command --------------------------------------------------------------------------------------


def test_the_command_prints_rows_as_they_come_and_ends_with_one_json_line(
    tmp_path, monkeypatch, capsys
):
    scratch, out = tmp_path / "scratch", tmp_path / "result.json"
    axes = ["--micro-batches", "2", "--attentions", "auto", "xformers", "--precisions", "no"]
    short = ["--warmup", "1", "--steps", "1", "--blocks", "2", "--rounds", "1"]
    places = ["--num-samples", "64", "--scratch", str(scratch), "--out", str(out)]
    arguments = ["train-step", *axes, *short, *places]
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    main()
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result == json.loads(out.read_text())
    assert result["theme"] == "train_step"
    assert result["left_out"] == []
    on, off, xformers = result["rows"]
    assert (on["ema"], off["ema"], xformers["attention"]) == ("on", "off", "xformers")
    for row in (on, off):
        assert [len(visit["blocks"]) for visit in row["visits"]] == [2]
        assert set(row["images_per_sec"]) == {"median", "p10", "p90"}
        blocks = [block for visit in row["visits"] for block in visit["blocks"]]
        assert row["mfu"]["median"] == pytest.approx(np.median([b["perf/mfu"] for b in blocks]))
        assert all(math.isfinite(block["train/loss"]) for block in blocks)
    assert "xformers does not run here" in xformers["not_measured"]
    assert xformers["visits"] == []
    rows = [line for line in lines if line.startswith("tiny ")]
    assert len(rows) == 3 + 3  # as they come, then the table
    assert len({len(line) for line in lines if line.startswith("preset ")}) == 1
    assert sum("xformers does not run here" in line for line in rows) == 2
    assert result["environment"]["versions"]["torch"] == torch.__version__
    assert " train-step " in result["environment"]["command"]
    assert list(scratch.iterdir()) == []


def test_a_preset_that_is_unknown_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train-step", "--presets", "sd3"])
    assert ended.value.code == 2
    assert "'sd3' is unknown" in capsys.readouterr().err


# The GPU ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ((0, "1980 MHz, 612.33 W\n"), {"clocks.sm": "1980 MHz", "power.draw": "612.33 W"}),
        ((6, "No devices were found\n"), {}),
        (None, {}),
    ],
)
def test_clocks_and_power_are_noted_where_nvidia_smi_tells(monkeypatch, answer, found):
    asked = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command)
        if answer is None:
            raise FileNotFoundError(command[0])
        return SimpleNamespace(returncode=answer[0], stdout=answer[1])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(uuid="3b-1a"))
    monkeypatch.setattr(subprocess, "run", run)
    assert gpu_state("clocks.sm", "power.draw") == found
    assert "--id=GPU-3b-1a" in asked[0]


def test_without_a_gpu_nobody_is_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("asked"))
    assert gpu_state("clocks.sm") == {}
