"""Scaling: real processes, dying processes, and the arithmetic of what is predicted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from helpers_train import error_line

from benchmarks.scaling import scaling
from benchmarks.scaling.launch import _error_of, launch
from benchmarks.scaling.model import (
    Links,
    Payload,
    payload_of,
    predict,
    published_efficiencies,
)
from benchmarks.scaling.runs import Row, plan_rows
from benchmarks.scaling.scaling import (
    ScalingConfig,
    check_config,
    count_parameters,
    measure,
    print_table,
)
from shards.errors import UserError, reported

LINKS = Links(devices_per_node=4, intra_node_bytes_per_sec=10.0, inter_node_bytes_per_sec=5.0)
FREE = replace(LINKS, intra_node_bytes_per_sec=float("inf"), inter_node_bytes_per_sec=float("inf"))
GRADIENTS = Payload(all_reduce=100)
ZERO2 = Payload(reduce_scatter=100, all_gather=50)
COUNTS = (1, 2, 3, 4, 5, 8, 12, 16, 64, 512, 4096)
SMALL = ScalingConfig(
    processes=(2, 1000),
    shardings=("none", "zero2"),
    micro_batch_size=2,
    steps=1,
    warmup=1,
    blocks=2,
    rounds=1,
    num_samples=64,
    out="-",
)
DEADLINE_SEC = 60.0
# Of which no prediction can be computed, though each is a float.
NO_SPEEDS = (float("nan"), float("inf"), -float("inf"), -1.0, 1e-310, 1e300)


# The model ----------------------------------------------------------------------------------------


def test_a_ring_passes_all_but_one_part_within_the_node_and_then_between_nodes():
    assert LINKS.ring_sec(100, 1) == 0
    assert LINKS.ring_sec(100, 2) == pytest.approx(100 * 1 / 2 / 10)
    assert LINKS.ring_sec(100, 4) == pytest.approx(100 * 3 / 4 / 10)
    assert LINKS.ring_sec(100, 8) == pytest.approx(100 * 3 / 4 / 10 + 100 * 1 / 2 / 5)
    assert LINKS.ring_sec(100, 5) == LINKS.ring_sec(100, 8)  # a second node, barely used


def test_an_all_reduce_is_a_scatter_and_a_gather():
    assert GRADIENTS.sent_bytes(4) == pytest.approx(2 * 100 * 3 / 4)
    assert ZERO2.sent_bytes(4) == pytest.approx((100 + 50) * 3 / 4)
    whole = Payload(reduce_scatter=100, all_gather=100)
    for count in COUNTS:
        assert whole.sent_bytes(count) == pytest.approx(GRADIENTS.sent_bytes(count))


def test_efficiency_is_computed_by_hand():
    """Four devices: 15 s of all-reduce, 20 s of backward hide it; at 9 s a step they hide 6 s."""
    hidden = predict(4, 30.0, GRADIENTS, LINKS)
    assert hidden["communication_sec"] == pytest.approx(15)
    assert hidden["efficiency"] == 1
    assert hidden["efficiency_without_overlap"] == pytest.approx(30 / 45)
    exposed = predict(4, 9.0, GRADIENTS, LINKS)
    assert exposed["exposed_sec"] == pytest.approx(15 - 6)
    assert exposed["step_sec"] == pytest.approx(18)
    assert exposed["efficiency"] == pytest.approx(0.5)


def test_zero2_hides_weights_behind_the_forward_pass_and_gradients_behind_the_backward_pass():
    """Four devices: 7.5 s of gradients against 4 s, 3.75 s of weights against 2 s."""
    found = predict(4, 6.0, ZERO2, LINKS)
    assert found["exposed_sec"] == pytest.approx(3.5 + 1.75)
    assert found["communication_sec"] == pytest.approx(11.25)
    no_weights = predict(4, 6.0, replace(ZERO2, all_gather=0), LINKS)
    assert no_weights["exposed_sec"] == pytest.approx(3.5)


@pytest.mark.parametrize("payload", [GRADIENTS, ZERO2])
def test_one_device_and_free_links_lose_nothing(payload):
    for found in (predict(1, 1.0, payload, LINKS), predict(512, 1.0, payload, FREE)):
        assert found["efficiency"] == found["efficiency_without_overlap"] == 1.0
        assert found["communication_sec"] == 0.0


@pytest.mark.parametrize("payload", [GRADIENTS, ZERO2])
@pytest.mark.parametrize("key", ["efficiency", "efficiency_without_overlap"])
def test_more_devices_or_slower_links_never_help_and_overlap_never_hurts(payload, key):
    slower = replace(LINKS, inter_node_bytes_per_sec=LINKS.inter_node_bytes_per_sec / 3)
    found = [predict(count, 10.0, payload, LINKS) for count in COUNTS]
    values = [row[key] for row in found]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]
    for row in found:
        assert 0 < row["efficiency_without_overlap"] <= row["efficiency"] <= 1
        assert predict(row["num_devices"], 10.0, payload, slower)[key] <= row[key]
        assert predict(row["num_devices"], 99.0, payload, LINKS)[key] >= row[key]


def test_the_gradients_of_stable_diffusion_2_are_the_published_size():
    """1,731,821,448 B: the all-reduce by which MLPerf's submitters test their network."""
    num_parameters = count_parameters("sd2-base-512")
    assert payload_of(num_parameters, "none", low_weights=True).all_reduce == 1_731_821_448
    assert payload_of(num_parameters, "none", low_weights=False).all_reduce == 2 * 1_731_821_448
    zero2 = payload_of(num_parameters, "zero2", low_weights=True)
    assert zero2 == Payload(reduce_scatter=2 * 1_731_821_448, all_gather=1_731_821_448)


