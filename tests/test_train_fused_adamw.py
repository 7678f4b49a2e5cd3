"""The fused update: AdamW, average and low-precision copy, through Triton's interpreter.

The interpreter runs the kernel on a CPU, program by program. What only a compiled kernel has, wide
memory accesses and rounding in hardware, is read from its PTX.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import weakref
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_python
from helpers_interpreter import rounded_as_by_hardware
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import train.fused
from train.checkpoint import optimizer_tensors, restore_optimizer
from train.fused import triton_runtime
from train.fused.adamw import FusedAdamW, bytes_per_parameter

CPU = torch.device("cpu")
KERNEL = "train.fused.adamw_kernel"
RECIPE: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.1}
NUM_STEPS = 100
MOMENTS = ("exp_avg", "exp_avg_sq")
CHANNELS_LAST = torch.channels_last

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
interpreted = pytest.mark.usefixtures("kernel")


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    """The kernel's module, interpreted.

    Two things more than the interpreter does: bfloat16 is rounded as by hardware, not truncated,
    and what the compiler is told of multiples must be true.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    rounded = rounded_as_by_hardware(interpreter._convert_float)

    def checked(handle: Any, attribute: str, values: Any) -> None:
        assert attribute == "tt.divisibility"
        assert (handle.data % int(np.squeeze(values)) == 0).all(), "not a multiple"

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(interpreter.TensorHandle, "set_attr", checked)
        patch.setattr(interpreter, "_convert_float", rounded)
        forget_kernel()
        yield importlib.import_module(KERNEL)
    forget_kernel()


def forget_kernel() -> None:
    """Whether a kernel is interpreted is settled when its module is imported."""
    sys.modules.pop(KERNEL, None)
    vars(train.fused).pop("adamw_kernel", None)


def scalar(value: float, device: torch.device = CPU) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)


def update(optimizer: FusedAdamW, gradients: list[Tensor], **changes: Any) -> None:
    """One update at a rate of 0.01."""
    settings: dict[str, Any] = {
        "learning_rate": scalar(0.01),
        "divisor": scalar(1.0),
        "left_out": scalar(0.0),
        "averages": None,
        "average_weight": 0.0,
    }
    optimizer.update(gradients, **{**settings, **changes})


