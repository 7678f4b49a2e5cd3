"""What a pipeline asks of its device outside of the U-Net, seen on a CPU.

On a CPU everything is in one memory. So the tensors that would be on a device are followed from
where they begin: whatever is computed from one is on it too. The rest, a sampler's tables above
all, is the host's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from benchmarks.train_step.traffic_operators import operator_bytes

# With any of these the host waits for the device to answer.
_WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")
_CREATES = ("full",)  # filled in on the device


class DeviceWatch(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        num_operators: that touch memory on the device, outside of what `unwatched` leaves out.
        num_waits: of the host for a number on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_operators = self.num_waits = 0
        self._on_device = WeakTensorKeyDictionary()
        self._is_watching = True

    def follow(self, *tensors: Tensor) -> None:
        """These are on the device."""
        for tensor in tensors:
            self._on_device[tensor] = True

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Follow, but do not count."""
        self._is_watching = False
        try:
            yield
        finally:
            self._is_watching = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and note whether it is the device's."""
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not (name in _CREATES or any(tensor in self._on_device for tensor in inputs)):
            return output
        self.follow(*(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)))
        if self._is_watching:
            self.num_waits += name in _WAITS
            is_work = operator_bytes(func, args, kwargs or {}, output) is not None
            self.num_operators += is_work and name not in _WAITS
        return output
