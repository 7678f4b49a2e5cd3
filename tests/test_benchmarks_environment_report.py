"""The report of a machine: what it says, what really runs, and what it warns of."""

from __future__ import annotations

import copy
import itertools
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.environment import attention as environment_attention
from benchmarks.environment import ceilings as environment_ceilings
from benchmarks.environment.attention import KERNELS, probe_attention, time_attention
from benchmarks.environment.ceilings import (
    measure_convolutions,
    measure_copies,
    measure_file_reads,
    measure_matmuls,
)
from benchmarks.environment.environment import EnvConfig, measure, print_table
from benchmarks.environment.facts import ask_nvidia_smi, cpu_facts, gather_facts, try_compile
from benchmarks.environment.hazards import find_warnings
from shards.errors import UserError

CPU = torch.device("cpu")
GPU = {
    "index": "0",
    "name": "NVIDIA H200",
    "driver_version": "570.1",
    **dict.fromkeys(("power.limit", "power.max_limit"), "700.00 W"),
    **dict.fromkeys(("clocks.max.sm", "clocks.max.memory"), "1980 MHz"),
    **dict.fromkeys(("pcie.link.gen.max", "pcie.link.width.max"), "5"),
}
CUDA_DEVICE = {
    "name": "NVIDIA H200",
    "memory_gib": 139.8,
    "compute_capability": "9.0",
    "num_multiprocessors": 132,
}
# A machine with one GPU that nothing is wrong with.
GOOD: dict[str, Any] = {
    "cpu": {"num_usable": 16, "quota_cpus": None, "load_average": 0.5, "flags": []},
    "memory_available_gib": 100.0,
    "disk": {"path": "/data", "free_gib": 900.0, "total_gib": 1000.0},
    "shared_memory": {"free_gib": 64.0, "total_gib": 64.0},
    "limits": {"open_files": 65536, "open_files_max": 65536, "locked_memory_bytes": None},
    "gpus": [GPU],
    "topology": "",
    "torch": {
        "built_for_cuda": "12.8",
        "devices": [CUDA_DEVICE],
        "num_threads": 16,
        "pinned_memory": None,
    },
    "compilers": {"cc": "/usr/bin/gcc", "c++": "/usr/bin/g++"},
    "packages": {"triton": "3.4", "xformers": None},
}


def fake_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """`clock(module)`: each look at that module's clock comes two seconds after the last one."""

    def install(module: Any) -> None:
        ticks = itertools.count(0, 2)
        fake = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
        monkeypatch.setattr(module, "time", fake)

    return install


# The whole ----------------------------------------------------------------------------------------


def test_a_report_says_what_runs_and_how_fast_and_leaves_nothing_behind(tmp_path, capsys):
    precision = torch.get_float32_matmul_precision()
    config = EnvConfig(data=str(tmp_path / "new"), repeats=2, copy_mib=1, compile=False, out="-")
    document = measure(config)
    assert list((tmp_path / "new").iterdir()) == []
    assert torch.get_float32_matmul_precision() == precision
    assert json.loads(json.dumps(document)) == document
    assert document["theme"] == "env"
    rates = {row["name"]: row for row in document["matmuls"]}
    assert rates["float32"]["flops_per_sec"]["median"] > 1e8
    convolutions = document["convolutions"]
    assert [row["name"] for row in convolutions] == ["float32", "bfloat16"]
    for row in (*document["copies"], rates["float32"], rates["bfloat16"], *convolutions):
        assert len(row["samples"]) == 2
        assert all(sample > 0 for sample in row["samples"])
    assert any(reason is None for reason in document["attention"]["kernels"].values())
    print_table(document)
    shown = capsys.readouterr().out
    for expected in (
        *("matrix products, float32", "3x3 convolutions, float32", "the best of 2 tries"),
        *("host to host", "xformers", "open files", "load average"),
    ):
        assert expected in shown


