"""torch.compile for the training step: one graph of everything, or one per kind of block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shards.errors import UserError
from train.diffusion_loss import DiffusionLoss


def compile_model(
    model: DiffusionLoss, mode: str, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compile in place; the names in the state dict stay, and DDP may wrap the model afterwards.

    Nothing is compiled yet: that happens in the first step, see `compile_errors`. Every micro-batch
    has one shape, so graphs are specialised to it; an operation that would break a graph is an
    error, not a slow run.

    Args:
        model: from moments to loss.
        mode: `full` makes one graph of it; `regional` one of each distinct block of the U-Net, so
            that compiling takes a fraction of the time; `off` changes nothing.
        backend: of torch.compile.
    """
    if mode == "off":
        return
    modules = [model] if mode == "full" else _blocks(model.unet)
    _allow_graphs(len(modules))
    for module in modules:
        module.compile(fullgraph=True, dynamic=False, backend=backend)


def _blocks(unet: nn.Module) -> list[nn.Module]:
    """What a U-Net repeats; nearly all of its work."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    kinds = (BasicTransformerBlock, ResnetBlock2D)
    return [module for module in unet.modules() if isinstance(module, kinds)]


def _allow_graphs(num_modules: int) -> None:
    """Raise the compiler's limit of graphs per function; to it, all modules are one function.

    Its default is less than the distinct blocks of Stable Diffusion's U-Net. Each module may need
    two: one for training, one for measuring without gradients.
    """
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, 2 * num_modules)


def compile_failure(device: torch.device) -> str | None:
    """Why torch.compile does not work on a device, tried on a line of arithmetic; None if it does.

    It takes a C or C++ compiler, and on a GPU Triton, which has needs of its own.
    """
    from torch._dynamo.exc import TorchDynamoException

    try:
        torch.compile(_line_of_arithmetic, fullgraph=True, dynamic=False)(
            torch.ones(8, device=device)
        )
    except TorchDynamoException as error:
        return _first_line(error)
    return None


def _line_of_arithmetic(numbers: Tensor) -> Tensor:
    return numbers * 2 + 1


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line), type(error).__name__)


@contextmanager
def compile_errors() -> Iterator[None]:
    """What goes wrong in the compiler becomes a `UserError`; keep it around the training loop.

    The compiler runs in the first forward pass, and in the first backward pass once more.

    Raises:
        UserError: the compiler failed: there is no C++ compiler or no Triton, or it has a fault.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        yield
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        raise UserError("--compile", _first_line(error), remedy="--compile off") from error