def test_published_efficiencies_are_those_of_the_published_tables():
    found = {
        (row["source"].partition(",")[0], "256" in row["source"], row["num_devices"]): row
        for row in published_efficiencies()
    }
    assert found["mosaicml/diffusion", True, 128]["efficiency"] == pytest.approx(0.66, abs=0.005)
    assert found["mosaicml/diffusion", False, 128]["efficiency"] == pytest.approx(0.99, abs=0.005)
    assert found["AWS", False, 512]["efficiency"] == pytest.approx(0.44, abs=0.005)
    assert all(row["against"] == 8 < row["num_devices"] for row in found.values())


# What is run --------------------------------------------------------------------------------------


def test_one_process_comes_first_and_what_has_no_device_is_a_row_with_the_reason():
    config = ScalingConfig(processes=(4, 2, 2), shardings=("none", "zero2"), micro_batch_size=8)
    rows = plan_rows(config, 2, "GPUs")
    cases = [(row.num_processes, row.sharding) for row in rows]
    assert cases == [(1, "none"), (2, "none"), (4, "none"), (2, "zero2"), (4, "zero2")]
    assert [row.global_batch_size for row in rows] == [8, 16, 32, 16, 32]
    assert [row.reason for row in rows[:2]] == ["", ""]
    assert rows[2].reason == rows[4].reason == "4 processes want 4 GPUs; 2 here"
    assert plan_rows(replace(config, processes=()), 2, "GPUs") == []


def test_strong_scaling_keeps_the_global_batch_or_says_why_it_cannot():
    rows = plan_rows(
        ScalingConfig(processes=(1, 2, 3, 4), micro_batch_size=8, strong=True), 9, "CPUs"
    )
    assert [row.global_batch_size for row in rows] == [32] * 4
    assert [bool(row.reason) for row in rows] == [False, False, True, False]
    assert "32 samples do not divide" in rows[2].reason


def test_a_machine_that_slows_down_between_rounds_does_not_look_like_bad_scaling():
    def visits(*rounds: list[float]) -> list[dict[str, Any]]:
        return [{"images_per_sec": rates, "data_wait_frac": [0.0]} for rates in rounds]

    base = Row(1, "none", 4, 4, visits=visits([10.0, 10.0], [5.0, 5.0]))
    found = Row(2, "none", 4, 8, visits=visits([18.0], [9.0])).to_json(base)
    assert found["efficiency_samples"] == pytest.approx([0.9, 0.9])
    assert found["efficiency"]["p10"] == pytest.approx(found["efficiency"]["p90"])
    assert found["images_per_sec"]["median"] == 13.5
    assert base.to_json(base)["efficiency"]["median"] == pytest.approx(1)
    not_run = Row(4, "none", 4, 16, reason="no room").to_json(base)
    assert not_run["not_measured"] == "no room"
    assert "images_per_sec" not in not_run


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"processes": (0, 2)}, "--processes"),
        ({"processes": ()}, "--images-per-sec"),
        ({"shardings": ()}, "--shardings"),
        ({"steps": 0}, "--steps"),
        ({"intra_node_gb_per_sec": 0.0}, "--intra-node-gb-per-sec"),
        ({"predict_devices": (8, -1)}, "--predict-devices"),
        ({"preset": "sd9"}, "sd9"),
        *(({"images_per_sec": speed}, "--images-per-sec: ") for speed in NO_SPEEDS),
        *(({"intra_node_gb_per_sec": speed}, "--intra-node-gb-per-sec: ") for speed in NO_SPEEDS),
        *(
            ({"inter_node_gbit_per_sec": speed}, "--inter-node-gbit-per-sec: ")
            for speed in NO_SPEEDS
        ),
        ({"processes": (), "images_per_sec": float("nan")}, "--images-per-sec: nan"),
        ({"predict_devices": (10**400,)}, "--predict-devices"),
    ],
)
def test_settings_that_make_no_run_are_refused_before_anything_starts(monkeypatch, change, says):
    monkeypatch.setattr("benchmarks.scaling.runs.launch", None)
    with pytest.raises(UserError, match=says):
        measure(replace(ScalingConfig(), **change))
    check_config(ScalingConfig())