@pytest.mark.parametrize("change", [{"repeats": 0}, {"copy_mib": 0}, {"attention_batch": -1}])
def test_nothing_to_measure_is_refused(tmp_path, change):
    (name,) = change
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}"):
        measure(EnvConfig(data=str(tmp_path), **change))


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(UserError, match="--data"):
        measure(EnvConfig(data=str(tmp_path / "data")))


def test_a_gpus_report_prints_devices_topology_and_kernels_that_do_not_run_its_layers(capsys):
    facts = copy.deepcopy(GOOD) | {"topology": "GPU0 X NV18", "compile": {"sec": 3, "reason": None}}
    figures = {"median": 2.0, "p10": 1.5, "p90": 2.5}
    row = {"shape": "64x64 self", "kernel": "flash", "not_measured": None, "ms": figures}
    missing = {"shape": "64x64 self", "kernel": "cudnn", "not_measured": "no engine"}
    attention = {"dtype": "bfloat16", "torch_picks": ["flash"], "kernels": {"flash": None}}
    env = {"python": "3.11", "versions": {}, "cpu": "x", "num_cpus": 16, "memory_gib": 128}
    print_table(
        {
            "environment": env,
            "facts": facts,
            "attention": {**attention, "layers": [row, missing]},
            "matmuls": [],
            "convolutions": [],
            "copies": [{"name": "file", "not_measured": "64 MiB cannot be written: disk full"}],
            "warnings": [{"found": "trouble", "remedy": "repair"}],
        }
    )
    shown = capsys.readouterr().out
    for expected in ("NV18", "700.00 W", "139.8 GiB", "2 ms (1.5-2.5)", "trouble", "repair"):
        assert expected in shown
    assert "64 MiB cannot be written: disk full" in shown


# What the machine says ----------------------------------------------------------------------------


def test_flags_and_quota_are_read_as_the_kernel_writes_them(tmp_path):
    info, quota = tmp_path / "cpuinfo", tmp_path / "cpu.max"
    info.write_text("model name\t: Big\nflags\t\t: fpu avx2 amx_bf16 avx512_bf16x\n\nflags : sve\n")
    quota.write_text("150000 100000\n")
    facts = cpu_facts(info, quota)
    assert facts["flags"] == ["avx2", "amx_bf16"]
    assert facts["quota_cpus"] == 1.5
    assert 1 <= facts["num_usable"] <= (os.cpu_count() or 1)


def test_an_arm_cpu_names_its_instructions_otherwise_and_nothing_need_be_there(tmp_path):
    info, quota = tmp_path / "cpuinfo", tmp_path / "cpu.max"
    info.write_text("Features\t: fp asimd bf16\n")
    quota.write_text("max 100000\n")
    assert cpu_facts(info, quota)["flags"] == ["asimd", "bf16"]
    assert cpu_facts(info, quota)["quota_cpus"] is None
    bare = cpu_facts(tmp_path / "none", tmp_path / "none")
    assert bare["flags"] == []
    assert bare["quota_cpus"] is None


def test_every_gpu_that_nvidia_smi_lists_is_a_row(tmp_path, monkeypatch):
    row = "H200, 143771 MiB, 9.0, 570.1, 700.00 W, 700.00 W, 1980 MHz, 3201 MHz, 345 MHz, 1 MHz"
    lines = "".join(f"{index}, {row}, 75.2 W, 30, 5, 16\\n" for index in (0, 1))
    fake_nvidia_smi(tmp_path, monkeypatch, f"printf '{lines}'")
    gpus = ask_nvidia_smi()
    assert [gpu["index"] for gpu in gpus] == ["0", "1"]
    assert gpus[1]["name"] == "H200"
    assert gpus[1]["power.limit"] == "700.00 W"
    assert gpus[1]["pcie.link.width.max"] == "16"


def test_an_nvidia_smi_that_fails_lists_nothing(tmp_path, monkeypatch):
    fake_nvidia_smi(tmp_path, monkeypatch, "echo 'NVIDIA-SMI has failed'; exit 9")
    assert ask_nvidia_smi() == []


