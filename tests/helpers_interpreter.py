"""A child process in which Triton's kernels are interpreted, on the CPU.

Whether they are is settled for good when Triton is imported, and a process that runs several test
files may have imported it long since.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import numpy as np

Call = Callable[..., Any]


@contextmanager
def child_process(*, interprets: bool) -> Iterator[Call]:
    """`call(function, *args)` runs a function of a test module in a fresh process.

    Args:
        interprets: whether Triton's kernels are interpreted there, else they are compiled. Memory
            that they are to write holds NaN before.
    """
    context = get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_start, initargs=(interprets,)) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def _start(interprets: bool) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    if interprets:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its own functions too
        import torch
        from triton.runtime import interpreter

        torch.use_deterministic_algorithms(True)  # it fills new tensors with NaN
        interpreter._convert_float = rounded_as_by_hardware(interpreter._convert_float)


def rounded_as_by_hardware(convert: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The interpreter's conversion of floats, which cuts bfloat16 off, with rounding to nearest."""
    import torch

    def rounded(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (str(source), str(target)) != ("fp32", "bf16"):
            return convert(data, source, target, mode)
        return torch.from_numpy(data.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)

    return rounded