def random_like(tensors: list[Tensor], seed: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Random numbers in the layout of some tensors."""
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(tensor.shape, generator=generator) for tensor in tensors]
    return [
        torch.empty_like(tensor, dtype=dtype).copy_(one)
        for tensor, one in zip(tensors, numbers, strict=True)
    ]


def odd_tensors() -> list[Tensor]:
    """Odd sizes, none at all, a channels-last convolution, and rows of a matrix."""
    conv = torch.empty(8, 5, 3, 3).contiguous(memory_format=CHANNELS_LAST)
    sizes = [torch.empty(size) for size in (1, 3, 127, 4097, 0)]
    return [*random_like([*sizes, conv], seed=0), torch.linspace(-1, 1, 63).view(9, 7)[2:5]]


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    (group,) = optimizer.param_groups
    tensors = optimizer_tensors(optimizer, [str(n) for n, _ in enumerate(group["params"])])
    return {name: tensor.clone() for name, tensor in tensors.items()}


def bits(tensor: Tensor) -> Tensor:
    """The bytes: unlike numbers those of a NaN are equal to themselves."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(ones: Any, others: Any) -> None:
    if isinstance(ones, dict):
        assert ones.keys() == others.keys()
        ones, others = list(ones.values()), [others[name] for name in ones]
    for one, other in zip(ones, others, strict=True):
        assert torch.equal(bits(one), bits(other))


# The numbers --------------------------------------------------------------------------------------


AVERAGE_WEIGHT = 0.02


def warm_up(step: int) -> Tensor:
    return scalar(0.01 * min(1.0, (step + 1) / 20))


def divisor_at(step: int) -> Tensor:
    """A loss scale, and at every third step clipping too."""
    return scalar(1024.0 * (1.7 if step % 3 == 0 else 1.0))


def gradients_at(step: int, tensors: list[Tensor]) -> list[Tensor]:
    """With a direction that stays, so that weights move by as much as they are."""
    noise, drift = random_like(tensors, step + 1), random_like(tensors, 1000)
    return [(n + d) * 102.4 for n, d in zip(noise, drift, strict=True)]


def numbers_of(optimizer: Any, weights: list[Tensor], averages: list[Tensor]) -> dict[str, Tensor]:
    """All that an update changes, as one float64 vector a kind."""
    states = [optimizer.state[weight] for weight in weights]
    kinds = {"weights": weights, "averages": averages}
    kinds |= {name: [state[name] for state in states] for name in MOMENTS}
    return {
        kind: torch.cat([t.detach().double().reshape(-1) for t in ts]) for kind, ts in kinds.items()
    }


@pytest.fixture(scope="module")
def fused_run(kernel: Any) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """Numbers after 100 updates, and the weights with their copies."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in {"CHUNK_SIZE": 4096, "BLOCK_SIZE": 4096, "TAIL_SIZE": 512}.items():
            patch.setattr(kernel, name, size)  # the interpreter takes as long for a small block
        masters = odd_tensors()
        published, averages = [master.bfloat16() for master in masters], copies(masters)
        optimizer = FusedAdamW(masters, **RECIPE, published=published)
        for step in range(NUM_STEPS):
            update(
                optimizer,
                gradients_at(step, masters),
                learning_rate=warm_up(step),
                divisor=divisor_at(step),
                averages=averages,
                average_weight=AVERAGE_WEIGHT,
            )
    return numbers_of(optimizer, masters, averages), masters, published


def reference_run(
    rate: float = 1.0, divisor: float = 1.0, average: float = 1.0, **recipe: Any
) -> dict[str, Tensor]:
    """The same by torch's plain AdamW in float64; factors for what should be 1."""
    start = odd_tensors()
    weights = [tensor.double() for tensor in start]
    averages = copies(weights)
    optimizer = torch.optim.AdamW(weights, **{**RECIPE, **recipe}, lr=0.0, foreach=False)
    for step in range(NUM_STEPS):
        optimizer.param_groups[0]["lr"] = warm_up(step).double().item() * rate
        gradients = gradients_at(step, start)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.double() / (divisor_at(step).double() * divisor)
        optimizer.step()
        torch._foreach_lerp_(averages, weights, AVERAGE_WEIGHT * average)
    return numbers_of(optimizer, weights, averages)


def relative_errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the difference over the norm; of single elements over the root mean square."""
    errors = {}
    for kind, numbers in wanted.items():
        difference = found[kind] - numbers
        errors[kind] = (difference.norm() / numbers.norm()).item()
        scale = numbers.abs() + numbers.square().mean().sqrt()
        errors[f"one of {kind}"] = (difference.abs() / scale).max().item()
    return errors


def test_a_hundred_updates_are_adamw_and_average_in_float64(fused_run):
    errors = relative_errors(fused_run[0], reference_run())
    assert max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize(
    "change",
    [
        {"betas": (0.9, float(np.float32(0.999)))},
        {"betas": (0.9 + 1e-6, 0.999)},
        {"eps": 1.001e-3},
        {"weight_decay": 0.1001},
        {"rate": 1.00001},
        {"divisor": 1.00001},
        {"average": 1.00001},
    ],
    ids=str,
)
def test_a_constant_that_is_slightly_wrong_would_be_seen(fused_run, change):
    errors = relative_errors(fused_run[0], reference_run(**change))
    assert max(errors.values()) > 2e-6, errors


def test_copies_are_the_rounded_weights(fused_run):
    _, masters, published = fused_run
    assert_same_bits(published, [master.bfloat16() for master in masters])


class Operators(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# The memory ---------------------------------------------------------------------------------------


class Guarded:
    """Tensors that lie in one run of memory, each with untouchable numbers before and after it.

    Args:
        tensors: whose values and layouts they take.
        gap: elements between them.
        dtype: theirs.
    """

    def __init__(self, tensors: list[Tensor], gap: int, dtype: torch.dtype = torch.float32) -> None:
        self._flat = torch.full((sum(t.numel() + gap for t in tensors) + gap,), 777.0, dtype=dtype)
        self._inside = torch.zeros(self._flat.shape, dtype=torch.bool)
        self.tensors, first = [], gap
        for tensor in tensors:
            self._inside[first : first + tensor.numel()] = True
            view = self._flat.as_strided(tensor.shape, tensor.stride(), first)
            self.tensors.append(view.copy_(tensor))
            first += tensor.numel() + gap

    def assert_untouched(self) -> None:
        assert (self._flat[~self._inside] == 777).all()


@interpreted
@pytest.mark.parametrize("gap", [1, 16], ids=["unaligned", "aligned"])
def test_nothing_is_written_beside_a_tensor(gap):
    masters = random_like([torch.empty(size) for size in (2048, 1040, 3, 0)], seed=0)
    masters += random_like([torch.empty(4, 8, 3, 3).contiguous(memory_format=CHANNELS_LAST)], 1)
    wanted, wanted_averages = copies(masters), copies(masters)
    plain = FusedAdamW(wanted, **RECIPE, published=None)
    weights, averages = Guarded(masters, gap), Guarded(masters, gap)
    published = Guarded(masters, gap, torch.bfloat16)
    optimizer = FusedAdamW(weights.tensors, **RECIPE, published=published.tensors)
    moments = {name: Guarded(list(map(torch.zeros_like, masters)), gap) for name in MOMENTS}
    for name, guarded in moments.items():
        for master, moment in zip(weights.tensors, guarded.tensors, strict=True):
            optimizer.state[master][name] = moment
    for step in range(2):
        gradients = Guarded(random_like(masters, step + 1), gap)
        update(optimizer, gradients.tensors, averages=averages.tensors, average_weight=0.1)
        update(plain, gradients.tensors, averages=wanted_averages, average_weight=0.1)
        gradients.assert_untouched()
    for guarded in (weights, averages, published, *moments.values()):
        guarded.assert_untouched()
    assert_same_bits(weights.tensors, wanted)
    assert_same_bits(averages.tensors, wanted_averages)
    assert_same_bits(published.tensors, [master.bfloat16() for master in wanted])
    assert_same_bits(state_of(optimizer), state_of(plain))


@interpreted
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_step_that_is_left_out_changes_nothing_but_the_average(poison):
    masters = random_like([torch.empty(size) for size in (1030, 5)], seed=0)
    published, averages = [master.bfloat16() for master in masters], copies(masters)
    optimizer = FusedAdamW(masters, **RECIPE, published=published)

    def step(gradients: list[Tensor], **changes: Any) -> None:
        update(optimizer, gradients, averages=averages, average_weight=0.25, **changes)

    step(random_like(masters, seed=1))
    before, state, rounded = copies(masters), state_of(optimizer), copies(published)
    moved = [a + 0.25 * (m - a) for a, m in zip(averages, masters, strict=True)]
    step([torch.full_like(m, poison) for m in masters], divisor=scalar(poison), left_out=scalar(1))
    assert_same_bits([*masters, *published], [*before, *rounded])
    assert_same_bits(state_of(optimizer), state)
    torch.testing.assert_close(averages, moved, rtol=1e-6, atol=1e-7)
    step(random_like(masters, seed=1))
    assert all(torch.isfinite(tensor).all() for tensor in [*masters, *published, *averages])


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # 0/0, of the step left out
def test_a_first_step_that_is_left_out_does_not_count():
    gradient = torch.ones(5)
    weights = [torch.zeros(5), torch.zeros(5)]
    optimizers = [FusedAdamW([weight], **RECIPE, published=None) for weight in weights]
    update(optimizers[0], [gradient / 0], left_out=scalar(1.0))
    assert weights[0].eq(0).all()
    for optimizer in optimizers:
        update(optimizer, [gradient])
    assert_same_bits(weights[:1], weights[1:])
    assert_same_bits(state_of(optimizers[0]), state_of(optimizers[1]))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_and_copies_may_be_of_either_low_precision(dtype):
    start = random_like([torch.empty(1030), torch.empty(7)], seed=0)
    gradients = random_like(start, seed=1, dtype=dtype)
    low, full = copies(start), copies(start)
    published = [torch.zeros_like(tensor, dtype=dtype) for tensor in start]
    update(FusedAdamW(low, **RECIPE, published=published), gradients)
    update(FusedAdamW(full, **RECIPE, published=None), [g.float() for g in gradients])
    assert not torch.equal(low[0], start[0])
    assert_same_bits(low, full)
    assert_same_bits(published, [tensor.to(dtype) for tensor in full])


@interpreted
def test_a_gradient_may_lie_in_another_order_than_its_weight():
    conv = torch.empty(6, 5, 3, 3).contiguous(memory_format=CHANNELS_LAST)
    start = random_like([conv, torch.empty(4, 6), torch.empty(3, 4, 1, 1)], seed=0)
    gradients = random_like(start, seed=1)
    others = [
        gradients[0].contiguous(),
        gradients[1].t().contiguous().t(),
        gradients[2].as_strided((3, 4, 1, 1), (4, 1, 4, 4)),  # one element is in any order
    ]
    assert others[0].stride() != conv.stride()
    plain, other = copies(start), copies(start)
    update(FusedAdamW(plain, **RECIPE, published=None), gradients)
    optimizer = FusedAdamW(other, **RECIPE, published=None)
    with Operators() as operators:
        update(optimizer, others)
    assert_same_bits(plain, other)
    assert operators.names.count("empty_like") == 2, "the last one needs no copy"


@interpreted
def test_rows_of_a_channels_last_weight_are_updated_in_their_place():
    conv = torch.empty(6, 5, 3, 3).contiguous(memory_format=CHANNELS_LAST)
    (whole,) = random_like([conv], seed=0)
    (gradient,) = random_like([conv], seed=1)
    rows, before = whole.clone(), whole.clone()
    update(FusedAdamW([whole], **RECIPE, published=None), [gradient])
    update(FusedAdamW([rows[2:5]], **RECIPE, published=None), [gradient[2:5]])
    assert_same_bits([rows[2:5], rows[:2], rows[5:]], [whole[2:5], before[:2], before[5:]])


def test_weights_with_gaps_are_refused(kernel):
    with pytest.raises(AssertionError):
        FusedAdamW([torch.zeros(4, 6)[:, ::2]], **RECIPE, published=None)


def test_it_makes_no_difference_how_a_tensor_is_cut_into_chunks(kernel, monkeypatch):
    start = random_like([torch.empty(2500), torch.empty(3)], seed=0)
    results = []
    for sizes in ((16384, 1024, 256), (1024, 256, 64), (1024, 1024, 1024)):
        for name, size in zip(("CHUNK_SIZE", "BLOCK_SIZE", "TAIL_SIZE"), sizes, strict=True):
            monkeypatch.setattr(kernel, name, size)
        results.append(copies(start))
        update(FusedAdamW(results[-1], **RECIPE, published=None), random_like(start, seed=1))
    assert not torch.equal(results[0][0], start[0])
    for one, other in pairwise(results):
        assert_same_bits(one, other)


@interpreted
def test_gradients_and_averages_may_be_elsewhere_at_every_step():
    start = random_like([torch.empty(50), torch.empty(3)], seed=0)
    still, moving = copies(start), copies(start)
    optimizers = [FusedAdamW(weights, **RECIPE, published=None) for weights in (still, moving)]
    fixed, averages, others = copies(start), copies(start), copies(start)
    kept = []  # so that no address is used again
    for step in range(4):
        for gradient, new in zip(fixed, random_like(start, step + 1), strict=True):
            gradient.copy_(new)
        # The first comes back to where it was at the step before, the second does not.
        elsewhere = [fixed[0].clone() if step % 2 else fixed[0], fixed[1].clone()]
        others = copies(others)
        kept += elsewhere + others
        update(optimizers[0], fixed, averages=averages, average_weight=0.1)
        update(optimizers[1], elsewhere, averages=others, average_weight=0.1)
        assert_same_bits([*moving, *others], [*still, *averages])


# What a graph holds -------------------------------------------------------------------------------


def test_steps_differ_in_what_tensors_hold_alone(kernel, monkeypatch):
    launches: list[Any] = []

    def launch(*args: Any, **options: Any) -> None:
        values = [a.data_ptr() if isinstance(a, Tensor) else a for a in args]
        del values[4]  # the table of scalars is made anew, in a graph's own memory
        launches.append((values, options))

    monkeypatch.setattr(kernel, "update_chunks", {(1,): launch})
    masters, gradients, averages = [torch.zeros(4)], [torch.ones(4)], [torch.zeros(4)]
    optimizer = FusedAdamW(masters, **RECIPE, published=None)
    with Operators() as operators:
        for rate, left_out in ((0.1, 0.0), (0.2, 1.0), (0.3, 0.0)):
            update(
                optimizer,
                gradients,
                learning_rate=scalar(rate),
                left_out=scalar(left_out),
                averages=averages,
                average_weight=0.1,
            )
    assert len(launches) == 3
    assert launches[0] == launches[1] == launches[2]
    assert not {"_local_scalar_dense", "nonzero", "equal"} & set(operators.names), "the host waits"
    assert optimizer.state[masters[0]]["step"] == 2


def test_a_captured_update_has_addresses_of_its_own(kernel, monkeypatch):
    tables = []

    def launch(table: Tensor, *_: Any, **__: Any) -> None:
        tables.append(weakref.ref(table))  # who keeps it is the question

    monkeypatch.setattr(kernel, "update_chunks", {(1,): launch})
    masters, gradients = [torch.zeros(4)], [[torch.ones(4)] for _ in range(6)]
    optimizer = FusedAdamW(masters, **RECIPE, published=None)
    is_captured = [False, True, True, False, True, False]  # also two with none between
    for captured, gradient in zip(is_captured, gradients, strict=True):
        monkeypatch.setattr("train.fused.adamw._is_capturing", lambda _, now=captured: now)
        update(optimizer, gradient)
    # On a CPU the table of a captured update is the very source that each replay copies from.
    for table, captured, (gradient,) in zip(tables, is_captured, gradients, strict=True):
        if captured:
            assert table() is not None, "gone before it is replayed"
            assert table()[:2, 0].tolist() == [gradient.data_ptr(), masters[0].data_ptr()]


def test_the_first_update_cannot_be_captured(kernel, monkeypatch):
    optimizer = FusedAdamW([torch.zeros(4)], **RECIPE, published=None)
    monkeypatch.setattr("train.fused.adamw._is_capturing", lambda device: True)
    with pytest.raises(AssertionError, match="before one is captured"):
        update(optimizer, [torch.ones(4)])


@pytest.mark.gpu
@needs_triton
def test_a_captured_update_goes_on_as_an_eager_one(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delitem(sys.modules, KERNEL, raising=False)  # the interpreted one
    monkeypatch.delattr(train.fused, "adamw_kernel", raising=False)
    device = torch.device("cuda")
    start = [tensor.to(device) for tensor in random_like([torch.empty(40000), torch.empty(3)], 0)]
    inputs, rate, left_out = copies(start), scalar(0.1, device), scalar(0.0, device)
    captured, eager = copies(start), copies(start)
    averages, others = copies(start), copies(start)
    published = [tensor.bfloat16() for tensor in start]
    optimizers = [
        FusedAdamW(captured, **RECIPE, published=published),
        FusedAdamW(eager, **RECIPE, published=[tensor.bfloat16() for tensor in start]),
    ]

    def step(optimizer: FusedAdamW, moved: list[Tensor]) -> None:
        settings = {"learning_rate": rate, "left_out": left_out, "divisor": rate.clone()}
        gradients = [(tensor * 2).bfloat16() for tensor in inputs]
        update(optimizer, gradients, averages=moved, average_weight=0.1, **settings)

    step(optimizers[0], averages)
    step(optimizers[1], others)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(optimizers[0], averages)
    for number in range(5):
        rate.fill_(0.1 / (number + 1))
        left_out.fill_(float(number == 2))
        for tensor, new in zip(inputs, random_like(inputs, number + 1), strict=True):
            tensor.copy_(new)
        if number == 3:
            step(optimizers[0], averages)  # an eager one between replays, with other addresses
        else:
            graph.replay()
        step(optimizers[1], others)
        assert_same_bits([*captured, *averages], [*eager, *others])
    assert_same_bits(published, [tensor.bfloat16() for tensor in eager])
    assert_same_bits(state_of(optimizers[0]), state_of(optimizers[1]))


# Checkpoints --------------------------------------------------------------------------------------


def torch_adamw(masters: list[Tensor]) -> torch.optim.AdamW:
    return torch.optim.AdamW(masters, lr=0.01, **RECIPE, fused=True)


def hand_over(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    """As through a checkpoint: a copy, in no particular layout."""
    names = [str(number) for number, _ in enumerate(source.param_groups[0]["params"])]
    tensors = optimizer_tensors(source, names)
    saved = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    restore_optimizer(target, names, saved)


@interpreted
def test_a_run_goes_on_from_torch_and_back_with_the_same_bits():
    start = odd_tensors()
    weights = copies(start)
    before = torch_adamw(weights)
    for weight, gradient in zip(weights, random_like(start, seed=1), strict=True):
        weight.grad = gradient
    before.step()
    fused, resumed = FusedAdamW(copies(weights), **RECIPE, published=None), torch_adamw(weights)
    hand_over(before, fused)
    assert_same_bits(state_of(fused), state_of(before))
    hand_over(fused, resumed)
    assert_same_bits(state_of(resumed), state_of(before))
    gradients = random_like(start, seed=2)
    update(fused, gradients)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    resumed.step()
    ours, theirs = fused.param_groups[0]["params"], weights
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(state_of(fused), state_of(resumed), rtol=1e-6, atol=1e-7)


@interpreted
def test_a_resumed_run_is_the_one_that_was_never_interrupted():
    start = odd_tensors()[3:]
    steady, broken = copies(start), copies(start)
    optimizers = [FusedAdamW(weights, **RECIPE, published=None) for weights in (steady, broken)]
    for step in range(3):
        if step == 1:
            broken = copies(broken)
            successor = FusedAdamW(broken, **RECIPE, published=None)
            update(successor, random_like(start, seed=7), learning_rate=scalar(0))  # overwritten
            broken[:] = [each.copy_(old) for each, old in zip(broken, steady, strict=True)]
            hand_over(optimizers[1], successor)
            optimizers[1] = successor
        for optimizer in optimizers:
            update(optimizer, random_like(start, step + 1))
    assert_same_bits(broken, steady)
    assert_same_bits(state_of(optimizers[1]), state_of(optimizers[0]))


@interpreted
def test_restored_state_stays_where_a_captured_graph_expects_it():
    conv = torch.zeros(2, 3, 3, 3).contiguous(memory_format=CHANNELS_LAST)
    optimizers = [FusedAdamW([conv.clone()], **RECIPE, published=None) for _ in range(2)]
    update(optimizers[0], random_like([conv], seed=1))
    (master,) = optimizers[1].param_groups[0]["params"]
    where = {name: tensor.data_ptr() for name, tensor in optimizers[1].state[master].items()}
    hand_over(*optimizers)
    state = optimizers[1].state[master]
    assert {name: tensor.data_ptr() for name, tensor in state.items()} == where
    assert all(state[name].stride() == conv.stride() for name in MOMENTS)
    assert_same_bits(state_of(optimizers[1]), state_of(optimizers[0]))
    restore_optimizer(optimizers[1], ["0"], {})  # of a checkpoint before torch's first step
    assert all(tensor.eq(0).all() for tensor in optimizers[1].state[master].values())


# What it moves, and where it runs -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("gradient", "published", "has_average", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, False, 28),
        (torch.bfloat16, torch.bfloat16, True, 36),
        (torch.float32, None, False, 28),
        (torch.float32, torch.float16, True, 38),
    ],
)
def test_bytes_per_parameter_are_what_the_kernel_moves(
    kernel, monkeypatch, gradient, published, has_average, expected
):
    from triton.runtime.interpreter import InterpreterBuilder

    moved = []

    def counting(method: str) -> None:
        original = getattr(InterpreterBuilder, method)
        is_load = method == "create_masked_load"

        def access(self: Any, pointers: Any, *rest: Any) -> Any:
            if pointers.data.size > 1:  # not a table's
                mask = rest[0] if is_load else rest[1]
                bits_each = pointers.get_element_ty().primitive_bitwidth
                moved.append(int(mask.data.sum()) * bits_each // 8)
            return original(self, pointers, *rest)

        monkeypatch.setattr(InterpreterBuilder, method, access)

    masters = random_like([torch.empty(1030), torch.empty(7)], seed=0)
    low = [master.to(published) for master in masters] if published else None
    optimizer = FusedAdamW(masters, **RECIPE, published=low)
    counting("create_masked_load")
    counting("create_masked_store")
    averages = copies(masters) if has_average else None
    update(optimizer, random_like(masters, 1, gradient), averages=averages, average_weight=0.1)
    assert sum(moved) == expected * 1037
    assert bytes_per_parameter(gradient, published, has_average) == expected


@needs_triton
def test_the_compiled_kernel_moves_16_bytes_at_a_time(kernel, monkeypatch, tmp_path):
    import triton.language as tl
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_ahead

    try:
        knobs.nvidia.ptxas.path  # noqa: B018
    except RuntimeError as error:
        pytest.skip(f"Triton without ptxas: {error}")
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")  # as coming versions do
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    spec = importlib.util.spec_from_file_location("compiled_kernel", kernel.__file__)
    compiled = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compiled_kernel", compiled)
    spec.loader.exec_module(compiled)

    constants = {"gradient_type": tl.bfloat16, "published_type": tl.bfloat16, "has_average": True}
    constants |= {"chunk_size": 16384, "block_size": 1024, "tail_size": 256}
    types = {"address_table": "*i64", "sizes": "*i64", "chunk_tensors": "*i32"}
    types |= {"chunk_starts": "*i64", "scalar_table": "*fp32", "num_tensors": "i32"}
    names = compiled.update_chunks.arg_names
    signature = {name: types.get(name, "fp32") for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(compiled.update_chunks, signature, constexprs=places)
    target = GPUTarget("cuda", 90, 32)
    result = compile_ahead(source, target=target, options={"num_warps": compiled.NUM_WARPS})
    ptx = result.asm["ptx"]
    assert ptx.count("ld.global.v4.b32") == 4, "master, both moments, average"
    assert ptx.count("st.global.v4.b32") == 4
    assert ptx.count("ld.global.v2.b32") == 1, "the gradients, 4 of 2 bytes"
    assert ptx.count("st.global.v2.b32") == 1
    assert "cvt.rn.bf16x2.f32" in ptx, "rounds to nearest even"
    assert "bar.sync" not in ptx, "no data crosses between threads"
    assert result.asm["cubin"]


def test_what_kernels_lack_is_said(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cuda = torch.device("cuda", 0)
    assert triton_runtime.missing(CPU) == "no CUDA device"
    assert triton_runtime.missing(torch.device("meta")) == "no CUDA device"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton_runtime.missing(cuda) == "Triton is not installed"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_runtime.missing(CPU) == "Triton is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert triton_runtime.missing(CPU) is None
    assert "TRITON_INTERPRET" in triton_runtime.missing(cuda)
    monkeypatch.delenv("TRITON_INTERPRET")
    for capability, reason in (((6, 1), "compute capability 6.1 < 7.0"), ((9, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert triton_runtime.missing(cuda) == reason


def test_without_triton_nothing_imports_it():
    code = "import sys, train.fused.adamw; sys.exit('triton' in sys.modules)"
    assert run_python("-c", code).returncode == 0
