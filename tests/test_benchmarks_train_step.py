"""The benchmark of the training step: honest rows, whatever does not run or fit, and its data."""

from __future__ import annotations

import gc
import itertools
import json
import math
import subprocess
import weakref
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.result import gpu_state
from benchmarks.train_step import train_step
from benchmarks.train_step.case import (
    SWITCHES,
    Case,
    Timing,
    Visit,
    build_trainer,
    is_out_of_memory,
    open_arm,
)
from benchmarks.train_step.data import columns_for, write_latents
from benchmarks.train_step.train_step import (
    Sweep,
    TrainStepConfig,
    check_config,
    measure,
    print_table,
)
from shards.dataset import Dataset
from shards.errors import UserError
from shards.verify import iter_problems
from train.main import open_columns, open_latents
from train.model import Model
from train.presets import preset
from train.trainer import build_accelerator

CASE = Case(
    preset="tiny",
    loop="latentmill",
    micro_batch=2,
    attention="auto",
    precision="no",
    compile="off",
    ema="on",
)
SHORT = TrainStepConfig(
    loops=("latentmill",),
    micro_batches=(2,),
    steps=1,
    warmup=1,
    blocks=1,
    rounds=1,
    num_samples=64,
    emas=("off",),
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
    assert found.plan["channels_last"] is True
    assert found.plan["cuda_graph"] is torch.cuda.is_available()


def test_a_case_turns_the_trainers_switches_on_and_off_and_names_those_it_does_not_leave_to_it(
    tmp_path,
):
    case = replace(CASE, channels_last="off", batched_projections="on")
    config = case.train_config(tmp_path, tmp_path, 3)
    assert {name: getattr(config, name) for name in SWITCHES} == case.switches()
    assert str(CASE).endswith("EMA on")
    assert str(case).endswith("EMA on, channels_last off, batched_projections on")


def test_an_arm_with_a_search_for_convolutions_leaves_none_to_the_next(latents, tmp_path):
    arm = open_arm(CASE, latents, tmp_path, 9)
    with closing(arm):
        arm.device = torch.device("cuda")  # the switch is of the process: each arm sets its own
        torch.backends.cudnn.benchmark = True
        arm.run(1)
        assert torch.backends.cudnn.benchmark is False


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
        if len(moments) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
        return step(model, number, moments, *others)

    monkeypatch.setattr(Model, "train_step", limited)
    settings = {"micro_batches": (16, 2, 8), "emas": ("off", "on")}
    result = measure(replace(SHORT, **settings, scratch=str(tmp_path)))
    found = [(row["micro_batch"], row["ema"], row["not_measured"]) for row in result["rows"]]
    assert found == [
        (batch, ema, reason)
        for batch, reason in (
            *((2, None), (8, "out of memory")),
            (16, "not tried: out of memory at 8"),
        )
        for ema in ("on", "off")
    ]
    assert [len(row["visits"]) for row in result["rows"]] == [1, 1, 0, 0, 0, 0]


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
    """Takes the place of `visit`: a run takes as many seconds as its batch has samples.

    Args:
        images_per_sec: of a case and its how-manieth round; 1 where not given.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        images_per_sec: Callable[[Case, int], float] = lambda case, number: 1.0,
    ) -> None:
        self._images_per_sec = images_per_sec
        self.now, self.cases, self.datasets = 0.0, [], set()
        monkeypatch.setattr(train_step, "monotonic", lambda: self.now)
        monkeypatch.setattr(train_step, "release_memory", lambda: None)
        monkeypatch.setattr(train_step, "visit", self)
        monkeypatch.setattr(train_step, "check_parity", lambda *_: 0.0)

    def __call__(self, case: Case, data: Path, run_dir: Path, timing: Timing) -> Visit:
        self.now += case.micro_batch
        self.cases.append(case)
        self.datasets.add((data, data.stat().st_ino))
        figures = dict.fromkeys([*train_step._FIGURES.values(), "perf/peak_mem_gib"], 1.0)
        figures["perf/images_per_sec"] = self._images_per_sec(case, self.cases.count(case))
        return Visit(
            device="cuda",
            attention="flash",
            plan={},
            setup_sec=1.0,
            blocks=[figures] * timing.blocks,
            flops_per_image=1,
            matmul_flops_per_sec=1.0,
            gpu={},
        )


FULL = TrainStepConfig(
    presets=("tiny",),
    loops=("latentmill",),
    micro_batches=(8, 16),
    attentions=("auto", "flash", "cudnn"),
    precisions=("bf16", "bf16-weights"),
    compiles=("off", "full"),
    emas=("off", "on"),
    num_samples=64,
    blocks=2,
    rounds=2,
)


def varied(case: Case) -> tuple[int, str, str, str, str]:
    return (case.micro_batch, case.attention, case.precision, case.compile, case.ema)


def test_every_batch_runs_with_and_without_ema_and_the_rest_varies_one_at_a_time_in_turns(
    tmp_path, monkeypatch, capsys
):
    runs = FakeRuns(monkeypatch)
    sweep = Sweep(FULL, tmp_path)
    sweep.run()
    once = [
        (8, "auto", "bf16-weights", "off", "on"),
        (8, "auto", "bf16-weights", "off", "off"),
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
    assert "8 rows (--product would be 48), gone through 2 times" in capsys.readouterr().out


def test_the_product_is_every_combination_once_and_what_compiles_comes_last(
    tmp_path, monkeypatch, capsys
):
    runs = FakeRuns(monkeypatch)
    Sweep(replace(FULL, product=True, rounds=1, max_minutes=99.0), tmp_path).run()
    found = [varied(case) for case in runs.cases]
    axes = ((8, 16), FULL.attentions, FULL.precisions, FULL.compiles, FULL.emas)
    assert sorted(found) == sorted(itertools.product(*axes))
    assert [compiled for *_, compiled, _ in found] == ["off"] * 24 + ["full"] * 24
    assert "48 rows (one setting at a time would be 8)" in capsys.readouterr().out


def test_the_plain_loop_runs_beside_ours_with_what_it_knows_and_its_variants(tmp_path, monkeypatch):
    runs = FakeRuns(monkeypatch)
    Sweep(replace(FULL, loops=("diffusers", "latentmill"), rounds=1), tmp_path).run()
    assert [(case.loop, *varied(case)) for case in runs.cases if case.loop != "latentmill"] == [
        ("diffusers", 8, "sdpa", "bf16", "off", "on"),
        ("diffusers", 16, "sdpa", "bf16", "off", "on"),
        ("diffusers+channels-last", 16, "sdpa", "bf16", "off", "on"),
        ("diffusers+xformers", 16, "xformers", "bf16", "off", "on"),
    ]
    assert [case.loop for case in runs.cases[:3]] == ["latentmill", "latentmill", "diffusers"]
    assert len(runs.cases) == 8 + 4


def test_the_plain_loops_product_has_every_variant_in_every_batch_with_and_without_ema(
    tmp_path, monkeypatch
):
    runs = FakeRuns(monkeypatch)
    listed = {"loops": ("diffusers",), "precisions": ("no", "bf16-weights", "bf16")}
    Sweep(replace(FULL, **listed, product=True, rounds=1), tmp_path).run()
    found = [(case.loop, case.micro_batch, case.precision, case.ema) for case in runs.cases]
    loops = ("diffusers", "diffusers+channels-last", "diffusers+xformers")
    expected = itertools.product(loops, (8, 16), ("no", "bf16"), ("on", "off"))
    assert sorted(found) == sorted(expected)


def test_the_best_of_each_loop_is_compared_with_equal_ema_block_by_block(
    tmp_path, monkeypatch, capsys
):
    def images_per_sec(case: Case, number: int) -> float:
        speed = {"latentmill": 40.0, "diffusers+channels-last": 20.0}.get(case.loop, 10.0)
        faster_later = number if case.loop == "latentmill" else 1
        return speed * faster_later * (2 if case.ema == "off" else 1)

    FakeRuns(monkeypatch, images_per_sec)
    listed = {"attentions": ("auto",), "compiles": ("off",), "precisions": ("bf16",)}
    config = replace(FULL, **listed, loops=("latentmill", "diffusers"), scratch=str(tmp_path))
    result = measure(config)
    (found,) = result["comparisons"]  # the plain loop did not run without EMA
    assert (found["preset"], found["ema"]) == ("tiny", "on")
    assert found["latentmill"]["loop"] == "latentmill"
    assert found["diffusers"]["loop"] == "diffusers+channels-last"
    assert found["samples"] == [2.0, 2.0, 4.0, 4.0]  # two blocks in each of two rounds
    assert found["speedup"]["median"] == 3.0
    costs = result["ema_costs"]
    assert [(cost["loop"], cost["micro_batch"]) for cost in costs] == [
        ("latentmill", 8),
        ("latentmill", 16),
    ]
    assert all(cost["samples"] == [0.5] * 4 for cost in costs)
    print_table(result)
    printed = capsys.readouterr().out
    assert "latentmill at its best is 3.00x" in printed
    assert "not told apart" not in printed
    assert "    16      60.0     120.0      50.0%  50.0% to 50.0%" in printed


def test_settings_are_varied_at_the_largest_batch_that_fits_with_the_bases_ema(
    tmp_path, monkeypatch
):
    def images_per_sec(case: Case, number: int) -> float:
        if case.micro_batch == 16 and (case.ema == "on" or case.loop != "latentmill"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    runs = FakeRuns(monkeypatch, images_per_sec)
    listed = {"loops": ("latentmill", "diffusers"), "precisions": ("bf16",)}
    Sweep(replace(FULL, **listed, rounds=1), tmp_path).run()
    varied_later = runs.cases[6:]
    assert [(case.loop, case.attention, case.compile) for case in varied_later] == [
        ("diffusers+channels-last", "sdpa", "off"),
        ("diffusers+xformers", "xformers", "off"),
        ("latentmill", "flash", "off"),
        ("latentmill", "cudnn", "off"),
        ("latentmill", "auto", "full"),
    ]
    assert {case.micro_batch for case in varied_later} == {8}


def test_a_row_that_ran_out_of_memory_later_is_not_compared(tmp_path, monkeypatch):
    def images_per_sec(case: Case, number: int) -> float:
        if case.loop == "latentmill" and case.micro_batch == 16 and number == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return float(case.micro_batch)

    FakeRuns(monkeypatch, images_per_sec)
    listed = {"attentions": ("auto",), "compiles": ("off",), "precisions": ("bf16",)}
    loops = ("latentmill", "diffusers")
    result = measure(replace(FULL, **listed, emas=("on",), loops=loops, scratch=str(tmp_path)))
    (found,) = result["comparisons"]
    assert found["latentmill"]["micro_batch"] == 8
    assert found["diffusers"]["micro_batch"] == 16
    assert result["ema_costs"] == []


def test_loops_whose_speeds_overlap_are_said_to_be_alike(tmp_path, monkeypatch, capsys):
    def images_per_sec(case: Case, number: int) -> float:
        return 1.0 + (number == 1) * (case.loop == "latentmill") + (number == 2)

    FakeRuns(monkeypatch, images_per_sec)
    config = replace(FULL, loops=("latentmill", "diffusers"), rounds=3, max_minutes=99.0)
    print_table(measure(replace(config, scratch=str(tmp_path))))
    assert "the plain diffusers loop at its best: not told apart" in capsys.readouterr().out


def test_loops_that_train_differently_are_not_timed(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise UserError("the losses", "differ")

    runs = FakeRuns(monkeypatch)
    monkeypatch.setattr(train_step, "check_parity", refuse)
    with pytest.raises(UserError, match="differ"):
        measure(replace(FULL, loops=("latentmill", "diffusers"), scratch=str(tmp_path)))
    assert runs.cases == []


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
    assert len(runs.cases) == 4  # 8 + 8 + 16 + 16 seconds; another 16 would end after 50
    assert runs.now <= 60 * config.max_minutes
    assert len(result["rows"]) == 4
    beside = "tiny, latentmill, batch 16, attention auto, precision"
    assert result["left_out"] == [
        f"{beside} bf16, compile off, EMA on",
        f"{beside} bf16-weights, compile full, EMA on",
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
        ({"loops": ()}, "--loops"),
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
    assert result["theme"] == "train-step"
    assert result["left_out"] == []
    on, off, plain, channels_last, plain_xformers, xformers = result["rows"]
    assert [row["ema"] for row in result["rows"]] == ["on", "off", "on", "on", "on", "on"]
    assert [row["loop"] for row in (plain, channels_last, plain_xformers)] == [
        "diffusers",
        "diffusers+channels-last",
        "diffusers+xformers",
    ]
    for row in (on, off, plain, channels_last):
        assert [len(visit["blocks"]) for visit in row["visits"]] == [2]
        assert set(row["images_per_sec"]) == {"median", "p10", "p90"}
        blocks = [block for visit in row["visits"] for block in visit["blocks"]]
        assert row["mfu"]["median"] == pytest.approx(np.median([b["perf/mfu"] for b in blocks]))
        assert all(math.isfinite(block["train/loss"]) for block in blocks)
    peaks = {visit["matmul_flops_per_sec"] for row in result["rows"] for visit in row["visits"]}
    assert len(peaks) == 1, "all are held to one measurement"
    for row in (xformers, plain_xformers):
        assert "xformers does not run here" in row["not_measured"]
        assert row["visits"] == []
    assert result["loss_difference_frac"]["tiny"] < 1e-4
    (comparison,) = result["comparisons"]
    assert len(comparison["samples"]) == 2
    assert [cost["micro_batch"] for cost in result["ema_costs"]] == [2]
    rows = [line for line in lines if line.startswith("tiny ")]
    assert len(rows) == 6 + 6  # as they come, then the table
    assert len({len(line) for line in lines if line.startswith("preset ")}) == 1
    assert sum("xformers does not run here" in line for line in rows) == 4
    assert lines[0].startswith("6 rows (--product would be ")
    assert result["environment"]["versions"]["torch"] == torch.__version__
    assert " train-step " in result["environment"]["command"]
    assert list(scratch.iterdir()) == []


def test_the_fastest_of_our_rows_is_profiled(tmp_path, capsys):
    result = measure(replace(SHORT, profile=True, scratch=str(tmp_path)))
    assert result["profile"]["rung"].startswith("tiny, latentmill, batch 2")
    assert sum(row["share_frac"] for row in result["profile"]["kinds"]) == pytest.approx(1.0)
    print_table(result)
    assert "convolution backward" in capsys.readouterr().out


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
