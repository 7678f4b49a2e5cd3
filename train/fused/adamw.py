"""AdamW, the moving average and the low-precision copy of the weights in one kernel.

What torch does in several passes over all parameters (its fused AdamW, a copy into the model's
dtype, a lerp of the average) reads and writes every tensor once here: with bfloat16 gradients and
weights 28 bytes a parameter, 36 with the average.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.fused.triton_runtime import missing

_STATE_BYTES = 3 * 2 * 4  # master, exp_avg, exp_avg_sq: float32, read and written
_MAX_CAPTURES = 16  # between two updates that are not captured; 33 kB each for 686 weights


def bytes_per_parameter(
    gradient_dtype: torch.dtype, published_dtype: torch.dtype | None, averages: bool
) -> int:
    """What the kernel reads from and writes to memory for one parameter at an update.

    Args:
        gradient_dtype: of the gradients, which are read.
        published_dtype: of the copies, which are written; None where there are none.
        averages: whether averages move, which are read and written.
    """
    published = published_dtype.itemsize if published_dtype else 0
    return gradient_dtype.itemsize + _STATE_BYTES + published + (2 * 4 if averages else 0)


class FusedAdamW(torch.optim.AdamW):
    """AdamW as `torch.optim.AdamW(fused=True)`, with what belongs around it in the same kernel.

    State and parameter groups are those of torch's optimizer: either goes on from the other's
    state dict. `update` takes the place of `step`; the groups' learning rates are not used.

    An update does not wait for the device, and keeps all that lasts in place. So a CUDA graph can
    capture it, once a like one (the same dtypes, averages or none) has run and its kernel is
    compiled. The graph holds the addresses that it saw. Masters, state and copies keep theirs, also
    through `load_state_dict`; averages must, and gradients do where the same graph makes them.
    `learning_rate`, `divisor` and `left_out` are read at every replay; the hyperparameters and
    `average_weight` are those of the capture.

    Args:
        masters: float32, dense in memory: of any layout whose elements leave no gaps.
        betas: as torch's.
        eps: as torch's.
        weight_decay: as torch's, decoupled.
        published: a copy of each master in bfloat16 or float16, laid out as it is.
    """

    def __init__(
        self,
        masters: list[Tensor],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        published: list[Tensor] | None,
    ) -> None:
        assert all(master.dtype == torch.float32 and _is_dense(master) for master in masters)
        super().__init__(
            masters, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
        )
        self._masters, self._published = masters, published
        if published is not None:
            assert all(map(_same_layout, published, masters)), "copies are laid out as masters"
        device = masters[0].device
        assert missing(device) is None, missing(device)
        self._steps = torch.zeros(len(masters), device=device)
        for master, step in zip(masters, self._steps, strict=True):
            self.state[master] = {
                "step": step,
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
        self._chunks = _Chunks(masters)
        self._addresses = _AddressTable(device)

    @torch.no_grad()
    def update(
        self,
        gradients: list[Tensor],
        *,
        learning_rate: Tensor,
        divisor: Tensor,
        left_out: Tensor,
        averages: list[Tensor] | None,
        average_weight: float,
    ) -> None:
        """Update masters, state and copies, then move the averages towards the masters.

        Args:
            gradients: of the masters in their order, all float32, bfloat16 or float16. One that is
                laid out otherwise than its master is copied first.
            learning_rate: [] float32.
            divisor: [] float32, that the gradients are divided by: clipping and loss scale.
            left_out: [] float32; where it is not 0 nothing changes but the averages, whatever the
                gradients hold.
            averages: float32, laid out as the masters; None where none is to move.
            average_weight: 1 - decay of the averages.
        """
        (dtype,) = {gradient.dtype for gradient in gradients}
        gradients = list(map(_in_layout_of, self._masters, gradients))
        assert averages is None or all(map(_same_layout, averages, self._masters))
        self._steps.add_(left_out == 0)
        rows = [gradients, self._masters, *self._moments(), self._published, averages]
        with torch.cuda.device_of(self._steps):
            self._launch(
                self._addresses.of(rows),
                self._scalars(learning_rate, divisor, left_out),
                average_weight,
                dtype=dtype,
                has_average=averages is not None,
            )

    def _launch(
        self,
        address_table: Tensor,
        scalar_table: Tensor,
        average_weight: float,
        *,
        dtype: torch.dtype,
        has_average: bool,
    ) -> None:
        from train.fused import adamw_kernel as kernel

        beta1, beta2 = self.param_groups[0]["betas"]
        chunks = self._chunks
        kernel.update_chunks[(len(chunks.tensors),)](
            address_table,
            chunks.sizes,
            chunks.tensors,
            chunks.starts,
            scalar_table,
            1 - beta1,
            1 - beta2,
            average_weight,
            len(self._masters),
            gradient_type=kernel.TYPES[dtype],
            published_type=kernel.TYPES[self._published[0].dtype] if self._published else None,
            has_average=has_average,
            chunk_size=kernel.CHUNK_SIZE,
            block_size=kernel.BLOCK_SIZE,
            tail_size=kernel.TAIL_SIZE,
            num_warps=kernel.NUM_WARPS,
        )

    def _scalars(self, learning_rate: Tensor, divisor: Tensor, left_out: Tensor) -> Tensor:
        """[5, masters] float32: step size, epsilon, decay, divisor, left out.

        In float64 up to here: 1 - 0.999^step in float32 is off by 1e-5 at the first steps.
        """
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        steps, rate = self._steps.double(), learning_rate.double()
        root = (1 - beta2**steps).sqrt()
        of_each = [rate * root / (1 - beta1**steps), group["eps"] * root]
        of_all = [rate * group["weight_decay"], divisor.double(), left_out.double()]
        return torch.stack(of_each + [scalar.expand_as(steps) for scalar in of_all]).float()

    def _moments(self) -> tuple[list[Tensor], list[Tensor]]:
        states = [self.state[master] for master in self._masters]
        return [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of this class or of torch's AdamW, into the tensors there are.

        So that they keep their layout, and their addresses for a captured graph. What has no state
        yet, as before torch's first step, starts at 0.
        """
        own = dict(self.state)
        super().load_state_dict(state_dict)
        for master, tensors in own.items():
            loaded = self.state[master]
            assert loaded.keys() <= tensors.keys(), f"not AdamW's: {sorted(loaded)}"
            for name, tensor in tensors.items():
                if name in loaded:
                    assert loaded[name].shape == tensor.shape, (name, loaded[name].shape)
                    tensor.copy_(loaded[name])
                else:
                    tensor.zero_()
            self.state[master] = tensors