def test_gpus_that_this_torch_was_not_built_for_are_warned_of(tmp_path, monkeypatch):
    row = "0, H200" + ", x" * 13
    fake_nvidia_smi(tmp_path, monkeypatch, f"echo '{row}'")
    monkeypatch.setattr(torch.version, "cuda", None)
    (warning, *_) = find_warnings(gather_facts(tmp_path))
    assert "1 x H200" in warning["found"]
    assert "without CUDA" in warning["found"]


def test_a_compiler_that_fails_is_a_reason_and_no_crash(monkeypatch):
    def broken(_: Any) -> Any:
        from torch._dynamo.exc import TorchDynamoException

        def run(_: torch.Tensor) -> None:
            raise TorchDynamoException("no g++ anywhere\nand much more")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    tried = try_compile()
    assert tried == {"sec": None, "reason": "no g++ anywhere"}


# Warnings -----------------------------------------------------------------------------------------


def test_a_good_machine_is_warned_of_nothing():
    assert find_warnings(GOOD) == []
    assert find_warnings({**GOOD, "compile": {"sec": 4.0, "reason": None}}) == []


@pytest.mark.parametrize(
    ("path", "value", "found", "remedy"),
    [
        ("torch.built_for_cuda", None, "without CUDA", "CUDA build"),
        ("torch.devices", [], "sees 0 of 1", "CUDA_VISIBLE_DEVICES"),
        ("torch.pinned_memory", "Operation not permitted", "not permitted", "ulimit -l"),
        ("limits.open_files", 1024, "1024 files", "ulimit -n 65536"),
        ("limits", {"open_files": 1024, "open_files_max": 2048}, "1024", "--ulimit nofile"),
        ("limits", {"open_files": 1024, "open_files_max": None}, "1024", "ulimit -n 65536"),
        ("disk.free_gib", 3.5, "3.5 GiB free at /data", "--data"),
        ("cpu.quota_cpus", 2.0, "may use 2 CPUs", "OMP_NUM_THREADS=2"),
        ("cpu.quota_cpus", 0.5, "may use 0.5 CPUs", "OMP_NUM_THREADS=1"),
        ("cpu.load_average", 8.1, "load average 8.1 on 16 CPUs", "idle"),
        ("compilers.c++", None, "no C++ compiler", "g++"),
        ("packages.triton", None, "no Triton", "pip install triton"),
        ("compile", {"sec": None, "reason": "ptxas is missing"}, "ptxas", "--compile off"),
    ],
)
def test_what_will_hurt_is_said_once_with_its_remedy(path, value, found, remedy):
    facts = copy.deepcopy(GOOD)
    *groups, name = path.split(".")
    place = facts
    for group in groups:
        place = place[group]
    place[name] = value
    (warning,) = find_warnings(facts)
    assert found in warning["found"]
    assert remedy in warning["remedy"]


def test_little_shared_memory_hurts_only_several_gpus():
    facts = copy.deepcopy(GOOD) | {"shared_memory": {"free_gib": 0.1, "total_gib": 0.1}}
    assert find_warnings(facts) == []
    facts["torch"]["devices"] *= 2
    (warning,) = find_warnings(facts)
    assert "/dev/shm has 0.1 GiB" in warning["found"]


def test_one_thread_on_many_cpus_hurts_only_where_there_is_no_gpu():
    facts = copy.deepcopy(GOOD)
    facts["torch"]["num_threads"] = 1
    assert find_warnings(facts) == []
    facts["gpus"], facts["torch"]["devices"] = [], []
    (warning,) = find_warnings(facts)
    assert "1 threads on 16 CPUs" in warning["found"]


# Attention ----------------------------------------------------------------------------------------


def test_kernels_that_run_and_those_that_do_not_with_the_reason():
    found = probe_attention(CPU)
    assert set(found["kernels"]) == set(KERNELS)
    assert found["kernels"]["math"] is None
    assert found["kernels"]["cudnn"]
    assert found["kernels"]["xformers"]
    assert found["dtype"] == "float32"
    assert set(found["torch_picks"]) <= {"flash", "math"}


