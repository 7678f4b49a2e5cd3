"""What a machine can reach at most: matrix products, and copies between its memories and disk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.result import spread
from shards.column import Json

if TYPE_CHECKING:
    import torch

_COPIES = 8  # of a sample: launching one costs a GPU as much as copying some megabytes
_READ_BYTES = 8 * 2**20  # of a call
_NO_CPU_KERNEL = "float16 on a CPU: no kernel worth measuring"

Run = Callable[[], object]


def measure_matmuls(device: torch.device, repeats: int) -> list[Json]:
    """Square products of random numbers; a sample is the best within half a second.

    Args:
        device: where they run.
        repeats: samples of each kind.

    Returns:
        a row for each dtype: `samples` and `flops_per_sec`, or the reason in `not_measured`.
    """
    import torch

    kinds = [("float32", torch.float32, "highest")]
    if device.type == "cuda":
        kinds.append(("float32 as TF32", torch.float32, "high"))
    kinds += [("bfloat16", torch.bfloat16, "highest"), ("float16", torch.float16, "highest")]
    rows: list[Json] = []
    for name, dtype, precision in kinds:
        if device.type == "cpu" and dtype == torch.float16:
            rows.append({"name": name, "not_measured": _NO_CPU_KERNEL})
            continue
        samples = [_matmul_flops_per_sec(device, dtype, precision) for _ in range(repeats)]
        figures = {"samples": samples, "flops_per_sec": spread(samples)}
        rows.append({"name": name, "not_measured": None, **figures})
    return rows


def _matmul_flops_per_sec(device: torch.device, dtype: torch.dtype, precision: str) -> float:
    """As the trainer measures it for MFU, anew."""
    import torch

    from train.flops import matmul_flops_per_sec

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    matmul_flops_per_sec.cache_clear()
    try:
        return matmul_flops_per_sec(device, dtype)
    finally:
        torch.set_float32_matmul_precision(before)
        matmul_flops_per_sec.cache_clear()


def measure_copies(device: torch.device, num_bytes: int, repeats: int) -> list[Json]:
    """Copies between host and device; bytes copied, so the memory moves twice as many.

    Args:
        device: a CPU has the copy from host to host alone.
        num_bytes: of one copy.
        repeats: samples of each kind.
    """
    import torch

    def empty(**options: Any) -> torch.Tensor:
        return torch.ones(num_bytes, dtype=torch.uint8, **options)

    def copy(target: torch.Tensor, source: torch.Tensor) -> Run:
        return lambda: target.copy_(source, non_blocking=True)

    host = empty()
    runs = {"host to host": copy(empty(), host)}
    if device.type == "cuda":
        on_device, pinned = empty(device=device), empty(pin_memory=True)
        runs |= {
            "device to device": copy(empty(device=device), on_device),
            "host to device, pinned": copy(on_device, pinned),
            "host to device, pageable": copy(on_device, host),
            "device to host, pinned": copy(pinned, on_device),
        }
    return [_copy_row(name, run, num_bytes, repeats, device) for name, run in runs.items()]


def _copy_row(name: str, run: Run, num_bytes: int, repeats: int, device: torch.device) -> Json:
    samples = []
    for number in range(repeats + 1):
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(_COPIES):
            run()
        _synchronize(device)
        if number:  # the first one touches the pages
            samples.append(_COPIES * num_bytes / (time.perf_counter() - began))
    return {"name": name, "samples": samples, "bytes_per_sec": spread(samples)}


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_file_reads(path: Path, num_bytes: int, repeats: int) -> list[Json]:
    """Read a file of random bytes from start to end, with one thread.

    Once after the kernel was asked to forget its pages, which the disk's own host may still know,
    and once from the page cache.

    Args:
        path: a new file; the caller removes it.
        num_bytes: its size.
        repeats: samples of each kind.
    """
    with path.open("wb") as file:
        file.write(np.random.default_rng(0).bytes(num_bytes))
        file.flush()
        os.fsync(file.fileno())
    rows: list[Json] = []
    for name, forget in (("file, not in the page cache", True), ("file, in the page cache", False)):
        samples = [_read_bytes_per_sec(path, forget=forget) for _ in range(repeats)]
        rows.append({"name": name, "samples": samples, "bytes_per_sec": spread(samples)})
    return rows


def _read_bytes_per_sec(path: Path, *, forget: bool) -> float:
    buffer, num_bytes = bytearray(_READ_BYTES), 0
    with path.open("rb", buffering=0) as file:
        if forget:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        while read := file.readinto(buffer):
            num_bytes += read
        return num_bytes / (time.perf_counter() - began)