class _Chunks:
    """What each program of the kernel works on.

    Attributes:
        sizes: [masters] int64, elements.
        tensors: [programs] int32, which master.
        starts: [programs] int64, the first of its elements.
    """

    def __init__(self, masters: list[Tensor]) -> None:
        from train.fused.adamw_kernel import CHUNK_SIZE

        sizes = [master.numel() for master in masters]
        starts = [
            (tensor, start)
            for tensor, size in enumerate(sizes)
            for start in range(0, size, CHUNK_SIZE)
        ]
        device = masters[0].device
        self.sizes = torch.tensor(sizes, dtype=torch.int64, device=device)
        self.tensors = torch.tensor([t for t, _ in starts], dtype=torch.int32, device=device)
        self.starts = torch.tensor([s for _, s in starts], dtype=torch.int64, device=device)


class _AddressTable:
    """Addresses of tensors, as [rows, tensors] int64 on the device.

    They are sent again when one has changed, from pinned memory, without a wait: torch's allocator
    does not give such memory away before the copies from it are done. In a captured graph the copy
    is a part of the graph, whose table is its own; its source was set aside before, for pinned
    memory cannot be allocated during a capture, and is kept as it is for every replay.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sent: list[list[int]] = []
        self._table = torch.empty(0)
        self._spares: list[Tensor] = []
        self._captured: list[Tensor] = []

    def of(self, rows: list[list[Tensor] | None]) -> Tensor:
        """The table for these tensors; a row of zeros for None."""
        num_tensors = max(len(row) for row in rows if row)
        addresses = [
            [tensor.data_ptr() for tensor in row] if row else [0] * num_tensors for row in rows
        ]
        if _is_capturing(self._device):
            return self._capture(addresses)
        if addresses != self._sent:
            source = self._host_memory(addresses)
            self._table = source.to(self._device, non_blocking=True)
            self._sent = addresses
        while len(self._spares) < _MAX_CAPTURES:
            self._spares.append(self._host_memory(addresses))
        return self._table

    def _capture(self, addresses: list[list[int]]) -> Tensor:
        assert self._spares, "an update must run before one is captured"
        source = self._spares.pop()
        source.copy_(torch.tensor(addresses))
        self._captured.append(source)
        return source.to(self._device, non_blocking=True)

    def _host_memory(self, addresses: list[list[int]]) -> Tensor:
        is_cuda = self._device.type == "cuda"
        return torch.tensor(addresses, dtype=torch.int64, pin_memory=is_cuda)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in whatever order.

    `empty_like` keeps the strides of such tensors alone.
    """
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _same_layout(one: Tensor, other: Tensor) -> bool:
    """Whether equal indices lie at equal offsets; the stride of a single element says nothing."""
    if one.shape != other.shape or one.stride() == other.stride():
        return one.shape == other.shape
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(size == 1 or step == as_step for size, step, as_step in strides)


def _in_layout_of(master: Tensor, gradient: Tensor) -> Tensor:
    if _same_layout(gradient, master):
        return gradient
    return torch.empty_like(master, dtype=gradient.dtype).copy_(gradient)
