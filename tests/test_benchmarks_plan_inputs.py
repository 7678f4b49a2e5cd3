"""The planner's inputs: flags over presets, measured over predicted, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tyro

from benchmarks.planner.config import PlanConfig
from benchmarks.planner.phase import Curve
from benchmarks.planner.plan import plan, run
from shards.errors import UserError

OWN = PlanConfig(
    images=("4e6",), resolutions="256,512", epochs=("5",), images_per_sec=("256=740", "512=165")
)
SD2 = PlanConfig(preset="sd2-base")


def typed(line: str) -> PlanConfig:
    return tyro.cli(PlanConfig, args=line.split())


def by_name(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in document["inputs"]}


# Flags and presets --------------------------------------------------------------------------------


def test_a_job_as_it_is_typed():
    document = plan(
        typed(
            "--images 4_000_000 --resolutions 256,512 --epochs 256=5 512=2 --gpus 1 8 "
            "--images-per-sec 256=740,512=165 256@8=5600 --usd-per-gpu-hour spot=2 3.5"
        )
    )
    first, second = document["training"]
    assert [phase["images_per_sec"] for phase in first["phases"]] == pytest.approx([740, 165])
    assert [phase["images_per_sec"] for phase in second["phases"]] == pytest.approx([5600, 1320])
    assert [phase["is_known_count"] for phase in second["phases"]] == [True, False]
    assert list(second["usd"]) == ["spot", "$3.50/h"]
    assert [phase["images_seen"] for phase in document["phases"]] == [20e6, 8e6]


def test_there_are_few_enough_flags():
    assert len(PlanConfig.__dataclass_fields__) <= 40


def test_flags_take_the_place_of_a_presets_inputs():
    document = plan(typed("--preset mosaicml-a100 --gpus 8 --usd-per-gpu-hour 1.5"))
    assert [row["num_gpus"] for row in document["training"]] == [8]
    assert document["training"][0]["usd"] == {"$1.50/h": pytest.approx(81.33 * 192 * 1.5, abs=3)}
    assert by_name(document)["img/s per GPU at 256 px, offline"]["kind"] == "preset"


def test_one_phase_of_a_preset():
    document = plan(typed("--preset mosaicml-a100 --resolutions 512 --gpus 8"))
    (phase,) = document["phases"]
    assert phase["images_seen"] == 1_740_800_000
    assert document["stage_one"][0]["kind"] == "predicted"  # 3,784 hours are of both phases


def test_a_presets_total_is_not_kept_for_another_job():
    with pytest.raises(UserError, match="nothing is known for 256 px"):
        plan(typed("--preset anyscale-a100 --epochs 1"))


@pytest.mark.parametrize("length", ["--steps 256=55_000 512=85_000", "--epochs 0.1"])
def test_a_presets_stage_one_is_not_kept_for_another_job_and_it_is_said(length):
    document = plan(typed(f"--preset mosaicml-a100 {length}"))
    (stage_one,) = document["stage_one"]
    assert stage_one["kind"] == "predicted"
    assert stage_one["gpu_hours"] < 1000
    said = "the preset's --encode-gpu-hours: of its own job alone"
    assert any(note.startswith(said) for note in document["notes"])
    kept = plan(typed("--preset mosaicml-a100 --runs 2"))["notes"]
    assert not any("of its own job" in note for note in kept)


def test_a_presets_speeds_are_not_those_of_another_unet():
    with pytest.raises(UserError, match="nothing is known for 256 px"):
        plan(typed("--preset mosaicml-a100 --unet sd15"))


def test_a_given_factor_beats_the_presets():
    document = plan(typed("--preset mosaicml-a100 --online-images-per-sec 256@8=550 512@8=290"))
    factors = [phase["factors"]["online"] for phase in document["phases"]]
    assert factors == pytest.approx([2.0, 1.0])
    assert by_name(document)["step time at 256 px, online over offline"]["kind"] == "given"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--preset mosaic-a100", "--preset: 'mosaic-a100' is unknown.*--preset mosaicml-a100"),
        ("--preset sd2-base", "nothing is known for 256 px.*train-step --presets sd2-base-256"),
        ("--preset sd2-base --images-per-sec 256=740", "nothing is known for 512 px"),
        ("--preset sd2-base --images-per-sec 256=nan 512=1", "--images-per-sec: nan"),
        ("--preset sd2-base --images-per-sec 256=inf 512=1", "--images-per-sec: inf"),
        ("--preset sd2-base --images-per-sec 256=-3 512=1", "--images-per-sec: -3"),
        ("--preset sd2-base --images-per-sec 768=3", "768=3; wanted a resolution among 256, 512"),
        ("--preset sd2-base --images-per-sec 256@0=3", "GPUs after the @"),
        ("--preset sd2-base --images-per-sec 256=3 256=4", "one number for each resolution"),
        ("--preset sd2-base --images-per-sec 256=5920 512=165", "TFLOP/s of a GPU.*256@<GPUs>"),
        ("--preset sd2-base --tflops 790", "--tflops and --mfu: one without the other"),
        ("--preset sd2-base --tflops 790 --mfu 1.5", "--mfu: 1.5"),
        ("--preset sd2-base --tflops 790 --mfu 0.5 --gpu-hours 9", "state the same thing"),
        ("--preset mosaicml-a100 --gpus 0", "--gpus: 0"),
        ("--preset mosaicml-a100 --gpus -8", "--gpus: -8"),
        ("--preset mosaicml-a100 --gpus 8 8", "each number once"),
        ("--preset mosaicml-a100 --gpus-per-node 0", "--gpus-per-node: 0"),
        ("--preset mosaicml-a100 --runs 0", "--runs: 0"),
        ("--preset mosaicml-a100 --years nan", "--years: nan"),
        ("--preset mosaicml-a100 --efficiency 1.1", "--efficiency: 1.1"),
        ("--preset mosaicml-a100 --efficiency 1e-300 --gpus 1000000", "--efficiency: 1e-300"),
        ("--preset mosaicml-a100 --egress-usd-per-tb 1e308 --json", "--egress-usd-per-tb: 1e"),
        ("--preset mosaicml-a100 --usd-per-gpu-hour 1e308 --json", "--usd-per-gpu-hour: 1e308"),
        ("--preset mosaicml-a100 --online-images-per-sec 1e-300", "images-per-sec: 1e-300"),
        ("--preset mosaicml-a100 --online-factor 1e308", "factor: 1e.*from 1 to 10"),
        ("--preset mosaicml-a100 --online-factor 0.5", "factor: 0.5; wanted a number from 1 to 10"),
        ("--preset mosaicml-a100 --storage-months -1", "--storage-months: -1"),
        ("--preset mosaicml-a100 --encode-usd-per-gpu-hour inf", "usd-per-gpu-hour: inf"),
        ("--preset mosaicml-a100 --usd-per-gpu-hour 0", "--usd-per-gpu-hour: 0"),
        ("--preset mosaicml-a100 --usd-per-gpu-hour a=2 a=3", "a name of its own"),
        ("--preset mosaicml-a100 --images 0", "--images: 0"),
        ("--preset mosaicml-a100 --images 1e40", "--images: 1e40"),
        ("--preset mosaicml-a100 --images many", "--images: many"),
        ("--preset mosaicml-a100 --epochs 2 --steps 5", "--epochs and --steps: state the same"),
        ("--preset mosaicml-a100 --encode-images-per-sec 256=9", "nothing for 512 px"),
        ("--preset mosaicml-a100 --plot plan.gif", "--plot: plan.gif"),
        ("--preset mosaicml-a100 --hardware h200", "nothing measured on 'h200'"),
        ("--images 5e6 --epochs 1", "--resolutions: not given"),
        ("--images 5e6 --resolutions 512", "--epochs: not given"),
        ("--resolutions 512 --epochs 1", "--images: nothing for 512 px"),
        ("--images 5e6 --resolutions 500 --epochs 1", "multiples of 8"),
        ("--images 5e6 --resolutions 512,512 --epochs 1", "each phase's once"),
        (
            "--images 5e6 --resolutions 512 --epochs 1 --online-factor 1 --images-per-sec 9",
            "no longer",
        ),
        (
            "--images 5e6 --resolutions 512 --epochs 1 --images-per-sec 9 "
            "--encode-usd-per-gpu-hour 1",
            "nothing says how fast they encode",
        ),
        ("--preset mosaicml-a100 --encode-usd-per-gpu-hour 0.8", "of those GPUs, with it"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(line, message):
    with pytest.raises(UserError, match=message):
        run(typed(line))


def test_online_steps_that_are_faster_than_offline_ones_are_pointed_out():
    line = "--preset mosaicml-a100 --online-images-per-sec 256@8=2200 512@8=200"
    found = [note for note in plan(typed(line))["notes"] if "faster than offline" in note]
    assert found == ["online steps at 256 px are faster than offline ones: is that so?"]


@pytest.mark.parametrize("bound", ["1e-9", "1e15"])
def test_no_numbers_that_are_let_in_together_overflow(bound, capsys):
    flags = ("usd-per-gpu-hour", "egress-usd-per-tb", "storage-usd-per-tb-month", "budget-usd")
    flags += ("storage-months", "encode-gpu-hours", "encode-usd-per-gpu-hour", "years")
    line = " ".join(f"--{flag} {bound}" for flag in flags)
    line += " --resolutions 512 --images 1e13 --images-per-sec 1e-9 --epochs 1e6 --json"
    line += " --gpus 1000000 --efficiency 0.1 --return-before-usd 1e-9 --return-after-usd 2e-9"
    run(typed(line))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["format"] == 1


# Scaling ------------------------------------------------------------------------------------------


def test_speed_between_and_beyond_known_numbers_of_gpus():
    curve = Curve({8: 100.0, 32: 80.0}, efficiency=0.9)
    assert curve.per_gpu(1) == 100
    assert curve.per_gpu(16) == pytest.approx(90)
    assert curve.per_gpu(32) == 80
    assert curve.per_gpu(128) == pytest.approx(80 * 0.9**2)
    assert Curve({1: 7.0}).per_gpu(1000) == 7


def test_a_thousand_gpus_lose_what_efficiency_says_and_it_is_said():
    document = plan(replace(OWN, gpus=(1, 1024), efficiency=0.97))
    one, many = (row["gpu_hours"] for row in document["training"])
    assert one / many == pytest.approx(0.97**10)
    assert by_name(document)["scaling efficiency"]["kind"] == "given"


# Measured results ---------------------------------------------------------------------------------


def write(path: Path, theme: str, *, hardware: str = "h200", **figures: Any) -> str:
    environment = {"hardware": hardware, "device": "NVIDIA H200", "num_devices": 1}
    environment |= {"commit": "abc1234"}
    document = {"format": 1, "theme": theme, "variant": "", "protocol": {}}
    document["environment"] = environment
    path.write_text(json.dumps({**document, **figures}))
    return str(path)


def row(preset: str, rate: float, **facts: Any) -> dict[str, Any]:
    return {
        "preset": preset,
        "loop": "latentmill",
        "micro_batch": 64,
        "precision": "bf16-weights",
        "ema": "on",
        "not_measured": None,
        "images_per_sec": {"median": rate, "p10": rate, "p90": rate},
        **facts,
    }


@pytest.fixture
def train_step(tmp_path):
    rows = [
        row("sd2-base-256", 700.0),
        row("sd2-base-256", 750.0),
        row("sd2-base-256", 760.0, ema="off"),
        row("sd2-base-256", 9000.0, loop="diffusers"),
        row("sd2-base-256", 0.0, not_measured="out of memory"),
        row("tiny", 5000.0),
        row("mlperf-sd2-512", 160.0, ema="off"),  # there is no other at 512
    ]
    return write(tmp_path / "train-step_h200_202611.json", "train-step", rows=rows)


@pytest.fixture
def bench(tmp_path):
    return four_arms(tmp_path, offline=[1.0, 1.0, 2.0], online=[1.5, 1.6, 3.0], ids=[1.1] * 3)


def four_arms(folder: Path, **sec_per_step: list[float]) -> str:
    arms = {
        arm: {"images_per_sec": {"median": 740 / sorted(secs)[1]}, "sec_per_step": secs}
        for arm, secs in sec_per_step.items()
    }
    return write(
        folder / "online-offline_h200_202611.json",
        "online-offline",
        preset="sd2-base-256",
        resolution=256,
        arms=arms,
        offline_speedup={"median": 1.5},
        stage1_images_per_sec=1300.0,
    )


def test_speeds_come_from_results_and_say_so(train_step, bench):
    document = plan(replace(SD2, results=(train_step, bench)))
    rates = [phase["images_per_sec"] / 8 for phase in document["training"][0]["phases"]]
    assert rates == pytest.approx([750.0, 160.0])  # the fastest of ours with a moving average
    factors = document["phases"][0]["factors"]
    assert factors == {
        "offline": 1.0,
        "online": pytest.approx(1.5),
        "ids": pytest.approx(1.1),
    }
    named = by_name(document)["img/s per GPU at 512 px, offline"]
    assert named["kind"] == "measured"
    for part in ("train-step_h200_202611.json", "mlperf-sd2-512", "NVIDIA H200", "abc1234"):
        assert part in named["words"]
    assert by_name(document)["step time at 512 px, online over offline"]["kind"] == "predicted"


def test_factors_are_of_blocks_that_ran_side_by_side(tmp_path):
    """Each arm's median is of another block: they would say 2x where no block says so."""
    path = four_arms(tmp_path, offline=[1.0, 1.0, 2.0], online=[1.2, 2.0, 2.4], ids=[1.0, 1.1, 2.2])
    document = plan(replace(SD2, results=(path,), tflops=790.0, mfu=0.5))
    factors = document["phases"][0]["factors"]
    assert factors == {
        "offline": 1.0,
        "online": pytest.approx(1.2),
        "ids": pytest.approx(1.1),
    }


