"""What PyTorch runs on a CUDA device, for tensors that are on none.

On the meta device torch takes attention apart, casts nothing under autocast and lets convolutions
mix layouts. These modes make it dispatch what it would on a GPU, in eager mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten
# Of what a U-Net calls; the lists are in "CUDA Ops that can autocast" of torch's documentation.
_TO_LOW: tuple[Any, ...] = (F.linear, F.conv2d, torch.matmul, F.scaled_dot_product_attention)
_TO_FLOAT32: tuple[Any, ...] = (F.group_norm, F.layer_norm, F.softmax, F.mse_loss, torch.exp)


class CudaFunctions(TorchFunctionMode):
    """Attention as one operator, and the casts of autocast.

    A weight is cast once in a forward pass because it is used once; autocast would keep its copy.

    Args:
        autocast: to this dtype; None leaves every dtype as it is.
    """

    def __init__(self, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self._autocast = autocast

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function as it runs on a GPU."""
        if self._autocast and func in _TO_LOW:
            args, kwargs = _cast((args, kwargs), self._autocast)
        elif self._autocast and func in _TO_FLOAT32:
            args, kwargs = _cast((args, kwargs), torch.float32)
        if func is F.scaled_dot_product_attention:
            return _flash_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    assert attn_mask is None, "flash attention has no mask"
    output: Tensor = _aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal
    )[0]
    return output


class CudaLayouts(TorchDispatchMode):
    """Layouts that cuDNN's convolutions force, with the copies that this takes.

    They run in NHWC where input or weight is channels-last (`cudnn_conv_suggest_memory_format` of
    ATen), so they copy what comes from a group norm. That torch itself takes to NCHW on any device
    but a CPU, with a copy that it keeps for the backward pass.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator on inputs in its layout; its outputs are in that layout as well."""
        if func is _aten.convolution.default:
            num_tensors = 2  # input, weight
        elif func is _aten.convolution_backward.default:
            num_tensors = 3  # after the output's gradient
        else:
            return func(*args, **(kwargs or {}))
        tensors = args[:num_tensors]
        layout = _conv_layout(*tensors[-2:])
        given = [tensor.contiguous(memory_format=layout) for tensor in tensors]
        output = func(*given, *args[num_tensors:], **(kwargs or {}))
        return tree_map_only(Tensor, lambda tensor: _laid_out(tensor, layout), output)


def _conv_layout(inputs: Tensor, weight: Tensor) -> torch.memory_format:
    layouts = {suggest_memory_format(tensor) for tensor in (inputs, weight)}
    return torch.channels_last if torch.channels_last in layouts else torch.contiguous_format


def _laid_out(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """As a kernel would have allocated its output."""
    return torch.empty_like(tensor, memory_format=layout) if tensor.dim() == 4 else tensor
