"""torch.compile for an encoder: one graph for each shape of batch, and small batches filled up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from shards.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")

# All encoders of a process are one function to the compiler: a graph for each of them, and for
# every resolution and aspect bucket.
_MAX_GRAPHS = 256


def compile_encode(encode: Callable[P, R]) -> Callable[P, R]:
    """The same function as one graph; compiled when it first meets a shape.

    An operation that would break the graph is an error, not a slow job.

    Args:
        encode: from an encoder and a batch to tensors.

    Raises:
        UserError: (when called) the compiler failed: no C++ compiler, no Triton, or a fault of it.
    """
    compiled = torch.compile(encode, fullgraph=True, dynamic=False)

    @wraps(encode)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        import torch._dynamo.config

        # Here and not once for all: the compiler's settings are each thread's own.
        with _compile_errors(), torch._dynamo.config.patch(recompile_limit=_MAX_GRAPHS):
            return compiled(*args, **kwargs)

    return run


def filled_up(batch: Tensor, like: Tensor) -> Tensor:
    """A batch in a tensor of a fixed length: its last sample stands in the rows that it lacks.

    Args:
        batch: [n, ...], 0 < n <= B.
        like: [B, ...], is overwritten; its dtype and order in memory are those that a graph was
            made for.

    Returns:
        `like`.
    """
    length = len(batch)
    assert 0 < length <= len(like)
    like[:length].copy_(batch)
    like[length:].copy_(batch[-1:].expand_as(like[length:]))
    return like


def even_batch_size(num_rows: int, at_most: int) -> int:
    """Rows of a batch so that few batches make up `num_rows` and the last one is nearly full."""
    num_batches = -(-num_rows // at_most)
    return -(-num_rows // num_batches)


@contextmanager
def _compile_errors() -> Iterator[None]:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        yield
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise UserError("--compile of an encoder", reason, remedy="--compile off") from error