def test_a_noisy_measurement_is_said_to_be_one(tmp_path):
    path = four_arms(tmp_path, offline=[1.0, 1.0, 1.0], online=[1.0, 1.5, 4.0], ids=[1.1, 1.1, 1.2])
    config = replace(SD2, results=(path,), tflops=790.0, mfu=0.5)
    (note,) = (note for note in plan(config)["notes"] if "noisy" in note)
    assert "the measurement was noisy, online over offline is 1.1 to 3.5" in note
    given = plan(replace(config, online_factor=1.4))["notes"]
    assert not any("noisy" in note for note in given)  # it is not used


def test_stage_one_is_measured_where_every_resolution_was(bench):
    config = replace(OWN, resolutions="256", images_per_sec=(), results=(bench,))
    document = plan(config)
    assert document["stage_one"][0]["kind"] == "measured"
    assert document["stage_one"][0]["gpu_hours"] == pytest.approx(4e6 / 1300 / 3600)
    assert plan(replace(SD2, results=(bench,), tflops=790.0, mfu=0.5))["stage_one"][0]["kind"] == (
        "predicted"
    )


def test_what_is_given_beats_what_was_measured(train_step):
    document = plan(replace(SD2, results=(train_step,), images_per_sec=("256=500",)))
    rates = [phase["images_per_sec"] / 8 for phase in document["training"][0]["phases"]]
    assert rates == pytest.approx([500.0, 160.0])


