"""Bytes of a compiled forward and backward pass: inductor's own count of its schedule.

Inductor lowers, fuses and schedules both graphs as it would for Triton, and is stopped before it
generates code: no kernel is compiled and no weight touched, though the tensors are a CPU's, whose
lowerings may differ from a GPU's. A fused kernel counts with each tensor that it reads or writes
once, as if it never had to read one twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.train_step.traffic_operators import kind_of, operator_bytes
from benchmarks.train_step.traffic_unet import (
    Pass,
    Setting,
    Traffic,
    build_unet,
    empty_inputs,
    loss,
    traffic_of,
)


def count_compiled(
    unet_config: dict[str, Any], latent_size: int, setting: Setting, batch: int
) -> Traffic:
    """Count a forward and backward pass that is compiled as one graph each, without a break.

    Operators are kernels here, without those that only take a tuple apart. What was compiled in
    this process before is forgotten.

    Args:
        unet_config: diffusers configuration.
        latent_size: h = w.
        setting: how it is computed; under no autocast, which a CPU has another one of.
        batch: samples of the micro-batch; at least 2.

    Raises:
        torch._dynamo.exc.TorchDynamoException: it does not compile as one graph.
    """
    assert setting.low_weights
    unet = build_unet(unet_config, latent_size, setting)
    unet.to_empty(device="cpu")  # memory that nothing writes to is not taken
    return traffic_of(lambda samples: _compiled_pass(unet, setting, samples), batch)


def _compiled_pass(unet: Any, setting: Setting, batch: int) -> Pass:
    unet.zero_grad(set_to_none=True)
    inputs = empty_inputs(unet, setting, batch, "cpu")
    torch.compiler.reset()
    with _stopped_inductor() as schedules:
        step = torch.compile(loss, fullgraph=True, dynamic=False)
        step(unet, **inputs).backward()
    torch.compiler.reset()
    forward, backward = schedules
    return Pass(
        num_bytes=forward.num_bytes + backward.num_bytes,
        num_operators=forward.num_kernels + backward.num_kernels,
        saved_bytes=forward.output_bytes,
    )


@dataclass
class _Schedule:
    """Of one graph.

    Attributes:
        num_bytes: by kind; `fused` are the kernels that inductor generates.
        num_kernels: its own and the library's.
        output_bytes: of a forward graph what is kept for the backward one, and the loss.
    """

    num_bytes: Counter[str] = field(default_factory=Counter)
    num_kernels: int = 0
    output_bytes: int = 0

    def add(self, node: Any) -> None:
        """Count a node of inductor's schedule."""
        from torch._inductor import ir
        from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

        if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
            return
        if isinstance(node, ExternKernelSchedulerNode):
            kind, num_bytes = _library_kernel(node.node)
        else:
            kind, num_bytes = "fused", _generated_bytes(node)
        self.num_bytes[kind] += num_bytes
        self.num_kernels += 1


def _generated_bytes(node: Any) -> int:
    """Inductor counts all of a tensor of which a fused kernel reads a slice; here the slice."""
    buffers = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
    accessed: Counter[str] = Counter()
    for access in node.read_writes.reads_and_writes():
        accessed[access.name] += access.numbytes_hint()
    return sum(min(num_bytes, accessed[name]) for name, num_bytes in buffers.items())


def _library_kernel(kernel: Any) -> tuple[str, int]:
    """Kind and bytes; inductor would count all of a tensor of which the kernel reads some rows."""
    packet = kernel.op_overload.overloadpacket
    (origin,) = (
        node for node in kernel.origins if getattr(node.target, "overloadpacket", None) is packet
    )
    args, kwargs = torch.fx.node.map_arg((origin.args, origin.kwargs), lambda of: of.meta["val"])
    num_bytes = operator_bytes(origin.target, args, kwargs, origin.meta["val"])
    assert num_bytes is not None
    return kind_of(origin.target.name().partition(".")[0]), num_bytes


@contextmanager
def _stopped_inductor() -> Iterator[list[_Schedule]]:
    """Inductor up to its schedules, which are collected; what it makes then returns empty tensors.

    It runs in this process alone, and takes nothing from its cache.
    """
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    schedules: list[_Schedule] = []

    def stop(graph: Any) -> SimpleNamespace:
        graph.init_wrapper_code()
        graph._update_scheduler()
        outputs = [_empty_like(output) for output in graph.graph_outputs]
        sizes = {
            output.get_name(): empty.nbytes
            for output, empty in zip(graph.graph_outputs, outputs, strict=True)
            if empty is not None
        }
        schedule = _Schedule(output_bytes=sum(sizes.values()))
        for node in graph.scheduler.nodes:
            schedule.add(node)
        schedules.append(schedule)
        graph.cache_key, graph.cache_path = "", __file__  # of the code, which is kept as a text
        return SimpleNamespace(call=lambda args: tuple(outputs))

    options = {
        **{"force_disable_caches": True, "compile_threads": 1, "cpu_backend": "triton"},
        # On a GPU inductor leaves the layout of Stable Diffusion's convolutions as it is, because
        # some halve their channels (`decide_layout_opt`); on a CPU it would copy.
        "layout_optimization": False,
    }
    with (
        config.patch(options),
        mock.patch.object(GraphLowering, "compile_to_module", stop),
        mock.patch.object(F, "scaled_dot_product_attention", _attend),
    ):
        yield schedules


def _empty_like(output: Any) -> Tensor | None:
    """In place of an output of a graph; None where that is none, as an input's gradient."""
    if not output.has_tensor_output():
        return None
    sizes = [list(map(int, numbers)) for numbers in (output.get_size(), output.get_stride())]
    return torch.empty_strided(*sizes, dtype=output.get_dtype())


# Attention as on a GPU, where it takes views; inductor gives a CPU's kernel copies of them.


@torch.library.custom_op("traffic::scaled_dot_product_attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    raise AssertionError("nothing is computed here")


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and [B, heads, tokens] the logarithms of the sums."""
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("traffic::scaled_dot_product_attention_backward", mutates_args=())
def _attention_backward(
    d_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    raise AssertionError("nothing is computed here")


@_attention_backward.register_fake
def _(
    d_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, d_output: Tensor, _: None) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = _attention_backward(d_output, *ctx.saved_tensors)
    return gradients


_attention.register_autograd(_differentiate, setup_context=_keep)


def _attend(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    output: Tensor = _attention(query, key, value)[0]
    return output
