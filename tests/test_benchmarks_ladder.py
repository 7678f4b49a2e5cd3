"""The ladder of the training step: what stands, what is left out, and that no failure ends it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.train_step import host_room, ladder, ladder_row, resolved, runner, train_step
from benchmarks.train_step.case import ALL_OFF, SWITCHES, Case
from benchmarks.train_step.checks import NotTheSameError
from benchmarks.train_step.config import TrainStepConfig
from benchmarks.train_step.ladder import measure_ladder
from benchmarks.train_step.ladder_table import print_table
from benchmarks.train_step.remember import remember
from benchmarks.train_step.rungs import RUNG_NAMES, base_case, list_rungs, plain_case
from shards.column import Json
from shards.errors import UserError
from train.config import TrainConfig
from train.presets import preset
from train.tuned import read_tuned, tuned_path

CONFIG = TrainStepConfig(
    ladder=True,
    loops=("latentmill",),
    micro_batches=(8,),
    rounds=2,
    blocks=2,
    num_samples=64,
    max_minutes=60.0,
)
Speed = Callable[[Case], float]


class FakeArm:
    """Runs at a speed that depends on its case; see `FakeMachine`."""

    def __init__(self, machine: FakeMachine, case: Case, *, is_apart: bool) -> None:
        self._machine, self.case, self.is_apart = machine, case, is_apart
        self.trainer = SimpleNamespace(case=case)
        self.device, self.attention = torch.device("cpu"), "flash"
        self.plan: Json = {"notes": ()}
        self.flops_per_image, self.matmul_flops_per_sec = 1, 1000.0

    def run(self, num_steps: int) -> dict[str, float]:
        machine = self._machine
        machine.now += num_steps
        machine.ran.append(self.case)
        if self.is_apart:
            machine.ran_apart.append(self.case)
        if machine.room < sum(arm.case.micro_batch for arm in machine.alive):
            raise torch.OutOfMemoryError("CUDA out of memory")
        if error := machine.breaks(self.case):
            raise error
        speed = machine.speed(self.case) * machine.noise[len(machine.ran) % len(machine.noise)]
        return {
            "perf/images_per_sec": speed,
            "perf/iters_per_sec": speed,
            "perf/data_wait_frac": 0.0,
            "perf/peak_mem_gib": 1.0,
        }

    def close(self) -> None:
        self._machine.alive.remove(self)


class FakeMachine:
    """Takes the place of whatever takes time.

    Attributes:
        room: for so many samples of micro-batches at once.
        breaks: the error that running a case raises, if any.
        refuses: the text of the check that a case fails, if any.
        noise: factors that speeds go round.
        setup_sec: of a case.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.room = 0.0, 1000
        self.alive: list[FakeArm] = []
        self.ran: list[Case] = []
        self.ran_apart: list[Case] = []
        self.most_alive = 0
        self.speed: Speed = lambda case: 10.0
        self.breaks: Callable[[Case], Exception | None] = lambda case: None
        self.refuses: Callable[[Case], str] = lambda case: ""
        self.noise = [1.0]
        self.setup_sec: Callable[[Case], float] = lambda case: 0.0
        monkeypatch.setattr(runner, "open_arm", partial(self._open, is_apart=False))
        monkeypatch.setattr(runner, "RemoteArm", partial(self._open, is_apart=True))
        monkeypatch.setattr(ladder, "base_conv_search", lambda: "on")
        monkeypatch.setattr(runner, "release_memory", lambda **_: None)
        monkeypatch.setattr(ladder, "monotonic", lambda: self.now)
        monkeypatch.setattr(ladder, "write_latents", lambda path, *_: path)
        monkeypatch.setattr(ladder, "obstacle", lambda rung, case: "")
        monkeypatch.setattr(ladder, "Checks", lambda *_: self)

    def _open(self, case: Case, *_: Any, is_apart: bool) -> FakeArm:
        self.now += self.setup_sec(case)
        self.alive.append(arm := FakeArm(self, case, is_apart=is_apart))
        self.most_alive = max(self.most_alive, len(self.alive))
        return arm

    def short_training(self, case: Case) -> Json:
        return {"problems": [], "loss_frac": 0.0}

    def same_function(self, trainer: Any) -> list[Json]:
        refused = self.refuses(trainer.case)
        figures = {"cosine": 1.0, "worst_parameter_frac": 0.0}
        return [{**figures, "problems": [refused] if refused else []}]


