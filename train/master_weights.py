"""The float32 weights that the optimizer updates, whatever the model computes in.

Three cases, one interface: the model's own parameters; float32 copies of a bfloat16 model's; and
one process's pieces of a model that `fully_shard` has split along the first dimension. All are
plain tensors under diffusers' own names, also where the model computes with several of its
parameters as one (`train.projections`), so the optimizer, the average and the checkpoint need not
know which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from shards.errors import UserError
from train.projections import Part, original_parameters

Pieces = dict[str, tuple[int, list[int]]]


class MasterWeights:
    """Float32 masters of a module's parameters.

    Args:
        module: float32 when given.
        dtype: what the parameters are converted to; float32 makes them their own masters.
        num_processes: that average their gradients.
        parts: which of diffusers' parameters are rows of which of the module's.

    Attributes:
        tensors: the masters by diffusers' parameter names; of a sharded module this process's
            pieces.
        in_module: the weights that the module computes with, by the same names: the masters
            themselves, or what `publish` rounds them to.
    """

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype = torch.float32,
        num_processes: int = 1,
        parts: Mapping[str, Part] | None = None,
    ) -> None:
        self._parameters = dict(module.named_parameters())
        self._parts = parts or {}
        self._num_processes = num_processes
        self.is_sharded = any(hasattr(p, "to_local") for p in self._parameters.values())
        self._low = not self.is_sharded and dtype != torch.float32
        self._sums: list[Tensor] = []  # of gradients, made once they are needed
        if self._low:
            originals = original_parameters(module, self._parts)
            self.tensors = {name: p.detach().clone() for name, p in originals.items()}
            nn.Module.to(module, dtype)  # a diffusers model's own warns about parts it lacks
        self.in_module = {
            name: _local(p.detach()) for name, p in original_parameters(module, self._parts).items()
        }
        if not self._low:
            self.tensors = self.in_module
        assert not (self.is_sharded and self._parts), "rows of a part lie on several processes"

    # Gradients -----------------------------------------------------------------------------------

    def accumulates(self, num_micro_batches: int) -> bool:
        """Whether gradients are summed here, in float32, not in the model's low precision.

        Low-precision sums of many micro-batches lose what each adds. The processes' sums are then
        averaged here as well, so no micro-batch is reduced by the wrapper.
        """
        return self._low and num_micro_batches > 1

    @property
    def published(self) -> list[Tensor] | None:
        """A low-precision module's weights, in the order of `tensors`; None without such."""
        return list(self.in_module.values()) if self._low else None

    def add_gradients(self, *, is_first: bool) -> None:
        """Add what a micro-batch left on the parameters to float32 sums; clear it there.

        Args:
            is_first: of its step, with which the sums begin.
        """
        sums, gradients = self._gradient_sums(), self._take_gradients()
        if is_first:
            torch._foreach_copy_(sums, gradients)
        else:
            torch._foreach_add_(sums, gradients)

    def collect_gradients(self, *, accumulated: bool, in_float32: bool = True) -> list[Tensor]:
        """Take the step's gradients off the parameters.

        Args:
            accumulated: they were summed by `add_gradients`.
            in_float32: copy a low-precision module's.

        Returns:
            those of `tensors`, in their order and memory layout, averaged over the processes.
        """
        if accumulated:
            if self._num_processes > 1:
                torch.distributed.all_reduce(self._sum)
                self._sum.div_(self._num_processes)
            return self._sums
        gradients = self._take_gradients()
        if not (self._low and in_float32):
            return gradients
        sums = self._gradient_sums()
        torch._foreach_copy_(sums, gradients)
        return sums

    def _gradient_sums(self) -> list[Tensor]:
        if not self._sums:
            self._sum, self._sums = _flat_like(list(self.tensors.values()))
        return self._sums

    def norm_of(self, gradients: list[Tensor]) -> Tensor:
        """The norm over all gradients of all processes."""
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if self.is_sharded:
            square = norm.square()
            torch.distributed.all_reduce(square)
            norm = square.sqrt()
        return norm

    def _take_gradients(self) -> list[Tensor]:
        own: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            own[name], parameter.grad = self._gradient_of(name, parameter), None
        return [self._rows_of(name, own) for name in self.tensors]

    def _gradient_of(self, name: str, parameter: Tensor) -> Tensor:
        if parameter.grad is not None:
            return _local(parameter.grad)
        if self.is_sharded:  # there are processes without a piece of it
            return torch.zeros_like(self.tensors[name])
        raise UserError(
            "--unet", f"{name} has no part in the loss", wanted="a U-Net whose every weight is used"
        )

    def _rows_of(self, name: str, own: Mapping[str, Tensor]) -> Tensor:
        part = self._parts.get(name)
        return own[name] if part is None else own[part.parameter][part.start : part.stop]

    # Weights -------------------------------------------------------------------------------------

    @torch.no_grad()
    def publish(self) -> None:
        """Round the updated masters into a low-precision model's parameters."""
        if self.published:
            torch._foreach_copy_(self.published, list(self.tensors.values()))

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
