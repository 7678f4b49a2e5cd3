"""What of a machine's facts will hurt a training, each with its remedy."""

from __future__ import annotations

from collections.abc import Iterator

from shards.column import Json

_MIN_OPEN_FILES = 8192
_MIN_SHARED_MEMORY_GIB = 1.0
_MIN_DISK_GIB = 10.0
_BUSY_LOAD = 0.5  # per CPU


def find_warnings(facts: Json) -> list[dict[str, str]]:
    """`found` and `remedy` of each.

    Args:
        facts: of `facts.gather_facts`, with `compile` of `try_compile` if it was tried.
    """
    found = (*_of_gpus(facts), *_of_cpus(facts), *_of_limits(facts), *_of_compiling(facts))
    return [{"found": what, "remedy": remedy} for what, remedy in found]


def _of_gpus(facts: Json) -> Iterator[tuple[str, str]]:
    torch, gpus = facts["torch"], facts["gpus"]
    if gpus and not torch["built_for_cuda"]:
        yield (
            f"{len(gpus)} x {gpus[0]['name']}, and a torch that was built without CUDA",
            "install a CUDA build of torch (https://pytorch.org/get-started/locally/)",
        )
    elif len(gpus) > len(torch["devices"]):
        yield (
            f"torch sees {len(torch['devices'])} of {len(gpus)} GPUs (driver "
            f"{gpus[0]['driver_version']}, torch for CUDA {torch['built_for_cuda']})",
            "CUDA_VISIBLE_DEVICES, or a driver that is new enough for this torch",
        )
    if torch["devices"] and torch["pinned_memory"]:
        yield (
            f"host memory cannot be pinned ({torch['pinned_memory']}): copies to the GPU will wait",
            "ulimit -l unlimited; in a container --ulimit memlock=-1",
        )
    shared = facts["shared_memory"]
    if len(torch["devices"]) > 1 and shared and shared["total_gib"] < _MIN_SHARED_MEMORY_GIB:
        yield (
            f"/dev/shm has {shared['total_gib']} GiB: NCCL passes data between GPUs through it",
            "docker run --shm-size=8g, or --ipc=host",
        )


def _of_cpus(facts: Json) -> Iterator[tuple[str, str]]:
    quota, num_threads = facts["cpu"]["quota_cpus"], facts["torch"]["num_threads"]
    load, num_cpus = facts["cpu"]["load_average"], facts["cpu"]["num_usable"]
    if load > _BUSY_LOAD * num_cpus:
        yield (
            f"load average {load:.1f} on {num_cpus} CPUs before anything was measured: what is "
            "measured is too low",
            "measure again when the machine is idle",
        )
    if quota and num_threads > quota:
        yield (
            f"torch starts {num_threads} threads, and the container may use {quota:g} CPUs",
            f"OMP_NUM_THREADS={max(1, int(quota))}",
        )
    # A thread per core is right where a core counts as two CPUs.
    if not facts["torch"]["devices"] and num_threads < num_cpus / 2:
        yield (
            f"torch computes with {num_threads} threads on {num_cpus} CPUs",
            "unset OMP_NUM_THREADS, or raise it",
        )


def _of_limits(facts: Json) -> Iterator[tuple[str, str]]:
    limits, disk = facts["limits"], facts["disk"]
    open_files = limits["open_files"]
    if open_files is not None and open_files < _MIN_OPEN_FILES:
        highest = limits["open_files_max"]
        remedy = f"ulimit -n {highest or 65536}"
        if highest is not None and highest < _MIN_OPEN_FILES:
            remedy = "a higher nofile: limits.conf, docker run --ulimit nofile=65536"
        yield (
            f"a process may open {open_files} files; a dataset of many shards is read faster with "
            f"{_MIN_OPEN_FILES}",
            remedy,
        )
    if disk["free_gib"] < _MIN_DISK_GIB:
        yield (
            f"{disk['free_gib']} GiB free at {disk['path']}",
            "data and checkpoints on another disk: --data, --output-dir",
        )


def _of_compiling(facts: Json) -> Iterator[tuple[str, str]]:
    """What was tried says more than what is installed."""
    tried = facts.get("compile")
    if tried:
        if tried["reason"]:
            yield f"torch.compile does not work: {tried['reason']}", _compiling_remedy(facts)
    elif not facts["compilers"]["c++"] or not facts["compilers"]["cc"]:
        yield "no C++ compiler: --compile will not work", _compiling_remedy(facts)
    elif facts["torch"]["devices"] and not facts["packages"]["triton"]:
        yield "no Triton: --compile will not work on the GPU", _compiling_remedy(facts)


def _compiling_remedy(facts: Json) -> str:
    if not facts["compilers"]["c++"] or not facts["compilers"]["cc"]:
        return "apt-get install g++, or CXX=<compiler>; or train with --compile off"
    if facts["torch"]["devices"] and not facts["packages"]["triton"]:
        return "pip install triton; or train with --compile off"
    return "train with --compile off"