@pytest.fixture
def machine(monkeypatch):
    return FakeMachine(monkeypatch)


def measured(config: TrainStepConfig, tmp_path: Path) -> tuple[Json, dict[str, Json]]:
    document = measure_ladder(config, tmp_path)
    json.dumps(document, allow_nan=False)
    return document, {row["rung"]: row for row in document["rows"]}


def verdicts(rows: dict[str, Json]) -> dict[str, str]:
    return {name: row["not_measured"] or row["verdict"] for name, row in rows.items()}


def remembered_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], dict[str, str]]:
    """Ladders keep what they find as on a GPU; what is kept is returned."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    device = torch.device("cuda")
    monkeypatch.setattr(ladder, "remember", lambda rows, case, _: remember(rows, case, device))
    return lambda: read_tuned(preset(CONFIG.presets[0]), device)


def only(*names: str) -> tuple[str, ...]:
    """`--stand-on` all rungs but these."""
    return tuple(name for name in RUNG_NAMES if name not in names)


# What stands --------------------------------------------------------------------------------------


def test_a_rung_that_pays_is_stood_on_and_one_that_does_not_is_left_out_of_those_after_it(
    machine, tmp_path
):
    def speed(case: Case) -> float:
        faster = (case.precision == "bf16-weights") + 2 * (case.fused_norms == "on")
        return 10.0 + faster - (case.channels_last == "on") + 4 * (case.compile == "full")

    machine.speed = speed
    document, rows = measured(CONFIG, tmp_path)
    assert verdicts(rows) == {
        "base": "base",
        "bf16-weights": "kept",
        "fused-update": "not told apart",
        "channels-last": "slower",
        "attention": "not told apart",
        "fused-norms": "kept",
        "fused-geglu": "not told apart",
        "batched-projections": "not told apart",
        "conv-search": "not told apart",
        "compile": "kept",
        "compile-without-kernels": "slower",
        "cuda-graph": "not told apart",
    }
    assert rows["attention"]["channels_last"] == "off", "it was slower"
    assert rows["fused-norms"]["channels_last"] == "on", "which these norms make worth it"
    assert rows["fused-norms"]["ratios"] == [12 / 11] * 4
    assert rows["fused-norms"]["before"] == "bf16-weights"
    assert rows["compile"]["before"] == "conv-search", "on fused-norms, and on unless slower"
    assert rows["channels-last"]["images_per_sec"]["median"] == 10.0
    assert rows["base"]["mfu"]["median"] == pytest.approx(10.0 / 1000)
    assert document["failed"] == []


def test_what_did_not_pay_is_kept_for_later_runs_and_what_was_not_tried_stays(
    machine, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    device = torch.device("cuda")
    monkeypatch.setattr(
        ladder, "remember", lambda rows, case, _: found.append(remember(rows, case, device))
    )
    found: list[Path | None] = []
    machine.speed = lambda case: 10.0 - (case.fused_geglu == "on") + 2 * (case.compile == "full")
    machine.refuses = lambda case: "a gradient is off" if case.batched_projections == "on" else ""
    measure_ladder(CONFIG, tmp_path / "first")
    config = preset(CONFIG.presets[0])
    off = read_tuned(config, device)
    assert off["fused_geglu"] == "slower in the ladder, 0.900x"
    assert off["fused_norms"] == "not told apart in the ladder, 1.000x"
    assert "a gradient is off" in off["batched_projections"]
    assert "compile" not in off
    assert off.keys() == {*SWITCHES} - {"channels_last", "conv_search"}, "what stands has them on"

    machine.speed = lambda case: 10.0 + (case.fused_geglu == "on")
    stand_on = only("fused-geglu", "batched-projections", "cuda-graph")
    measure_ladder(replace(CONFIG, stand_on=stand_on), tmp_path / "second")
    later = read_tuned(config, device)
    assert later.keys() == {"batched_projections", "cuda_graph"}
    assert found == [tuned_path(config, device)] * 2
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/1/nowhere")
    case = base_case("tiny", [8], "no", [], "off")
    assert remember([], case, device) is None, "and no ladder is lost for it"
    assert remember([], base_case("tiny", [8], "no", [], "off"), torch.device("cpu")) is None


def test_a_rung_and_the_one_before_it_run_in_turns_and_nothing_else_is_alive(machine, tmp_path):
    machine.speed = lambda case: 10.0 + (case.precision == "bf16-weights")
    measured(replace(CONFIG, stand_on=only("bf16-weights")), tmp_path)
    precisions = [case.precision for case in machine.ran if case.compile == "full"]
    alone = ["no"] * (2 + 4)  # warm-up and trial, then blocks
    beside = ["bf16-weights"] * 2 + ["no"] + ["bf16-weights", "no"] * 4  # one step to allocate
    assert precisions[: len(alone) + len(beside)] == alone + beside
    assert machine.most_alive == 2
    assert machine.alive == []


def test_what_noise_hides_is_not_told_apart_and_not_stood_on(machine, tmp_path):
    machine.speed = lambda case: 10.0 + 0.1 * (case.precision == "bf16-weights")
    machine.noise = [1.0, 1.05, 0.95, 1.02, 0.9]
    _, rows = measured(CONFIG, tmp_path)
    ratio = rows["bf16-weights"]["ratio"]
    assert ratio["p10"] < 1 < ratio["p90"]
    assert rows["bf16-weights"]["verdict"] == "not told apart"
    assert rows["fused-update"]["precision"] == "no"


def test_none_stands_on_an_ablation_and_the_table_says_that_it_was_faster(
    machine, tmp_path, capsys
):
    def speed(case: Case) -> float:
        compiled = case.compile == "full"
        return 10.0 + (case.fused_norms == "on") * (-2 if compiled else 1) + 5 * compiled

    machine.speed = speed
    document, rows = measured(CONFIG, tmp_path)
    assert rows["compile-without-kernels"]["verdict"] == "faster"
    assert rows["cuda-graph"]["fused_norms"] == "on"
    environment = {"device": "x", "versions": {"torch": "2"}}
    facts = {"variant": "tiny", "environment": environment, "protocol": vars(CONFIG)}
    print_table({**document, **facts})
    printed = capsys.readouterr().out
    assert "though none stands on it: compile-without-kernels" in printed


def test_larger_batches_come_last_on_what_stands(machine, tmp_path):
    machine.speed = lambda case: float(case.micro_batch)
    _, rows = measured(replace(CONFIG, micro_batches=(32, 8, 16)), tmp_path)
    assert list(rows)[-2:] == ["batch-16", "batch-32"]
    assert rows["base"]["micro_batch"] == 8
    assert rows["batch-32"]["before"] == "batch-16"
    assert rows["batch-32"]["ratio"]["median"] == 2.0


def test_a_ladder_stands_on_what_an_earlier_one_found(machine, tmp_path):
    _, rows = measured(replace(CONFIG, stand_on=("bf16-weights", "fused-norms")), tmp_path)
    assert not {"bf16-weights", "fused-norms"} & set(rows)
    assert (rows["base"]["precision"], rows["base"]["fused_norms"]) == ("bf16-weights", "on")


def test_the_base_has_every_switch_off_but_the_search_and_the_rungs_turn_each_on_once():
    searching = base_case("tiny", (4,), "no", (), "on")
    assert searching.switches() == {**ALL_OFF, "conv_search": "on"}
    assert plain_case(searching, "diffusers", 8).switches() == ALL_OFF
    case = base_case("tiny", (4,), "no", (), "off")
    assert case.switches() == ALL_OFF
    rungs = [rung for rung in list_rungs((4,), ()) if not rung.is_ablation]
    for rung in rungs:
        along = {"channels_last"} if rung.switch in ("fused_norms", "compile") else set()
        assert len(rung.changes.keys() - along) == 1
        assert not rung.switch or rung.changes[rung.switch] in ("on", "full")
        assert rung.on(case) != case
    assert sorted(rung.switch for rung in rungs if rung.switch) == sorted([*SWITCHES, "compile"])


# cuDNN's search ----------------------------------------------------------------------------------


def without_search_apart(machine: FakeMachine, speed: float) -> None:
    """Ours run at 10 images/s; in a process of its own without a search, at `speed`."""
    machine.speed = lambda case: speed if case.conv_search == "off" else 10.0


def test_what_searched_all_along_is_timed_beside_the_same_without_in_a_process_of_its_own(
    machine, tmp_path
):
    without_search_apart(machine, 8.0)
    _, rows = measured(CONFIG, tmp_path)
    assert rows["base"]["conv_search"] == "on"
    row = rows["conv-search"]
    assert (row["verdict"], row["conv_search"], row["ratios"]) == ("kept", "on", [10 / 8] * 4)
    assert row["before"] == "the same without, in a process of its own"
    assert row["checks"] == {}, "what stands was checked"
    assert list(rows).index("conv-search") == list(rows).index("compile") - 1
    assert {case.conv_search for case in machine.ran_apart} == {"off"}
    assert len(set(machine.ran_apart)) == 1, "none but this one"
    number = machine.ran.index(machine.ran_apart[0])
    turns = [case.conv_search for case in machine.ran[number : number + 10]]
    assert turns == ["off", "off"] + ["on", "off"] * 4, "warm-up, trial, and turns"
    steps = [case.conv_search for case in machine.ran[number - 2 : number]]
    assert steps == ["on"] * 2, "what stands has its memory before the process takes the rest"
    assert rows["compile"]["before"] == "conv-search", "built once, it goes on"
    assert machine.most_alive == 2
    assert machine.alive == []


@pytest.mark.parametrize(
    ("speed", "verdict", "later"),
    [(8.0, "kept", "on"), (10.0, "not told apart", "on"), (12.5, "slower", "off")],
)
def test_a_search_is_left_off_and_remembered_only_if_it_was_slower(
    machine, tmp_path, monkeypatch, speed, verdict, later
):
    off = remembered_off(monkeypatch, tmp_path)
    without_search_apart(machine, speed)
    document, rows = measured(CONFIG, tmp_path)
    assert rows["conv-search"]["verdict"] == verdict
    assert rows["conv-search"]["conv_search"] == "on", "it is what was timed"
    assert {rows[name]["conv_search"] for name in ("compile", "cuda-graph")} == {later}
    assert document["failed"] == []
    assert machine.alive == []
    reason = {"conv_search": "slower in the ladder, 0.800x"} if later == "off" else {}
    assert {k: v for k, v in off().items() if k == "conv_search"} == reason


def test_what_an_earlier_ladder_found_of_the_search_stays_until_it_is_measured_again(
    machine, tmp_path, monkeypatch
):
    off = remembered_off(monkeypatch, tmp_path)
    without_search_apart(machine, 12.5)
    measured(CONFIG, tmp_path)
    assert "conv_search" in off()
    monkeypatch.setattr(ladder, "obstacle", lambda rung, case: rung.switch and "not today")
    measured(CONFIG, tmp_path)
    assert "conv_search" in off()
    monkeypatch.setattr(ladder, "obstacle", lambda rung, case: "")
    without_search_apart(machine, 10.0)
    measured(CONFIG, tmp_path)
    assert "conv_search" not in off()


def test_a_process_without_a_search_that_dies_is_a_failed_row_and_the_search_stays_on(
    machine, tmp_path, monkeypatch
):
    off = remembered_off(monkeypatch, tmp_path)
    died = RuntimeError("the process of its own died")
    machine.breaks = lambda case: died if case.conv_search == "off" else None
    document, rows = measured(CONFIG, tmp_path)
    assert rows["conv-search"]["not_measured"] == "RuntimeError: the process of its own died"
    assert document["failed"] == ["conv-search"]
    assert rows["compile"]["conv_search"] == "on"
    assert "conv_search" not in off()
    assert machine.alive == []


def test_where_both_do_not_fit_the_process_without_a_search_runs_after_what_stands(
    machine, tmp_path
):
    machine.room = 10  # one of 8 alone
    without_search_apart(machine, 8.0)
    _, rows = measured(CONFIG, tmp_path)
    assert (rows["conv-search"]["verdict"], rows["conv-search"]["interleaved"]) == ("kept", False)
    assert len(machine.ran_apart) >= 4
    assert machine.alive == []


def test_the_plain_loop_leaves_no_plans_where_ours_search(machine, tmp_path, monkeypatch):
    config = replace(CONFIG, loops=("latentmill", "diffusers"), stand_on=RUNG_NAMES)
    measured(config, tmp_path)
    assert {case for case in machine.ran if case.loop != "latentmill"} == {*machine.ran_apart}
    machine.ran_apart.clear()
    monkeypatch.setattr(ladder, "base_conv_search", lambda: "off")
    measured(replace(config, stand_on=only("conv-search")), tmp_path)
    assert {case.loop for case in machine.ran_apart} <= {"latentmill"}


# The plain loop -----------------------------------------------------------------------------------


def test_the_plain_loop_is_taken_at_its_best_and_timed_again_beside_what_stands(machine, tmp_path):
    def speed(case: Case) -> float:
        if case.loop == "latentmill":
            return 40.0
        return case.micro_batch + 3.0 * (case.loop == "diffusers+channels-last")

    machine.speed = speed
    loops = ("latentmill", "diffusers")
    config = replace(CONFIG, micro_batches=(8, 16), loops=loops, stand_on=RUNG_NAMES)
    document, rows = measured(config, tmp_path)
    plain = [name for name in rows if name.startswith("diffusers")]
    assert plain == [
        f"{loop}, batch {size}"
        for loop in ("diffusers", "diffusers+channels-last", "diffusers+xformers")
        for size in (8, 16)
    ]
    assert document["final"]["before"] == "diffusers+channels-last, batch 16"
    assert document["final"]["ratios"] == [40 / 19] * 4
    assert rows["base"]["over_plain"]["median"] == pytest.approx(40 / 19)
    assert machine.alive == []


def test_a_batch_that_does_not_fit_is_a_row_and_larger_ones_are_not_tried(machine, tmp_path):
    machine.room = 20
    loops = ("latentmill", "diffusers")
    config = replace(CONFIG, micro_batches=(8, 32, 64), loops=loops)
    document, rows = measured(config, tmp_path)
    assert rows["diffusers, batch 32"]["not_measured"] == "out of memory"
    assert rows["diffusers, batch 64"]["not_measured"] == "not tried: out of memory at 32"
    assert rows["batch-32"]["not_measured"] == "out of memory"
    assert rows["batch-64"]["not_measured"] == "not tried: out of memory at 32"
    assert document["final"]["before"] == "diffusers, batch 8"
    assert document["failed"] == []


# Failures -----------------------------------------------------------------------------------------


def test_two_that_do_not_fit_at_once_run_one_after_the_other_and_it_says_so(machine, tmp_path):
    machine.room = 10  # one of 8 alone
    machine.speed = lambda case: 10.0 + 5 * (case.compile == "full")
    _, rows = measured(CONFIG, tmp_path)
    assert rows["compile"]["verdict"] == "kept"
    assert rows["compile"]["interleaved"] is False
    assert rows["compile"]["ratios"] == [1.5] * 4
    assert rows["compile-without-kernels"]["not_measured"] == "the same as compile"
    assert machine.alive == []


@pytest.mark.parametrize(
    ("error", "reason", "is_failure"),
    [
        (UserError("--compile", "no C++ compiler"), "--compile: no C++ compiler", False),
        (
            RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore"),
            "RuntimeError: CUDA error: operation not permitted when stream is capturing",
            True,
        ),
        (KeyError("no such kernel"), "KeyError: 'no such kernel'", True),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory", False),
    ],
)
def test_an_error_is_its_rungs_row_and_the_others_go_on_without_it(
    machine, tmp_path, error, reason, is_failure
):
    machine.breaks = lambda case: error if case.fused_norms == "on" else None
    machine.speed = lambda case: 10.0 + (case.fused_geglu == "on")
    document, rows = measured(CONFIG, tmp_path)
    assert rows["fused-norms"]["not_measured"] == reason
    assert rows["fused-norms"]["failed"] == is_failure
    assert rows["fused-geglu"]["verdict"] == "kept"
    assert rows["compile"]["fused_norms"] == "off"
    assert document["failed"] == (["fused-norms"] if is_failure else [])
    assert machine.alive == []


def test_a_rung_that_fails_its_check_is_never_timed(machine, tmp_path):
    machine.refuses = lambda case: "cosine 0.5" if case.fused_norms == "on" else ""
    document, rows = measured(CONFIG, tmp_path)
    assert "cosine 0.5" in rows["fused-norms"]["not_measured"]
    assert rows["fused-norms"]["failed"]
    assert "images_per_sec" not in rows["fused-norms"]
    assert rows["fused-norms"]["checks"]["same_function"][0]["problems"] == ["cosine 0.5"]
    assert all(case.fused_norms == "off" for case in machine.ran)
    assert document["failed"] == ["fused-norms"]


def test_without_a_base_nothing_of_ours_is_tried_and_there_is_still_a_result(machine, tmp_path):
    machine.breaks = lambda case: RuntimeError("no device") if case.loop == "latentmill" else None
    config = replace(CONFIG, loops=("latentmill", "diffusers"), profile=True)
    document, rows = measured(config, tmp_path)
    assert rows["base"]["not_measured"] == "RuntimeError: no device"
    assert rows["compile"]["not_measured"] == "not tried: there is nothing to stand on"
    assert document["failed"] == ["base"]
    assert document["final"] is None
    assert document["profile"] is None
    assert document["recommended_flags"] == []


def test_a_device_that_is_lost_fails_every_row_from_there_on_and_the_result_is_whole(
    machine, tmp_path, monkeypatch
):
    def lost(**_: Any) -> None:
        if any(case.fused_norms == "on" for case in machine.ran):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runner, "release_memory", lost)
    machine.breaks = lambda case: RuntimeError("lost") if case.fused_norms == "on" else None
    document, rows = measured(CONFIG, tmp_path)
    assert rows["fused-norms"]["not_measured"] == "RuntimeError: lost"
    assert "illegal memory access" in rows["close"]["not_measured"]
    assert len(rows) == 12 + 1
    assert document["failed"][0] == "fused-norms"


def test_a_failed_rung_is_exit_status_1_after_the_result(machine, tmp_path, monkeypatch, capsys):
    machine.refuses = lambda case: "wrong" if case.fused_norms == "on" else ""
    out = tmp_path / "result.json"
    places = ["--scratch", str(tmp_path / "scratch"), "--out", str(out), "--max-minutes", "60"]
    arguments = ["train-step", "--preset", "tiny", "--ladder", "--loops", "latentmill", *places]
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == json.loads(out.read_text())
    assert any("FAILED: " in line and "wrong" in line for line in printed)
    assert list((tmp_path / "scratch").iterdir()) == []


# Time ---------------------------------------------------------------------------------------------


def test_what_is_left_out_for_lack_of_time_is_the_least_important(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "_COMPILE_GUESS_SEC", 0.0)
    machine.speed = lambda case: 10.0 + (case.fused_norms == "on")
    config = replace(CONFIG, micro_batches=(8, 16), max_minutes=13.0)
    _, rows = measured(config, tmp_path)
    left_out = {name for name, row in rows.items() if row["not_measured"] == "left out: no time"}
    assert {"compile-without-kernels", "batch-16", "conv-search"} <= left_out
    assert not {"base", "bf16-weights", "fused-update", "compile", "cuda-graph"} & left_out
    assert machine.now <= 13 * 60


def test_no_time_is_kept_for_what_would_not_fit_anyway(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "_COMPILE_GUESS_SEC", 10_000.0)
    _, rows = measured(CONFIG, tmp_path)
    left_out = {name for name, row in rows.items() if row["not_measured"] == "left out: no time"}
    assert left_out == {"compile"}


def test_what_compiling_takes_is_not_learnt_from_a_rung_whose_graph_was_compiled_before(
    machine, tmp_path
):
    def setup_sec(case: Case) -> float:
        return 500.0 * (case.compile == "full" and case.cuda_graph == "off")

    machine.setup_sec = setup_sec
    machine.speed = lambda case: 10.0 + (case.compile == "full") + (case.cuda_graph == "on")
    config = replace(CONFIG, micro_batches=(8, 16), max_minutes=33.0)
    _, rows = measured(config, tmp_path)
    assert rows["cuda-graph"]["verdict"] == "kept"
    assert rows["batch-16"]["not_measured"] == "left out: no time"
    _, rows = measured(replace(config, max_minutes=60.0), tmp_path)
    assert rows["batch-16"]["verdict"] == "not told apart"


def test_with_no_time_at_all_every_rung_says_so(machine, tmp_path):
    _, rows = measured(replace(CONFIG, max_minutes=0.1), tmp_path)
    assert rows["base"]["not_measured"] == "left out: no time"
    assert all(row["not_measured"] for row in rows.values())
    assert machine.ran == []


# What is asked for --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"presets": ("tiny", "sd2-base-256")}, "--ladder: 2 presets"),
        ({"loops": ("diffusers",)}, "--loops: leaves our trainer out"),
        ({"check_steps": 19}, "--check-steps"),
        ({"stand_on": ("compile", "magic")}, "--stand-on: magic is unknown"),
        ({"stand_on": ("compile-without-kernels",)}, "--stand-on"),
    ],
)
def test_settings_that_make_no_ladder_are_refused_at_once(tmp_path, settings, where):
    with pytest.raises(UserError, match=where):
        train_step.measure(replace(CONFIG, **settings, scratch=str(tmp_path / "scratch")))
    assert not (tmp_path / "scratch").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_unet_that_would_end_the_hosts_memory_is_refused_with_what_it_takes(monkeypatch):
    monkeypatch.setattr(host_room, "available_bytes", lambda: 24 * 2**30)
    config = TrainStepConfig(presets=("sd2-base-512",), ladder=True)
    with pytest.raises(UserError, match=r"--ladder: .*24 GiB left.*45 GiB.*--preset tiny"):
        train_step.measure(config)
    host_room.check_host_room(preset("tiny"))


def test_the_micro_batches_of_a_gpu_depend_on_the_resolution_unless_they_are_named():
    ladder_512 = replace(CONFIG, presets=("sd2-base-512",), micro_batches=())
    assert ladder_512.with_micro_batches(on_gpu=True).micro_batches == (64, 96, 128)
    assert ladder_512.with_micro_batches(on_gpu=False).micro_batches == (16, 32)
    sweep = replace(ladder_512, ladder=False)
    assert sweep.with_micro_batches(on_gpu=True).micro_batches == (16, 32)
    assert CONFIG.with_micro_batches(on_gpu=True).micro_batches == (8,)


@pytest.mark.parametrize("name", ["fused-update", "attention", "conv-search", "cuda-graph"])
def test_a_rung_that_needs_a_gpu_says_so_without_one(name):
    case = base_case("tiny", (4,), "no", (), "off")
    rung = next(rung for rung in list_rungs((4,), ()) if rung.name == name)
    assert name.replace("-", "_") in resolved.obstacle(rung, rung.on(case))
    (weights, *_) = list_rungs((4,), ())
    assert resolved.obstacle(weights, weights.on(case)) == ""


def test_the_recommended_flags_are_those_that_differ_from_the_defaults_here():
    case = base_case("tiny", (4,), "no", (), "off")
    assert resolved.recommended_flags(replace(case, channels_last="on")) == [
        *("--micro-batch-size", "4")
    ]
    faster = replace(case, batched_projections="on", compile="full", precision="bf16-weights")
    flags = resolved.recommended_flags(faster)
    assert flags == [
        *("--micro-batch-size", "4", "--mixed-precision", "bf16-weights", "--compile", "full"),
        *("--channels-last", "off", "--batched-projections", "on"),
    ]
    known = {f"--{name.replace('_', '-')}" for name in TrainConfig.__dataclass_fields__}
    assert set(flags[::2]) <= known


def test_a_row_that_pays_is_faster_in_nine_of_ten_blocks():
    def judged(*ratios: float) -> str:
        row = ladder_row.RungRow("x", base_case("tiny", (4,), "no", (), "off"))
        row.blocks = [{"perf/images_per_sec": ratio} for ratio in ratios]
        row.before_blocks = [{"perf/images_per_sec": 1.0}] * len(ratios)
        return ladder_row.judge(row, is_ablation=False)

    assert judged(1.1, 1.2, 1.05) == "kept"
    assert judged(0.9, 1.2, 1.1) == "not told apart"
    assert judged(0.9, 0.8, 0.99) == "slower"
    assert judged(1.0, 1.0, 1.0) == "not told apart"


# The real thing -----------------------------------------------------------------------------------


def test_the_command_climbs_on_a_cpu_with_real_rows_and_a_profile(tmp_path, monkeypatch, capsys):
    out, trace = tmp_path / "result.json", tmp_path / "trace.json"
    short = ["--micro-batches", "2", "--warmup", "1", "--steps", "1", "--rounds", "1"]
    places = ["--num-samples", "64", "--scratch", str(tmp_path / "s"), "--out", str(out)]
    # Compiling would take longer than all the rest: there is no time for it.
    budget = ["--check-steps", "20", "--max-minutes", "1.8", "--profile", "--trace", str(trace)]
    stood_on = ["--stand-on", "channels-last"]
    arguments = ["train-step", "--preset", "tiny", "--ladder", *stood_on, *short, *budget, *places]
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    monkeypatch.setattr(ladder, "_COMPILE_GUESS_SEC", 1000.0)
    main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert (result["theme"], result["variant"]) == ("train-step-ladder", "tiny")
    assert result["failed"] == []
    rows = {row["rung"]: row for row in result["rows"]}
    for name in ("diffusers, batch 2", "base", "bf16-weights", "batched-projections"):
        assert len(rows[name]["blocks"]) == 2
        assert rows[name]["images_per_sec"]["median"] > 0
        assert (rows[name]["attention"], rows[name]["ran"]) == ("sdpa", "sdpa flash")
    for name in ("base", "bf16-weights", "batched-projections"):
        assert [found["poisoned"] for found in rows[name]["checks"]["same_function"]] == [0, 1]
        assert rows[name]["checks"]["short_training"]["num_steps"] == 20
    assert rows["batched-projections"]["plan"]["batched_projections"] is True
    assert rows["compile"]["not_measured"] == "left out: no time"
    assert "no CUDA device" in rows["fused-update"]["not_measured"]
    assert rows["conv-search"]["not_measured"] == "conv_search off: no CUDA device"
    assert rows["base"]["conv_search"] == "off"
    assert result["final"]["before"].startswith("diffusers")
    assert result["recommended_flags"][:2] == ["--micro-batch-size", "2"]
    assert "convolution forward" in {row["kind"] for row in result["profile"]["kinds"]}
    assert json.loads(trace.read_text())["traceEvents"]


def test_a_check_that_is_refused_names_the_first_problems_alone():
    from benchmarks.train_step.checks import refuse_problems

    refuse_problems([{"problems": []}])
    with pytest.raises(NotTheSameError, match="a; b; c and 2 more"):
        refuse_problems([{"problems": ["a", "b"]}, {"problems": ["c", "d", "e"]}])
