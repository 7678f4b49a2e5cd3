"""What is measured between two log lines. Sums stay on the device until the interval is read."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Row = dict[str, float]
SUMS = ("loss", "grad_norm", "left_out")


class Interval:
    """Steps, waiting time and sums of loss and gradient norm since it was opened.

    Args:
        first_step: updates done when it was opened; kept.
        device: where losses are.

    Attributes:
        sums: [3], see `SUMS`; the loss is this process's, the others are the same on all.
    """

    def __init__(self, first_step: int, device: torch.device) -> None:
        self.first_step, self._device = first_step, device
        self.sums = torch.zeros(len(SUMS), device=device)
        self.start_clock(first_step)

    def start_clock(self, step: int) -> None:
        """Count time and steps for the rates from here; what was summed up stays."""
        self._clock_step, self._wait_sec = step, 0.0
        self._start = time.perf_counter()

    def restore(self, first_step: int, sums: list[float]) -> None:
        """Take over the sums of an interval that was open when a checkpoint was written."""
        self.first_step = first_step
        self.sums.copy_(torch.tensor(sums))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._wait_sec += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count: the run is looked at, not trained."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def add(self, loss: Tensor, grad_norm: Tensor, left_out: Tensor) -> None:
        """Add a step; the gradient norm of an update that was left out does not count."""
        left_out = left_out.float()
        self.sums += torch.stack([loss, torch.where(left_out > 0, 0.0, grad_norm), left_out])

    def close(self, step: int, sums: list[float], global_batch_size: int) -> Row:
        """The interval as a row of metrics.

        Args:
            step: updates done now.
            sums: see `SUMS`, averaged over the processes.
            global_batch_size: samples per step over all processes.
        """
        loss, grad_norm, left_out = sums
        steps, timed_steps = step - self.first_step, step - self._clock_step
        elapsed = time.perf_counter() - self._start
        row = {
            "step": step,
            "train/loss": loss / steps,
            "train/grad_norm": grad_norm / max(1.0, steps - left_out),
            "perf/iters_per_sec": timed_steps / elapsed,
            "perf/images_per_sec": timed_steps * global_batch_size / elapsed,
            "perf/data_wait_frac": self._wait_sec / elapsed,
            "perf/peak_mem_gib": self._peak_memory_gib(),
        }
        if left_out:
            row["train/updates_left_out"] = left_out
        return row

    def _peak_memory_gib(self) -> float:
        """Of the device's allocator; on a CPU of the process."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def log_line(row: Row, max_steps: int) -> str:
    """A row for people, with the time that is left."""
    step = int(row["step"])
    left_sec = round((max_steps - step) / row["perf/iters_per_sec"])
    eta = f"{left_sec // 3600}:{left_sec // 60 % 60:02d}:{left_sec % 60:02d}"
    return (
        f"step {step:0{len(str(max_steps))}d}/{max_steps} | loss {row['train/loss']:.4f} | "
        f"{row['perf/iters_per_sec']:.2f} it/s | {row['perf/images_per_sec']:.0f} img/s | "
        f"MFU {row['perf/mfu']:.1%} | data {row['perf/data_wait_frac']:.1%} | "
        f"mem {row['perf/peak_mem_gib']:.1f} GiB | ETA {eta}"
    )