def test_measured_speeds_take_the_place_of_a_presets(train_step):
    document = plan(PlanConfig(preset="mosaicml-a100", results=(train_step,), gpus=(8,)))
    assert document["training"][0]["phases"][0]["images_per_sec"] == pytest.approx(6000)


def test_results_of_two_machines_are_not_mixed(train_step, tmp_path):
    rows = [row("sd2-base-256", 1.0), row("sd2-base-512", 0.2)]
    other = write(tmp_path / "slow.json", "train-step", hardware="epyc-2cpu", rows=rows)
    with pytest.raises(UserError, match="epyc-2cpu and of h200; wanted --hardware epyc-2cpu"):
        plan(replace(SD2, results=(train_step, other)))
    document = plan(replace(SD2, results=(train_step, other), hardware="epyc-2cpu"))
    assert document["training"][0]["phases"][0]["images_per_sec"] == pytest.approx(8)


def test_results_that_say_nothing_of_the_job_are_named(train_step, tmp_path):
    loader = write(tmp_path / "loader_h200_202611.json", "loader", rows=[])
    tiny = write(tmp_path / "train-step_tiny.json", "train-step", rows=[row("tiny", 1.0)])
    document = plan(replace(SD2, results=(train_step, loader, tiny)))
    assert (
        "nothing for this job in loader_h200_202611.json, train-step_tiny.json" in document["notes"]
    )


