"""The float32 weights that the optimizer updates, whatever the model computes in.

Three cases, one interface: the model's own parameters; float32 copies of a bfloat16 model's; and
one process's pieces of a model that `fully_shard` has split along the first dimension. All are
plain tensors, so the optimizer, the average and the checkpoint need not know which.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

Pieces = dict[str, tuple[int, list[int]]]


class MasterWeights:
    """Float32 masters of a module's parameters.

    Args:
        module: float32 when given.
        dtype: what the parameters are converted to; float32 makes them their own masters.
        num_processes: that average their gradients.

    Attributes:
        tensors: the masters by parameter name; of a sharded module this process's pieces.
    """

    def __init__(
        self, module: nn.Module, dtype: torch.dtype = torch.float32, num_processes: int = 1
    ) -> None:
        self._parameters = dict(module.named_parameters())
        self._num_processes = num_processes
        self.is_sharded = any(hasattr(p, "to_local") for p in self._parameters.values())
        self._low = not self.is_sharded and dtype != torch.float32
        if self._low:
            self.tensors = {name: p.detach().clone() for name, p in self._parameters.items()}
            nn.Module.to(module, dtype)  # a diffusers model's own warns about parts it lacks
            self._gradient, self._gradients = _flat_like(list(self.tensors.values()))
        else:
            self.tensors = {name: _local(p.detach()) for name, p in self._parameters.items()}

    # Gradients -----------------------------------------------------------------------------------

    def accumulates(self, num_micro_batches: int) -> bool:
        """Whether gradients are summed here, in float32, not in the model's low precision.

        Low-precision sums of many micro-batches lose what each adds. The processes' sums are then
        averaged here as well, so no micro-batch is reduced by the wrapper.
        """
        return self._low and num_micro_batches > 1

    def add_gradients(self) -> None:
        """Add what a micro-batch left on the parameters to the float32 sums; clear it there."""
        torch._foreach_add_(self._gradients, self._take_low_gradients())

    def collect_gradients(self, *, accumulated: bool) -> list[Tensor]:
        """Put the step's gradients on the masters.

        Args:
            accumulated: they were summed by `add_gradients`.

        Returns:
            the gradients, float32, averaged over the processes.
        """
        if not self._low:
            for master, parameter in zip(
                self.tensors.values(), self._parameters.values(), strict=True
            ):
                master.grad = None if parameter.grad is None else _local(parameter.grad)
            return [master.grad for master in self.tensors.values() if master.grad is not None]
        if not accumulated:
            torch._foreach_copy_(self._gradients, self._take_low_gradients())
        elif self._num_processes > 1:
            torch.distributed.all_reduce(self._gradient)
            self._gradient.div_(self._num_processes)
        for master, gradient in zip(self.tensors.values(), self._gradients, strict=True):
            master.grad = gradient
        return [self._gradient]

    def norm_of(self, gradients: list[Tensor]) -> Tensor:
        """The norm over all gradients of all processes."""
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if self.is_sharded:
            square = norm.square()
            torch.distributed.all_reduce(square)
            norm = square.sqrt()
        return norm

    def clear_gradients(self) -> None:
        """Forget the step's gradients, before the next one's."""
        for master, parameter in zip(self.tensors.values(), self._parameters.values(), strict=True):
            master.grad = parameter.grad = None
        if self._low:
            self._gradient.zero_()

    def _take_low_gradients(self) -> list[Tensor]:
        gradients = [p.grad for p in self._parameters.values()]
        for parameter in self._parameters.values():
            parameter.grad = None
        assert all(gradient is not None for gradient in gradients)
        return gradients  # type: ignore[return-value]

    # Weights -------------------------------------------------------------------------------------

    @torch.no_grad()
    def publish(self) -> None:
        """Round the updated masters into a low-precision model's parameters."""
        if self._low:
            torch._foreach_copy_(list(self._parameters.values()), list(self.tensors.values()))

    @torch.no_grad()
    def load(self, whole: dict[str, Tensor]) -> None:
        """Take over weights; of a sharded module each process its own pieces."""
        for name, master in self.tensors.items():
            master.copy_(self.piece_of(name, whole[name]))
        self.publish()

    def pieces(self) -> Pieces:
        """First index along dimension 0 and whole shape, by parameter; nothing unless sharded."""
        if not self.is_sharded:
            return {}
        return {
            name: (self._first_index(name), list(p.shape)) for name, p in self._parameters.items()
        }

    def piece_of(self, name: str, whole: Tensor) -> Tensor:
        """This process's piece of a tensor as large as a parameter."""
        if not self.is_sharded or whole.dim() == 0:
            return whole
        first = self._first_index(name)
        return whole[first : first + len(self.tensors[name])]

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by parameter, put together from all processes' pieces.

        A collective where the module is sharded; one tensor at a time is whole on the device.
        """
        if not self.is_sharded:
            return tensors
        return {name: self._gather(name, piece).cpu() for name, piece in tensors.items()}

    def whole_optimizer(self, moments: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same for `<parameter>.<moment>`; counters, which have no dimension, stay."""
        if not self.is_sharded:
            return moments
        return {
            name: piece.cpu() if piece.dim() == 0 else self._gather(_owner(name), piece).cpu()
            for name, piece in moments.items()
        }

    def _gather(self, name: str, piece: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        parameter: Any = self._parameters[name]
        whole = DTensor.from_local(
            piece.contiguous(),
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        gathered: Tensor = whole.full_tensor()
        return gathered

    def _first_index(self, name: str) -> int:
        """`fully_shard` cuts as `torch.chunk` does: equal pieces, the last ones short or empty."""
        parameter: Any = self._parameters[name]
        mesh = parameter.device_mesh
        size = math.ceil(parameter.shape[0] / mesh.size())
        return min(mesh.get_local_rank() * size, parameter.shape[0])


def _owner(moment: str) -> str:
    return moment.rpartition(".")[0]


def _local(tensor: Any) -> Tensor:
    """The piece of a `DTensor` that this process holds; any other tensor as it is."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _flat_like(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One run of memory, and a view of it for each tensor, in that tensor's layout."""
    flat = torch.zeros(sum(t.numel() for t in tensors), device=tensors[0].device)
    views, start = [], 0
    for tensor in tensors:
        views.append(flat.as_strided(tensor.shape, tensor.stride(), start))
        start += tensor.numel()
    return flat, views
