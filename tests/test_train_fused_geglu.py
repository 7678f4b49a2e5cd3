"""GEGLU as one operator: with torch here, its kernels in a child that interprets them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers_interpreter import Call, child_process
from torch import Tensor
from torch.nn import functional as F

from train.fused.geglu import geglu, traffic_bytes

RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = [(2, 3, 10), (1, 2), (17, 2 * 257), (2, 9, 2 * 600), (2, 2, 3, 2 * 31), (0, 6)]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def plain_geglu(projected: Tensor) -> Tensor:
    hidden, gate = projected.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def inputs_of(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    projected = 3 * torch.randn(shape, generator=generator)
    d_output = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator)
    return projected.to(dtype), d_output.to(dtype)


def differentiate(
    projected: Tensor, d_output: Tensor, function: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    leaf = projected.detach().clone().requires_grad_()
    output = function(leaf)
    (gradient,) = torch.autograd.grad(output, leaf, d_output)
    return output.detach(), gradient


def run(shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[str, Any]]:
    """In the child: arrays, for they need no memory that both processes hold."""
    found = differentiate(*inputs_of(shape, dtype), geglu)
    return [(str(tensor.dtype), tensor.double().numpy()) for tensor in found]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Call]:
    with child_process(interprets=True) as call:
        yield call


@needs_triton
@pytest.mark.parametrize("interprets", [True, False])
@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_result_and_its_gradient_are_those_of_float64(interpreted, interprets, shape, dtype):
    found = interpreted(run, shape, dtype) if interprets else run(shape, dtype)
    wide = [tensor.double() for tensor in inputs_of(shape, dtype)]
    for (name, array), expected in zip(found, differentiate(*wide, plain_geglu), strict=True):
        assert name == str(dtype)
        torch.testing.assert_close(
            torch.as_tensor(array), expected, rtol=RELATIVE[dtype], atol=1e-5
        )


def run_extremes() -> list[Any]:
    projected = torch.tensor([[1.0, 1.0, 1.0, torch.nan, 100.0, -100.0, 0.0, 1.0]])
    return [t.numpy() for t in differentiate(projected, torch.ones(1, 4), geglu)]


@needs_triton
@pytest.mark.parametrize("interprets", [True, False])
def test_far_gates_neither_overflow_nor_reach_their_neighbours(interpreted, interprets):
    output, gradient = interpreted(run_extremes) if interprets else run_extremes()
    torch.testing.assert_close(
        torch.as_tensor(output), torch.tensor([[100.0, 0.0, 0.0, torch.nan]]), equal_nan=True
    )
    expected = torch.tensor([[100.0, 0.0, 0.0, 0.841345, 1.0, 0.0, 0.5, torch.nan]])
    torch.testing.assert_close(torch.as_tensor(gradient), expected, equal_nan=True)


def run_spread() -> list[bool]:
    """In the child: rows that are not next to each other, and a gradient without strides."""
    projected, _ = inputs_of((6, 20), torch.float32)
    wide = torch.full((6, 33), torch.nan)
    wide[:, 5:25] = projected
    ones = torch.ones(()).expand(6, 10)
    together = differentiate(projected, torch.ones(6, 10), geglu)
    leaf = wide.clone().requires_grad_()
    output = geglu(leaf[:, 5:25])
    output.backward(ones)
    return [torch.equal(output, together[0]), torch.equal(leaf.grad[:, 5:25], together[1])]


@needs_triton
@pytest.mark.parametrize("interprets", [True, False])
def test_strides_change_nothing(interpreted, interprets):
    assert (interpreted(run_spread) if interprets else run_spread()) == [True, True]


def test_gradients_are_those_of_finite_differences():
    projected = inputs_of((3, 8), torch.float64)[0].requires_grad_()
    assert torch.autograd.gradcheck(geglu, (projected,))


def check_operators() -> None:
    projected, d_output = inputs_of((3, 8), torch.float32)
    operators = torch.ops.latentmill
    torch.library.opcheck(operators.geglu.default, (projected.clone().requires_grad_(),))
    torch.library.opcheck(operators.geglu_backward.default, (d_output, projected))


@needs_triton
@pytest.mark.parametrize("interprets", [True, False])
def test_torch_finds_nothing_wrong_with_the_operators(interpreted, interprets):
    if interprets:
        interpreted(check_operators)
    else:
        check_operators()


def test_a_compiled_graph_has_the_numbers_of_the_eager_one():
    torch.manual_seed(0)
    layers = torch.nn.Linear(6, 20), torch.nn.Linear(10, 6)

    def feed_forward(x: Tensor) -> Tensor:
        return layers[1](geglu(layers[0](x)))

    x, weights = torch.randn(2, 5, 6), [weight for one in layers for weight in one.parameters()]
    results = []
    for function in (
        feed_forward,
        torch.compile(feed_forward, fullgraph=True, backend="aot_eager"),
    ):
        output = function(x)
        results.append((output, *torch.autograd.grad(output.square().sum(), weights)))
    torch._dynamo.reset()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one)


def test_for_the_backward_pass_only_the_projection_is_kept():
    projected = inputs_of((3, 8), torch.float32)[0].requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        geglu(projected)
    assert [tensor.data_ptr() for tensor in kept] == [projected.data_ptr()]


def test_traffic_is_each_tensor_once():
    # Forward both halves and the result; backward those two again, and the halves' gradients.
    assert traffic_bytes(rows=10, width=100, itemsize=2) == (3 * 2000, 5 * 2000)
