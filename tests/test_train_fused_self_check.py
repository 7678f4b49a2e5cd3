"""The fused kernels as a GPU meets them: checked at the start of a run, and compiled for one."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers_interpreter import Call, child_process
from torch import Tensor

from train.fused.self_check import failure_of

CPU = torch.device("cpu")
KERNELS = [
    "tile_statistics", "combine_statistics", "normalise",
    "tile_gradients", "combine_gradients", "affine_gradients", "input_gradient",
]  # fmt: skip
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Call]:
    with child_process(interprets=True) as call:
        yield call


# The check at the start of a run ------------------------------------------------------------------


def check_twice(kernel: str, dtype: torch.dtype) -> list[Any]:
    """In the child: the verdict, and whether torch's global state is as it was."""
    torch.use_deterministic_algorithms(False)
    state = torch.random.get_rng_state()
    reason = failure_of(kernel, CPU, dtype)
    same = torch.equal(state, torch.random.get_rng_state())
    is_as_before = same and not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    return [reason, is_as_before]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["norms", "geglu", "update"])
def test_right_kernels_pass_the_check_and_it_leaves_no_trace(interpreted, kernel, dtype):
    assert interpreted(check_twice, kernel, dtype) == [None, True]


def check_wrong(kernel: str, fault: str) -> str | None:
    """In the child: the verdict on a kernel with a fault."""
    from train.fused import adamw, geglu_kernels, group_norm_launch

    faults: dict[tuple[str, str], tuple[Any, str, Callable[..., Any]]] = {
        ("norms", "wrong result"): (group_norm_launch, "forward", scale_first),
        ("norms", "wrong gradient"): (group_norm_launch, "backward", scale_last),
        ("norms", "raises"): (group_norm_launch, "forward", lambda _: torch.ones(2).view(3)),
        ("geglu", "writes nothing"): (geglu_kernels, "forward", torch.empty_like),
        ("geglu", "writes no gradient"): (geglu_kernels, "backward", torch.empty_like),
        ("update", "wrong scalars"): (adamw.FusedAdamW, "_scalars", lambda scalars: 1.01 * scalars),
    }
    where, name, spoil = faults[kernel, fault]
    right = getattr(where, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, lambda *args: spoil(right(*args)))
        return failure_of(kernel, CPU, torch.float32)


def scale_first(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return 1.001 * tensors[0], *tensors[1:]


def scale_last(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return *tensors[:-1], 1.001 * tensors[-1]


@pytest.mark.parametrize(
    ("kernel", "fault", "words"),
    [
        ("norms", "wrong result", "the result (2x130x13x17) is off by"),
        ("norms", "wrong gradient", "the gradient of bias (130) is off by 1.0e-03"),
        ("norms", "raises", "it does not run: RuntimeError: shape '[3]' is invalid"),
        ("geglu", "writes nothing", "the result (3x7x259) is off by nan"),
        ("geglu", "writes no gradient", "the gradient of projected (3x7x518) is off by nan"),
        ("update", "wrong scalars", "the weights (4415) is off by"),
    ],
)
def test_a_wrong_kernel_does_not_pass(interpreted, kernel, fault, words):
    assert words in interpreted(check_wrong, kernel, fault)


def test_where_triton_cannot_run_the_check_says_so():
    assert failure_of("norms", CPU, torch.float32) == "no CUDA device"


# On a GPU -----------------------------------------------------------------------------------------


class CompilesForHopper:
    """In the place of a kernel: compiles what a launch would, and runs nothing.

    Args:
        kernel: of Triton.
        ptx: receives what it is compiled to, by the kernel's name.
    """

    def __init__(self, kernel: Any, ptx: dict[str, str]) -> None:
        self._kernel, self._ptx = kernel, ptx

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert min(grid) > 0
        assert max(grid[1:], default=0) < 65536  # CUDA's limit in the second and third dimension
        return self._compile

    def _compile(self, *args: Any, num_warps: int = 4, **constants: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names, kinds = (
            {torch.bfloat16: "*bf16", torch.float32: "*fp32"},
            {int: "i32", float: "fp32"},
        )
        signature, attributes = dict.fromkeys(self._kernel.arg_names, "constexpr"), {}
        for place, value in enumerate(args):
            parameter = self._kernel.params[place]
            number = value.data_ptr() if isinstance(value, Tensor) else value
            specialises = not parameter.do_not_specialize
            if value is None or (type(value) is int and value == 1 and specialises):
                constants[parameter.name] = value
                continue
            is_tensor = isinstance(value, Tensor)
            signature[parameter.name] = names[value.dtype] if is_tensor else kinds[type(value)]
            if specialises and type(value) is not float and number % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(self._kernel, signature, constants, attributes)
        target, options = GPUTarget("cuda", 90, 32), {"num_warps": num_warps}
        compiled = triton.compile(source, target=target, options=options)
        self._ptx[self._kernel.__name__] = compiled.asm["ptx"]


def compile_norms(
    shape: tuple[int, ...], num_groups: int, dtype: torch.dtype, is_in_resnet: bool
) -> dict[str, str]:
    """In a child that does not interpret: PTX of what a norm of this shape runs, both ways."""
    from train.fused import group_norm_kernels as kernels
    from train.fused import group_norm_launch as launch

    x = torch.empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    shift = torch.empty(shape[:2], dtype=dtype) if is_in_resnet else None
    weight, bias = torch.empty(shape[1]), torch.empty(shape[1])
    ptx: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in KERNELS:
            patch.setattr(kernels, name, CompilesForHopper(getattr(kernels, name), ptx))
        _, statistics = launch.forward(x, shift, weight, bias, num_groups, 1e-5, is_in_resnet)
        launch.backward(x, x, shift, weight, bias, statistics, num_groups, is_in_resnet)
    return ptx


def compile_geglu(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, str]:
    """In a child that does not interpret: PTX of both kernels."""
    from train.fused import geglu_kernels as kernels

    projected, ptx = torch.empty(shape, dtype=dtype), dict[str, str]()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("geglu", "geglu_gradient"):
            patch.setattr(kernels, name, CompilesForHopper(getattr(kernels, name), ptx))
        kernels.backward(kernels.forward(projected), projected)
    return ptx


@pytest.fixture(scope="module")
def compiling() -> Iterator[Call]:
    with child_process(interprets=False) as call:
        yield call


def test_the_norms_kernels_compile_for_a_hopper_gpu_and_move_16_bytes_at_a_time(compiling):
    ptx = compiling(compile_norms, (2, 320, 64, 64), 32, torch.bfloat16, True)
    assert list(ptx) == KERNELS
    for name in ("tile_statistics", "normalise", "tile_gradients", "input_gradient"):
        assert "ld.global.v4.b32" in ptx[name], name
    for name in ("normalise", "input_gradient"):
        assert "st.global.v4.b32" in ptx[name], name


def test_they_compile_for_what_triton_takes_as_constant_and_for_no_alignment(compiling):
    ptx = compiling(compile_norms, (1, 3, 1, 1), 1, torch.float32, False)
    assert list(ptx) == KERNELS
    assert "st.global.v4" not in ptx["normalise"]


def test_geglus_kernels_compile_for_a_hopper_gpu_and_move_16_bytes_at_a_time(compiling):
    ptx = compiling(compile_geglu, (2, 7, 2 * 1280), torch.bfloat16)
    assert all("ld.global.v4.b32" in one and "st.global.v4.b32" in one for one in ptx.values())
    assert len(ptx) == len(compiling(compile_geglu, (1, 2), torch.float32)) == 2