def test_a_prediction_from_a_given_speed_starts_no_process_and_says_that_it_is_one(
    monkeypatch, capsys
):
    monkeypatch.setattr("benchmarks.scaling.runs.launch", None)
    document = measure(ScalingConfig(processes=(), images_per_sec=100.0, predict_devices=(1, 8)))
    assert document["rows"] == []
    assert document["variant"] == "tiny"
    predicted = document["predicted"]
    assert predicted["assumptions"]["images_per_sec_is"] == "given"
    assert predicted["assumptions"]["compute_sec"] == pytest.approx(0.16)
    assert predicted["assumptions"]["intra_node_bytes_per_sec"] == 450e9
    assert predicted["assumptions"]["inter_node_bytes_per_sec"] == 400e9
    assert [row["num_devices"] for row in predicted["rows"]] == [1, 8]
    assert predicted["rows"][0]["efficiency"] == 1.0
    print_table(document)
    shown = capsys.readouterr().out
    assert "PREDICTED, not measured" in shown
    assert "MEASURED on" not in shown


# Real processes -----------------------------------------------------------------------------------


def test_two_real_processes_are_measured_and_send_what_is_predicted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "num_usable_cpus", lambda: 2)
    document = measure(replace(SMALL, scratch=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []
    for part in ("rows", "communication", "predicted"):
        assert json.loads(json.dumps(document[part])) == document[part]
    assert document["threads_per_process"] == 1
    measured = {
        (row["num_processes"], row["sharding"]): row
        for row in document["rows"]
        if row["not_measured"] is None
    }
    assert list(measured) == [(1, "none"), (2, "none"), (2, "zero2")]
    for (count, _), row in measured.items():
        assert row["global_batch_size"] == 2 * count
        assert len(row["samples"]) == 2
        assert all(rate > 0 for rate in row["samples"])
    missing = [row for row in document["rows"] if row["not_measured"]]
    assert {row["num_processes"] for row in missing} == {1000}
    communication = document["communication"]
    for counted in communication["counted"]:
        expected = communication["payload_bytes"][counted["sharding"]]
        assert counted["payload_bytes"] == pytest.approx(expected, rel=0.005, abs=64)
    (all_reduce,) = communication["all_reduce"]
    assert all_reduce["backend"] == "gloo"
    assert len(all_reduce["samples"]) == 10
    assert all_reduce["bus_bytes_per_sec"]["median"] > 0
    print_table(document)
    shown = capsys.readouterr().out
    assert "1000 processes want 1000 CPUs; 2 here" in shown
    assert "processes on one CPU share its memory" in shown


# Processes that die -------------------------------------------------------------------------------

WAITING = """
import os, signal, sys, time
from pathlib import Path
folder, end = Path(sys.argv[1]), sys.argv[2]
sys.path[:0] = [os.getcwd()]
from train.launcher import follow_launcher
follow_launcher()
rank = os.environ.get("RANK", "0")
(folder / f"{rank}.part").write_text(str(os.getpid()))
(folder / f"{rank}.part").rename(folder / f"{rank}.pid")
if rank == "1" and end == "killed":
    while not (folder / "0.pid").exists():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(300)
"""


# The benchmark of two processes, which wait in the place of training.
SCALING = """
import sys
from benchmarks.__main__ import main
from benchmarks.scaling import runs, scaling
script, folder, scratch = sys.argv[1:]
scaling.num_usable_cpus = lambda: 2
launch = runs.launch
def wait(_, num_processes, *rest, **options):
    launch([script, folder, "waits"], 2, *rest, **options)
runs.launch = wait
main(["scaling", "--num-samples", "8", "--scratch", scratch, "--out", "-"])
"""


def write_waiting(folder: Path) -> Path:
    script = folder / "waiting.py"
    script.write_text(WAITING)
    return script


def process_ids(folder: Path) -> list[int]:
    """Of both processes, once they are there."""
    paths = [folder / "0.pid", folder / "1.pid"]
    deadline = time.monotonic() + DEADLINE_SEC
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, "the processes did not start"
        time.sleep(0.05)
    return [int(path.read_text()) for path in paths]


def has_ended(process: int) -> bool:
    """Gone, or a zombie that nobody has collected."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


def assert_all_end(processes: list[int]) -> None:
    deadline = time.monotonic() + DEADLINE_SEC
    try:
        while not all(has_ended(process) for process in processes):
            assert time.monotonic() < deadline, "a process was left"
            time.sleep(0.05)
    finally:
        for process in processes:
            if not has_ended(process):
                os.kill(process, signal.SIGKILL)


def test_a_process_that_is_killed_ends_all_with_one_line_and_status_2(tmp_path, capsys):
    script, log = write_waiting(tmp_path), tmp_path / "log"

    def run() -> None:
        with reported("bench"):
            launch([str(script), str(tmp_path), "killed"], 2, 1, on_gpu=False, log=log)

    line = error_line(capsys, run)
    assert line.startswith("bench: error: scaling --processes 2: process 1 was ended by SIGKILL")
    assert "--micro-batch-size" in line
    assert_all_end(process_ids(tmp_path))


def test_killing_the_command_leaves_no_process(tmp_path):
    script, log = write_waiting(tmp_path), tmp_path / "log"
    code = (
        "from pathlib import Path; from benchmarks.scaling.launch import launch; "
        f"launch([{str(script)!r}, {str(tmp_path)!r}, 'waits'], 2, 1, on_gpu=False, "
        f"log=Path({str(log)!r}))"
    )
    command = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    try:
        processes = process_ids(tmp_path)
    finally:
        command.kill()
        command.wait()
    assert_all_end(processes)


@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_ends_processes_and_command_in_one_line_and_leaves_nothing(
    tmp_path, number, to_all
):
    scratch = tmp_path / "scratch"
    command = subprocess.Popen(
        [sys.executable, "-c", SCALING, str(write_waiting(tmp_path)), str(tmp_path), str(scratch)],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    processes: list[int] = []
    try:
        processes = process_ids(tmp_path)
        assert len(list(scratch.iterdir())) == 1
        (os.killpg if to_all else os.kill)(command.pid, number)
        _, said = command.communicate(timeout=DEADLINE_SEC)
    finally:
        command.kill()
        command.wait()
        assert_all_end(processes)
    assert command.returncode == 128 + number
    assert said == f"bench: ended by {number.name}; there is no result\n"
    assert list(scratch.iterdir()) == []


def test_after_the_end_signals_are_what_they_were():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(UserError):
        measure(ScalingConfig(steps=0))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_one_process_that_fails_is_quoted_with_its_last_words(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("raise ValueError('no such thing')")
    with pytest.raises(
        UserError, match="--processes 1: the process died: ValueError: no such thing"
    ):
        launch([str(script)], 1, 1, on_gpu=False, log=tmp_path / "log")


def test_processes_get_their_threads_and_stay_off_the_gpu(tmp_path):
    script = tmp_path / "says.py"
    script.write_text(
        "import os\nassert os.environ['OMP_NUM_THREADS'] == '3'\n"
        "assert os.environ['ACCELERATE_USE_CPU'] == '1'\nprint('said')"
    )
    launch([str(script)], 1, 3, on_gpu=False, log=tmp_path / "log")
    assert (tmp_path / "log").read_text() == "said\n"


def test_the_error_of_the_first_process_that_died_is_quoted_not_that_of_the_others():
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def failure(rank: int, timestamp: int, last: str) -> ProcessFailure:
        failed = ProcessFailure(local_rank=rank, pid=7, exitcode=1, error_file="<N/A>")
        callstack = f"Traceback (most recent call last):\n  File 'x'\n{last}"
        failed.message = {"message": last, "extraInfo": {"py_callstack": callstack}}
        failed.timestamp = timestamp
        return failed

    failures = {
        0: failure(0, 20, "RuntimeError: connection closed by peer"),
        1: failure(1, 10, "shards.errors.UserError: --attention: flash does not run here"),
    }
    summary = f"noise\n{ChildFailedError('worker', failures)}\n"
    error = str(_error_of(summary, 1, 2))
    assert error.startswith("scaling --processes 2: process 1 died: ")
    assert error.endswith("--attention: flash does not run here")
    assert "connection closed" not in error


@pytest.mark.parametrize(
    ("log", "status", "expected"),
    [
        ("", 3, "the process ended with status 3"),
        ("", -15, "the process was ended by SIGTERM"),
        ("Traceback\n  File\nOSError: full\n\n", 1, "the process died: OSError: full"),
    ],
)
def test_what_little_is_known_of_a_death_is_said(log, status, expected):
    assert str(_error_of(log, status, 1)) == f"scaling --processes 1: {expected}"