@pytest.mark.parametrize(
    "figures", [{}, {"rows": [{}]}, {"rows": 5}, {"rows": [row("sd2-base-256", float("nan"))]}]
)
def test_a_damaged_result_is_refused_by_name(tmp_path, figures):
    path = write(tmp_path / "bad.json", "train-step", **figures)
    with pytest.raises(UserError, match=r"bad\.json"):
        plan(replace(SD2, results=(path,)))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "is no benchmark's result"),
        ("[" * 100_000, "cannot be read"),
        (
            '{"format": 9, "theme": "", "variant": "", "protocol": {}, "environment": {}}',
            "format 9",
        ),
        (None, "cannot be read"),
    ],
)
def test_one_file_that_is_no_result_does_not_stop_the_plan(train_step, tmp_path, text, reason):
    bad = tmp_path / "bad.json"
    if text is not None:
        bad.write_text(text)
    document = plan(replace(SD2, results=(str(bad), train_step)))
    assert document["training"][0]["phases"][0]["images_per_sec"] == pytest.approx(6000)
    (note,) = (note for note in document["notes"] if "bad.json" in note)
    assert note.startswith("not used: ")
    assert reason in note
    loader = write(tmp_path / "loader.json", "loader")
    with pytest.raises(UserError, match=rf"none can be used: .*{reason}.*loader.json: nothing for"):
        plan(replace(OWN, results=(str(bad), loader), hardware="h200"))


