"""What is measured between two log lines. Sums stay on the device until the interval is read."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from shards.errors import UserError

Row = dict[str, float]


class Interval:
    """Steps, waiting time and sums of loss and gradient norm since it was opened.

    Args:
        first_step: updates done when it was opened; kept.
        device: where losses are.
    """

    def __init__(self, first_step: int, device: torch.device) -> None:
        self.first_step, self._device = first_step, device
        self.loss_sum = torch.zeros((), device=device)
        self.grad_norm_sum = torch.zeros((), device=device)
        self.start_clock(first_step)

    def start_clock(self, step: int) -> None:
        """Count time and steps for the rates from here; what was summed up stays."""
        self._clock_step, self._wait_sec = step, 0.0
        self._start = time.perf_counter()

    def restore(self, first_step: int, loss_sum: float, grad_norm_sum: float) -> None:
        """Take over the sums of an interval that was open when a checkpoint was written."""
        self.first_step = first_step
        self.loss_sum.fill_(loss_sum)
        self.grad_norm_sum.fill_(grad_norm_sum)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._wait_sec += time.perf_counter() - start

    def add_loss(self, loss: Tensor) -> None:
        """Add a micro-batch's share of a step's loss."""
        self.loss_sum += loss.detach()

    def close(self, step: int, loss: float, grad_norm: float, global_batch_size: int) -> Row:
        """The interval as a row of metrics.

        Args:
            step: updates done now.
            loss: sum over the steps, averaged over the processes.
            grad_norm: sum over the steps.
            global_batch_size: samples per step over all processes.

        Raises:
            UserError: a loss or a gradient was not finite.
        """
        steps, timed_steps = step - self.first_step, step - self._clock_step
        elapsed = time.perf_counter() - self._start
        if not math.isfinite(loss + grad_norm):
            raise UserError(
                "training",
                f"a loss or gradient between steps {self.first_step} and {step} is not finite",
                remedy="a lower --learning-rate or --max-grad-norm, in another --output-dir",
            )
        return {
            "step": step,
            "train/loss": loss / steps,
            "train/grad_norm": grad_norm / steps,
            "perf/iters_per_sec": timed_steps / elapsed,
            "perf/images_per_sec": timed_steps * global_batch_size / elapsed,
            "perf/data_wait_frac": self._wait_sec / elapsed,
            "perf/peak_mem_gib": self._peak_memory_gib(),
        }

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
        f"data {row['perf/data_wait_frac']:.1%} | mem {row['perf/peak_mem_gib']:.1f} GiB | "
        f"ETA {eta}"
    )
