"""Which devices a trial has: GPUs by CUDA_VISIBLE_DEVICES, or a share of the CPU's threads."""

from __future__ import annotations

import os
from dataclasses import dataclass

from shards.errors import UserError


@dataclass(frozen=True)
class Slot:
    """Room for one trial at a time.

    Args:
        gpus: as CUDA_VISIBLE_DEVICES names them; none on a CPU.
        num_processes: of the trainer, one for each GPU.
        num_threads: of each process.
    """

    gpus: tuple[str, ...]
    num_processes: int
    num_threads: int

    @property
    def environment(self) -> dict[str, str]:
        """What the trial's processes see."""
        threads = {"OMP_NUM_THREADS": str(self.num_threads)}
        if self.gpus:
            return {**os.environ, **threads, "CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}
        return {**os.environ, **threads, "ACCELERATE_USE_CPU": "true"}


def visible_gpus() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        return []
    import torch

    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return names.split(",")[:count] if names else [str(number) for number in range(count)]


def deal_out(gpus: list[str], workers: int, devices_per_trial: int) -> list[Slot]:
    """Slots that share nothing: each has GPUs of its own, or its part of the CPU's threads.

    Args:
        gpus: all there are; none: the CPU.
        workers: slots; 0: as many as there are GPUs for, on a CPU one.
        devices_per_trial: GPUs of a slot; on a CPU, processes.

    Raises:
        UserError: there are fewer GPUs than that.
    """
    workers = workers or max(1, len(gpus) // devices_per_trial)
    if gpus and workers * devices_per_trial > len(gpus):
        raise UserError(
            "--workers",
            f"{workers} trials at a time on {devices_per_trial} GPUs each, and {len(gpus)} GPUs",
            remedy=f"--workers {len(gpus) // devices_per_trial}"
            if devices_per_trial <= len(gpus)
            else f"--devices-per-trial {len(gpus)}",
        )
    cores = len(os.sched_getaffinity(0))
    threads = min(cores, int(os.environ.get("OMP_NUM_THREADS", "0")) or cores)
    return [
        Slot(
            gpus=tuple(gpus[number * devices_per_trial : (number + 1) * devices_per_trial]),
            num_processes=devices_per_trial,
            num_threads=max(1, threads // (workers * devices_per_trial)),
        )
        for number in range(workers)
    ]