def test_a_kernel_in_whose_place_another_one_ran_does_not_run(monkeypatch):
    monkeypatch.setattr("train.attention.kernel_of", lambda run: run() or "math")
    kernels = probe_attention(CPU)["kernels"]
    assert kernels["math"] is None
    assert "math ran in its place" in kernels["flash"]


def test_kernels_are_timed_in_turns_and_those_that_do_not_run_are_rows(monkeypatch):
    order: list[str] = []

    def milliseconds(trial: Any) -> float:
        processor = trial.layers[0].processor
        order.append(processor.backend.name)
        return float(len(order))

    monkeypatch.setattr("train.attention.milliseconds_on_gpu", milliseconds)
    monkeypatch.setattr(environment_attention, "_SD2", {"2x2 self": (4, 64, False)})
    rows = {row["kernel"]: row for row in time_attention(CPU, batch_size=1, repeats=2)}
    assert order == ["FLASH_ATTENTION", "MATH"] * 2
    assert rows["flash"]["samples"] == [1.0, 3.0]
    assert rows["math"]["ms"]["median"] == 3.0
    assert rows["cudnn"]["not_measured"]
    assert "ms" not in rows["cudnn"]


# Ceilings -----------------------------------------------------------------------------------------


def test_each_sample_of_a_product_is_measured_anew(monkeypatch):
    monkeypatch.setattr("train.flops._SECONDS", 1e-9)
    monkeypatch.setitem(__import__("train.flops").flops._SIDE, "cpu", 64)
    rows = {row["name"]: row for row in measure_matmuls(CPU, repeats=4)}
    assert len(set(rows["float32"]["samples"])) > 1  # a cached figure would repeat itself
    assert "not_measured" in rows["float16"]
    assert "samples" not in rows["float16"]
    assert "float32 as TF32" not in rows


def test_the_precision_of_products_is_as_before_even_when_one_fails(monkeypatch):
    def fails(*_: object) -> float:
        assert torch.get_float32_matmul_precision() == "highest"
        raise RuntimeError("out of memory")

    fails.cache_clear = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr("train.flops.matmul_flops_per_sec", fails)
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            measure_matmuls(CPU, repeats=1)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_convolutions_rate_is_that_of_its_best_try_and_the_best_of_all_is_kept(monkeypatch):
    """Seconds of the tries: 0.4 and 0.2 of one sample, then 0.1 and 0.9 of the other."""
    looks = iter([0, 0.4, 1, 1.2, 2, 2.1, 3, 3.9] * 2)
    fake = SimpleNamespace(perf_counter=lambda: next(looks))
    monkeypatch.setattr(environment_ceilings, "time", fake)
    monkeypatch.setattr(environment_ceilings, "_CONVOLUTION", (2, 3, 5))
    flops = 2 * (2 * 3 * 5 * 5) * (3 * 3 * 3)  # outputs, each of 3 channels of 3x3
    for row in measure_convolutions(repeats=2):
        assert row["samples"] == pytest.approx([flops / 0.2, flops / 0.1])
        assert row["best_flops_per_sec"] == max(row["samples"])


def test_a_disk_that_does_not_take_the_file_is_a_row_with_the_reason(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        rows = measure_file_reads(tmp_path / "file", 2 * 2**20, repeats=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert rows == [{"name": "file", "not_measured": "2 MiB cannot be written: File too large"}]


def test_a_copys_rate_counts_the_bytes_that_arrive(clock):
    clock(environment_ceilings)
    (row,) = measure_copies(CPU, num_bytes=1000, repeats=3)
    assert row["name"] == "host to host"
    assert row["samples"] == [8 * 1000 / 2] * 3


def test_a_files_rate_counts_all_its_bytes_with_and_without_the_page_cache(tmp_path, clock):
    clock(environment_ceilings)
    num_bytes = 9 * 2**20 + 1  # more than a call reads
    rows = measure_file_reads(tmp_path / "file", num_bytes, repeats=2)
    assert (tmp_path / "file").stat().st_size == num_bytes
    assert [row["samples"] for row in rows] == [[num_bytes / 2] * 2] * 2
    assert len({row["name"] for row in rows}) == 2