def test_nothing_is_taken_of_a_result_that_is_damaged_in_part(train_step, tmp_path):
    rows = [row("sd2-base-256", 5000.0), row("sd2-base-512", float("nan"))]
    bad = write(tmp_path / "bad.json", "train-step", rows=rows)
    document = plan(replace(SD2, results=(train_step, bad)))
    assert document["training"][0]["phases"][0]["images_per_sec"] == pytest.approx(6000)
    assert any("bad.json" in note for note in document["notes"])


@pytest.mark.parametrize("secs", [[1.0, 2.0], [0.0] * 3, [], ["1"] * 3, [float("nan")] * 3, None])
def test_damaged_blocks_are_refused_by_name(tmp_path, secs):
    path = Path(four_arms(tmp_path, offline=[1.0] * 3, ids=[1.0] * 3))
    document = json.loads(path.read_text())
    document["arms"]["offline"]["sec_per_step"] = secs
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match="online-offline_h200"):
        plan(replace(OWN, results=(str(path),)))


_NO_OVERLAP = "efficiency_without_overlap"


def scaling(path: Path, *, num_gpus: int, rate_is: str) -> str:
    document = json.loads(Path(write(path, "scaling")).read_text())
    document["environment"]["num_devices"] = num_gpus
    document["protocol"] = {"preset": "sd2-base-512"}
    document["rows"] = [
        {"num_processes": n, "sharding": "none", "efficiency": {"median": e}, "not_measured": None}
        for n, e in ((1, 1.0), (2, 0.5))
    ]
    document["rows"].append({"num_processes": 4, "sharding": "none", "not_measured": "no GPUs"})
    document["predicted"] = {
        "assumptions": {"images_per_sec_is": rate_is},
        "rows": [
            {"num_devices": n, "sharding": sharding, "efficiency": 1.0, _NO_OVERLAP: share}
            for n, sharding, share in ((8, "zero2", 0.1), (8, "none", 0.96), (64, "none", 0.9))
        ],
    }
    path.write_text(json.dumps(document))
    return str(path)


def test_scaling_is_predicted_where_it_was_not_measured(tmp_path):
    path = scaling(tmp_path / "scaling.json", num_gpus=0, rate_is="given")
    document = plan(replace(OWN, gpus=(1, 2, 8, 64, 512), efficiency=0.9, results=(path,)))
    shares = [each["phases"][0]["efficiency"] for each in document["training"]]
    assert shares[2:] == pytest.approx([0.96, 0.9, 0.9 * 0.9**3])
    known = [each["phases"][0]["is_known_count"] for each in document["training"]]
    assert known == [True, False, False, False, False]
    assert shares[1] > 0.96  # two processes on one CPU say nothing of two GPUs
    found = [e for e in document["inputs"] if e["name"] == "scaling efficiency"]
    assert [entry["kind"] for entry in found] == ["predicted", "given"]
    assert "no communication hidden and its latency not counted" in found[0]["words"]


def test_scaling_that_was_measured_on_gpus_counts(tmp_path):
    path = scaling(tmp_path / "scaling.json", num_gpus=2, rate_is="measured here")
    document = plan(replace(OWN, gpus=(1, 2, 8), results=(path,)))
    shares = [each["phases"][0]["efficiency"] for each in document["training"]]
    assert shares == pytest.approx([1.0, 0.5, 0.96])


def test_a_cpus_speed_predicts_no_scaling_of_gpus(tmp_path):
    path = scaling(tmp_path / "scaling.json", num_gpus=0, rate_is="measured here")
    document = plan(replace(OWN, gpus=(1, 8), results=(path,)))
    assert by_name(document)["scaling efficiency beyond 1"]["kind"] == "assumed"
    assert any("scaling.json" in note for note in document["notes"])


def test_a_damaged_efficiency_is_refused_by_name(tmp_path):
    path = tmp_path / "scaling.json"
    scaling(path, num_gpus=2, rate_is="given")
    path.write_text(path.read_text().replace("0.96", "NaN"))
    with pytest.raises(UserError, match=r"scaling\.json: efficiencies"):
        plan(replace(OWN, results=(str(path),)))
