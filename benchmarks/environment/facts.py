"""What a machine says of itself, without measuring: CPUs, memory, disk, GPUs, limits, packages."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from pathlib import Path

from benchmarks.result import versions
from shards.column import Json
from train.host_memory import available_bytes

# Instructions that a CPU's matrix products and copies live on.
_CPU_FLAGS = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8", "amx_fp16", "asimd", "sve", "bf16", "i8mm"),
)
_SMI_FIELDS = (
    *("index", "name", "memory.total", "compute_cap", "driver_version"),
    *("power.limit", "power.max_limit", "clocks.max.sm", "clocks.max.memory"),
    *("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu"),
    *("pcie.link.gen.max", "pcie.link.width.max"),
)
_OPTIONAL_PACKAGES = ("xformers", "triton", "s3fs", "ray", "wandb", "tensorboard", "trackio")
_CPU_INFO, _CPU_QUOTA = Path("/proc/cpuinfo"), Path("/sys/fs/cgroup/cpu.max")
_SHARED_MEMORY = Path("/dev/shm")


def gather_facts(data: Path) -> Json:
    """All of it.

    Args:
        data: folder whose disk counts.
    """
    return {
        "cpu": cpu_facts(),
        "memory_available_gib": _memory_available_gib(),
        "disk": {"path": str(data), **_room(data)},
        "shared_memory": _room(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else None,
        "limits": _limits(),
        "gpus": ask_nvidia_smi(),
        "topology": _nvidia_smi("topo", "-m").rstrip(),
        "torch": torch_facts(),
        "compilers": {name: _compiler(name) for name in ("cc", "c++")},
        "packages": {name: versions(name).get(name) for name in _OPTIONAL_PACKAGES},
    }


# Host ---------------------------------------------------------------------------------------------


def cpu_facts(info: Path = _CPU_INFO, quota: Path = _CPU_QUOTA) -> Json:
    """How many CPUs may be used, how busy they are, and the instructions that they have.

    Args:
        info: the kernel's description of the CPUs.
        quota: `cpu.max` of the control group (version 2), where there is one.
    """
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    lines = (line.partition(":") for line in text.splitlines())
    words = next((rest for name, _, rest in lines if name.strip() in ("flags", "Features")), "")
    has = set(words.split())
    return {
        "num_usable": num_usable_cpus(),
        "quota_cpus": _quota_cpus(quota),
        "load_average": os.getloadavg()[0],  # of the last minute
        "flags": [flag for flag in _CPU_FLAGS if flag in has],
    }


def num_usable_cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quota_cpus(path: Path) -> float | None:
    """CPU time that a container may use, in CPUs; None where nothing bounds it."""
    if not path.exists():
        return None
    quota, period = path.read_text(encoding="utf-8").split()
    return None if quota == "max" else int(quota) / int(period)


def _memory_available_gib() -> float | None:
    return round(available_bytes() / 2**30, 1) if Path("/proc/meminfo").exists() else None


def _room(path: Path) -> Json:
    usage = shutil.disk_usage(path)
    return {"free_gib": round(usage.free / 2**30, 1), "total_gib": round(usage.total / 2**30, 1)}


def _limits() -> Json:
    soft, hard = (_finite(limit) for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return {"open_files": soft, "open_files_max": hard, "locked_memory_bytes": _finite(locked)}


def _finite(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit


def _compiler(name: str) -> str | None:
    """Path of a compiler as torch.compile and Triton look for it."""
    variable, names = {"cc": ("CC", ("gcc", "clang")), "c++": ("CXX", ("g++", "clang++"))}[name]
    if chosen := os.environ.get(variable):
        return shutil.which(chosen)
    return next((path for name in names if (path := shutil.which(name))), None)


# Devices ------------------------------------------------------------------------------------------


def ask_nvidia_smi() -> list[Json]:
    """A row for each NVIDIA GPU of the machine, whether torch can use it or not."""
    fields = ",".join(_SMI_FIELDS)
    lines = _nvidia_smi(f"--query-gpu={fields}", "--format=csv,noheader").splitlines()
    rows = [[value.strip() for value in line.split(",")] for line in lines]
    return [dict(zip(_SMI_FIELDS, row, strict=True)) for row in rows]


def _nvidia_smi(*arguments: str) -> str:
    """Its output; nothing where it is missing, or has no GPU to talk to."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return "" if done.returncode else done.stdout


def torch_facts() -> Json:
    """The devices that torch can use, and what torch was built for."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": device.name,
                "memory_gib": round(device.total_memory / 2**30, 1),
                "compute_capability": f"{device.major}.{device.minor}",
                "num_multiprocessors": device.multi_processor_count,
            }
        )
    return {
        "built_for_cuda": torch.version.cuda,
        "devices": devices,
        "num_threads": torch.get_num_threads(),
        "pinned_memory": _why_not_pinned(),
    }


def _why_not_pinned() -> str | None:
    """None where host memory can be pinned for copies to a GPU; else the reason."""
    import torch

    try:
        torch.empty(2**20, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return None


def try_compile() -> Json:
    """Compile a function of one line and run it; seconds it took, or why it does not work."""
    import time

    import torch

    from shards.errors import UserError
    from train.compilation import compile_errors

    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.perf_counter()
    try:
        with compile_errors():
            torch.compile(lambda x: x.sin() + 1)(torch.ones(64, device=device))
    except UserError as error:
        reason = str(error).partition(". Remedy: ")[0].removeprefix("--compile: ")
        return {"sec": None, "reason": reason}
    return {"sec": time.perf_counter() - began, "reason": None}
