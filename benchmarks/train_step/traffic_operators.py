"""Bytes that operators read and write, and how many of them there are.

An operator counts as one kernel that reads each of its inputs and writes each of its outputs once;
a view counts for nothing. That is what moves if nothing stays in a cache between two operators, and
if no kernel reads anything twice: cuDNN's bias is a pass of its own, and flash attention sums dq in
float32, neither of which is counted. Our own kernels say themselves what they read and write.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_KINDS = {
    "convolution": "conv",
    "convolution_backward": "conv",
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), "linear"),
    **dict.fromkeys(("native_group_norm", "native_layer_norm"), "norm"),
    **dict.fromkeys(("native_group_norm_backward", "native_layer_norm_backward"), "norm"),
    **dict.fromkeys(("group_norm", "group_norm_backward"), "norm"),
    **dict.fromkeys(("clone", "contiguous", "copy_", "_to_copy", "cat", "_foreach_copy_"), "copy"),
}
KINDS = ("conv", "linear", "attention", "norm", "elementwise", "copy", "fused")
_ALLOCATES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# What these are given tells a shape at most, or is overwritten.
_READS_NOTHING = ("ones_like", "zeros_like", "full_like", "new_zeros", "new_ones", "new_full")
_OVERWRITES = ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_")


class OperatorTraffic(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        num_bytes: read and written, by name of the operator.
        num_calls: of operators that touch memory, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: Counter[str] = Counter()
        self.num_calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and count it."""
        output = func(*args, **(kwargs or {}))
        num_bytes = operator_bytes(func, args, kwargs or {}, output)
        if num_bytes is not None:
            name = func.name().partition(".")[0]
            self.num_bytes[name] += num_bytes
            self.num_calls[name] += 1
        return output


def kind_of(name: str) -> str:
    """What an operator does, one of `KINDS`; `aten::mm` is `linear`."""
    if "scaled_dot_product" in name:
        return "attention"
    return _KINDS.get(name.partition("::")[2], "elementwise")


def operator_bytes(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> int | None:
    """Bytes that an operator reads and writes; None where it touches no memory.

    Args:
        func: an `OpOverload`.
        args: as it was called; tensors of any device.
        kwargs: the same.
        output: what it returned.
    """
    if own := own_bytes(func, args):
        return own
    name = func.overloadpacket.__name__
    inputs, outputs = _tensors((args, kwargs)), _tensors(output)
    if func._schema.is_mutable:
        written = _mutated(func, args, kwargs)
        read = _tensors((args[1:], kwargs)) if name in _OVERWRITES else inputs
    else:
        memory = {_memory(tensor) for tensor in inputs}
        if name in _ALLOCATES or any(_memory(tensor) in memory for tensor in outputs):
            return None
        written, read = outputs, [] if name in _READS_NOTHING else inputs
    return sum(map(tensor_bytes, (*read, *written)))


def tensor_bytes(tensor: Tensor) -> int:
    """What a tensor covers; what is expanded lies in memory once."""
    num_bytes = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        num_bytes *= size if stride else min(size, 1)
    return num_bytes


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    """Tells storages apart, also those that have no memory, and so no address."""
    number: int = tensor.untyped_storage()._cdata
    return number


def _mutated(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operator writes to, as its schema has them."""
    written = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            written += _tensors(given)
    return written


# Our own kernels ----------------------------------------------------------------------------------


def own_bytes(func: Any, args: tuple[Any, ...]) -> int | None:
    """What our own kernels read and write, as they say themselves; None for any other operator.

    Args:
        func: an `OpOverload`.
        args: as it is called.
    """
    name = func.name().partition(".")[0]
    count = _OWN.get(name)
    assert count or not name.startswith("latentmill::"), f"{name} is not counted"
    return count(*args) if count else None


def _group_norm(x: Tensor, shift: Tensor | None, weight: Tensor, *_: Any) -> tuple[int, int]:
    from train.fused.group_norm import traffic_bytes

    batch, channels, height, width = x.shape
    return traffic_bytes(
        batch,
        channels,
        height * width,
        x.element_size(),
        parameter_itemsize=weight.element_size(),
        shift_itemsize=0 if shift is None else shift.element_size(),
    )


def _geglu(projected: Tensor) -> tuple[int, int]:
    from train.fused.geglu import traffic_bytes

    width = projected.shape[-1] // 2
    return traffic_bytes(projected.numel() // (2 * width), width, projected.element_size())


_OWN: dict[str, Callable[..., int]] = {
    "latentmill::group_norm": lambda *args: _group_norm(*args)[0],
    "latentmill::group_norm_backward": lambda _, *args: _group_norm(*args)[1],
    "latentmill::geglu": lambda projected: _geglu(projected)[0],
    "latentmill::geglu_backward": lambda _, projected: _geglu(projected)[1],
}
