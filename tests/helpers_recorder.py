"""What a CUDA graph does, done to the operators of a CPU: record once, replay without Python."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class OperatorRecorder:
    """A `train.step_graph.Recorder`.

    As with a CUDA graph, a replay reads and writes the very tensors of the recording, and whatever
    Python decided or passed as a number while recording stays that way for ever. As there,
    recording leaves no trace: what was written is put back.
    """

    def __init__(self) -> None:
        self.num_recordings = self.num_forgotten = 0

    def run(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return function()

    def forget(self) -> None:
        self.num_forgotten += 1

    def record(
        self, function: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        self.num_recordings += 1
        with _Recording() as recording:
            outputs = function()
        recording.undo()
        return recording.replay, outputs


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "profiler":  # a note in a trace, no work
            return func(*args, **kwargs)
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        for name, value in kwargs.items():
            (argument,) = [a for a in func._schema.arguments if a.name == name]
            if argument.alias_info is not None and argument.alias_info.is_write:
                written.append(value)
        self._before += [(t, t.clone()) for t in tree_iter(written) if isinstance(t, Tensor)]
        result = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        for tensor, before in reversed(self._before):
            tensor.copy_(before)
        self._before.clear()

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, recorded in self._calls:
            result = func(*args, **kwargs)
            returns = func._schema.returns
            # A view, and what an operator wrote in place, is where it was.
            if any(each.alias_info is not None for each in returns):
                continue
            for old, new in zip(tree_iter(recorded), tree_iter(result), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)
                else:
                    assert old == new, f"{func} gave Python another number: no graph could hold it"
