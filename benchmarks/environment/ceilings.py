"""What a machine reaches at most: products, convolutions, copies between its memories and disk."""

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
_CONVOLUTION = (4, 512, 32)  # batch, channels, side: a 3x3 layer as U-Net and VAE have them
_CONVOLUTION_SEC = 0.5  # of tries, as of products
_NO_CPU_KERNEL = "float16 on a CPU: no kernel worth measuring"

Run = Callable[[], object]


def measure_matmuls(device: torch.device, repeats: int) -> list[Json]:
    """Square products of random numbers; a sample is the best within half a second.

    Args:
        device: where they run.
        repeats: samples of each kind.

    Returns:
        a row for each dtype: `samples`, `flops_per_sec` and the best of them all, or the reason in
        `not_measured`.
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
        rows.append(_flops_row(name, samples))
    return rows


def measure_convolutions(repeats: int) -> list[Json]:
    """3x3 convolutions on the CPU, channels last, in rows as those of `measure_matmuls`.

    There torch takes float32 products from one library and convolutions from another, and what
    reaches the highest instructions of one maker's CPUs in one need not in the other: what consists
    of convolutions may exceed the products. On a GPU the products are the ceiling of both.
    """
    import torch

    return [
        _flops_row(name, [_convolution_flops_per_sec(dtype) for _ in range(repeats)])
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    ]


def _convolution_flops_per_sec(dtype: torch.dtype) -> float:
    """The best within half a second."""
    import torch

    batch_size, channels, side = _CONVOLUTION
    images, weights = (
        torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
        for shape in ((batch_size, channels, side, side), (channels, channels, 3, 3))
    )
    tries: list[float] = []
    torch.conv2d(images, weights, padding=1)  # the first one builds the kernel
    while sum(tries) < _CONVOLUTION_SEC:
        began = time.perf_counter()
        torch.conv2d(images, weights, padding=1)
        tries.append(time.perf_counter() - began)
    return 2 * 9 * batch_size * (channels * side) ** 2 / min(tries)


def _flops_row(name: str, samples: list[float]) -> Json:
    rates = {"flops_per_sec": spread(samples), "best_flops_per_sec": max(samples)}
    return {"name": name, "not_measured": None, "samples": samples, **rates}


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
    return _bytes_row(name, samples)


def _bytes_row(name: str, samples: list[float]) -> Json:
    figures = {"samples": samples, "bytes_per_sec": spread(samples)}
    return {"name": name, "not_measured": None, **figures}


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

    Returns:
        two rows: `samples` and `bytes_per_sec`; or one with the reason in `not_measured`, where the
        disk does not take the file.
    """
    try:
        _write_random(path, num_bytes)
    except OSError as error:
        reason = f"{num_bytes / 2**20:g} MiB cannot be written: {error.strerror}"
        return [{"name": "file", "not_measured": reason}]
    rows: list[Json] = []
    for name, forget in (("file, not in the page cache", True), ("file, in the page cache", False)):
        samples = [_read_bytes_per_sec(path, forget=forget) for _ in range(repeats)]
        rows.append(_bytes_row(name, samples))
    return rows


def _write_random(path: Path, num_bytes: int) -> None:
    with path.open("wb") as file:
        file.write(np.random.default_rng(0).bytes(num_bytes))
        file.flush()
        os.fsync(file.fileno())


def _read_bytes_per_sec(path: Path, *, forget: bool) -> float:
    buffer, num_bytes = bytearray(_READ_BYTES), 0
    with path.open("rb", buffering=0) as file:
        if forget:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        while read := file.readinto(buffer):
            num_bytes += read
        return num_bytes / (time.perf_counter() - began)
