"""What this machine is, what of it works, and what it reaches: the ceilings of every other figure.

Versions, devices, limits; the attention kernels and the compiler, found by running them; matrix
products and copies, measured for a few seconds each. What will hurt comes last, with its remedy.
How fast processes talk to each other is measured by `scaling`.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment.attention import probe_attention, time_attention
from benchmarks.environment.ceilings import (
    measure_convolutions,
    measure_copies,
    measure_file_reads,
    measure_matmuls,
)
from benchmarks.environment.facts import gather_facts, try_compile
from benchmarks.environment.hazards import find_warnings
from benchmarks.result import result
from shards.column import Json
from shards.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """Report the machine: versions, devices, what works, and what it reaches."""

    data: str = "data"
    """Folder whose disk counts; a temporary file in it is read, and removed at the end."""
    repeats: int = 3
    """Samples of each figure."""
    copy_mib: int = 256
    """Size of a copy, and of the temporary file."""
    attention_batch: int = 8
    """Images in the attention layers that are timed, on a GPU alone."""
    compile: bool = True
    """Try torch.compile, which takes some seconds; else only look for the compilers."""
    out: str = ""
    """File of the result; default: its place in benchmarks/results; `-`: none."""


def measure(config: EnvConfig) -> dict[str, Any]:
    """Look, run, measure, and return the result document.

    Raises:
        UserError: nothing to measure, or a folder that cannot be written.
    """
    import torch

    for name in ("repeats", "copy_mib", "attention_batch"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}", f"{getattr(config, name)}")
    data = _writable(Path(config.data))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = gather_facts(data)
    if config.compile:
        facts["compile"] = try_compile()
    attention = probe_attention(device)
    if device.type == "cuda":
        attention["layers"] = time_attention(device, config.attention_batch, config.repeats)
    num_bytes = config.copy_mib * 2**20
    copies = measure_copies(device, num_bytes, config.repeats)
    with tempfile.TemporaryDirectory(dir=data, prefix="env-") as folder:
        copies += measure_file_reads(Path(folder) / "bytes", num_bytes, config.repeats)
    return result(
        "env",
        config,
        facts=facts,
        attention=attention,
        matmuls=measure_matmuls(device, config.repeats),
        convolutions=measure_convolutions(config.repeats) if device.type == "cpu" else [],
        copies=copies,
        warnings=find_warnings(facts),
    )


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("--data", f"{folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError("--data", f"{folder} cannot be written", remedy="--data <another folder>")
    return folder


# For people ---------------------------------------------------------------------------------------


def print_table(document: dict[str, Any]) -> None:
    """The result for people."""
    env, facts = document["environment"], document["facts"]
    print("\nVersions")
    for name, version in {"python": env["python"], **env["versions"]}.items():
        _line(name, version)
    absent = [name for name, version in facts["packages"].items() if not version]
    _line("not installed", ", ".join(absent) or "-")
    _print_host(env, facts)
    _print_gpus(facts)
    _print_attention(document["attention"])
    _print_ceilings(document)
    for warning in document["warnings"]:
        print(f"warning: {warning['found']}\n  remedy: {warning['remedy']}")


def _print_host(env: Json, facts: Json) -> None:
    cpu, limits, disk = facts["cpu"], facts["limits"], facts["disk"]
    quota = f", {cpu['quota_cpus']:g} by quota" if cpu["quota_cpus"] else ""
    shared, locked = facts["shared_memory"], limits["locked_memory_bytes"]
    print("\nHost")
    _line("CPU", f"{env['cpu']}: {cpu['num_usable']} of {env['num_cpus']} usable{quota}")
    _line("instructions", " ".join(cpu["flags"]) or "-")
    _line("load average before", f"{cpu['load_average']:.2f}")
    _line("torch threads", facts["torch"]["num_threads"])
    _line("memory", f"{env['memory_gib']} GiB, {facts['memory_available_gib']} available")
    _line(f"disk at {disk['path']}", f"{disk['free_gib']} of {disk['total_gib']} GiB free")
    _line("/dev/shm", f"{shared['total_gib']} GiB" if shared else "-")
    _line("open files", f"{limits['open_files']} (up to {limits['open_files_max']})")
    _line("locked memory", "no limit" if locked is None else f"{locked / 2**20:.0f} MiB")
    for name, path in facts["compilers"].items():
        _line(f"{name} compiler", path or "none")
    if tried := facts.get("compile"):
        _line("torch.compile", tried["reason"] or f"works ({tried['sec']:.1f} s for one line)")


def _print_gpus(facts: Json) -> None:
    print("\nGPUs")
    torch = facts["torch"]
    _line(
        "torch was built for",
        f"CUDA {torch['built_for_cuda']}" if torch["built_for_cuda"] else "CPUs",
    )
    _line("pinned memory", (torch["pinned_memory"] or "yes").partition("; ")[0])
    for index, device in enumerate(torch["devices"]):
        _line(
            f"cuda:{index}",
            f"{device['name']}, {device['memory_gib']} GiB, compute capability "
            f"{device['compute_capability']}, {device['num_multiprocessors']} multiprocessors",
        )
    for gpu in facts["gpus"]:
        _line(
            f"GPU {gpu['index']} by nvidia-smi",
            f"driver {gpu['driver_version']}, {gpu['power.limit']} of {gpu['power.max_limit']}, "
            f"up to {gpu['clocks.max.sm']} and memory {gpu['clocks.max.memory']}, "
            f"PCIe {gpu['pcie.link.gen.max']} x{gpu['pcie.link.width.max']}",
        )
    if not facts["gpus"] and not torch["devices"]:
        print("  none")
    if facts["topology"]:
        print(facts["topology"])


def _print_attention(attention: Json) -> None:
    print(f"\nAttention kernels, {attention['dtype']}, forward and backward")
    for kernel, reason in attention["kernels"].items():
        _line(kernel, reason.partition(". ")[0] if reason else "runs")
    _line("torch itself picks", ", ".join(attention["torch_picks"]))
    for row in attention.get("layers", []):
        if row["not_measured"] is None:
            _line(f"{row['shape']}, {row['kernel']}", _rate(row["ms"], 1.0, "ms"))


def _print_ceilings(document: Json) -> None:
    print("\nCeilings")
    kinds = {"matrix products": "matmuls", "3x3 convolutions": "convolutions"}
    for kind, key in kinds.items():
        for row in document[key]:
            _line(f"{kind}, {row['name']}", row["not_measured"] or _best(row))
    for row in document["copies"]:
        shown = row["not_measured"] or _rate(row["bytes_per_sec"], 1e9, "GB/s")
        _line(row["name"], shown)
    if document["convolutions"]:
        print("  On a CPU convolutions may exceed products: torch takes them from two libraries.")
    print("  Copies: median, p10-p90, of bytes copied; the memory moves twice as many. Files: one")
    print("  thread; the disk's own host may know the pages that were dropped.")


def _best(row: Json) -> str:
    rate = row["best_flops_per_sec"] / 1e12
    return f"{rate:.3g} TFLOP/s, the best of {len(row['samples'])} tries of half a second"


def _line(name: str, value: object) -> None:
    print(f"  {name:<32} {value}")


def _rate(spread: dict[str, float], unit: float, name: str) -> str:
    median, low, high = (spread[key] / unit for key in ("median", "p10", "p90"))
    return f"{median:.3g} {name} ({low:.3g}-{high:.3g})"
