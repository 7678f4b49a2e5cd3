"""Which switches of the fast path are on here, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from serve.fast.graphs import MIN_GRAPHS
from serve.fast_path import FastPath
from shards.errors import UserError
from train.compilation import compile_failure
from train.config import AttentionChoice
from train.fused.triton_runtime import missing

_KERNELS: dict[str, Literal["norms", "geglu"]] = {"fused_norms": "norms", "fused_geglu": "geglu"}
_ON_GPUS_ALONE = ("conv_search", "cuda_graphs")
_BF16_CAPABILITY = (8, 0)  # older ones emulate it
SWITCHES = (
    *("channels_last", *_KERNELS, "batched_projections", "conv_search", "compile", "cuda_graphs"),
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Images of one call of the pipeline.

    Args:
        batch: images.
        height: of each, in pixels.
        width: of each, in pixels.
    """

    batch: int
    height: int
    width: int

    def __str__(self) -> str:
        """As the command line has it."""
        return f"{self.batch}x{self.height}x{self.width}"


@dataclass(frozen=True, kw_only=True)
class FastPlan:
    """What is on; the fields are those of `FastPath`.

    Attributes:
        notes: a line for each switch that is off though it was asked for, or a GPU might have it.
    """

    dtype: torch.dtype = torch.float32
    attention: AttentionChoice | None = None
    channels_last: bool = False
    fused_norms: bool = False
    fused_geglu: bool = False
    batched_projections: bool = False
    conv_search: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    max_graphs: int = 32
    shapes: tuple[Shape, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether nothing is on at all."""
        changes = self.attention is not None or self.dtype != torch.float32
        return not changes and not any(getattr(self, name) for name in SWITCHES)

    def lines(self) -> list[str]:
        """What is on, and the notes."""
        on = [name for name in SWITCHES if getattr(self, name)]
        dtype = str(self.dtype).removeprefix("torch.")
        return [f"dtype {dtype}", *(f"{name} on" for name in on), *self.notes]


def plan_fast(fast: FastPath, pipeline: Any, device: torch.device) -> FastPlan:
    """Resolve every `auto`, and turn off what cannot run here.

    Args:
        fast: the switches.
        pipeline: for its own size.
        device: where it runs.

    Raises:
        UserError: a shape that cannot be.
    """
    notes: list[str] = []
    if fast.max_graphs < MIN_GRAPHS:
        raise UserError("--max-graphs", f"{fast.max_graphs}", wanted=f"at least {MIN_GRAPHS}")
    dtype = _resolve_dtype(fast, device)
    switches = {}
    for name in SWITCHES:
        choice = getattr(fast, name)
        is_wanted = choice == "on" or (choice == "auto" and device.type == "cuda")
        reason = _obstacle(name, device, dtype) if is_wanted else None
        if reason:
            notes.append(f"{name} off: {reason}")
        switches[name] = is_wanted and not reason
    is_plain = fast.attention == "auto" and device.type != "cuda"
    return FastPlan(
        dtype=dtype,
        attention=None if is_plain else fast.attention,
        max_graphs=fast.max_graphs,
        shapes=tuple(_shapes(fast, pipeline)),
        notes=tuple(notes),
        **switches,
    )


def _resolve_dtype(fast: FastPath, device: torch.device) -> torch.dtype:
    if fast.dtype != "auto":
        chosen: torch.dtype = getattr(torch, fast.dtype)
        return chosen
    if device.type != "cuda":
        return torch.float32
    has_bf16 = torch.cuda.get_device_capability(device) >= _BF16_CAPABILITY
    return torch.bfloat16 if has_bf16 else torch.float16


def _obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a switch cannot be on here."""
    if name in _ON_GPUS_ALONE and device.type != "cuda":
        return "no CUDA device"
    if name in _KERNELS:
        return missing(device) or _disagreement(name, device, dtype)
    if name == "compile":
        lacks_triton = missing(device) if device.type == "cuda" else None
        return lacks_triton or compile_failure(device)
    return None


def _disagreement(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    from train.fused.self_check import failure_of

    return failure_of(_KERNELS[name], device, dtype)


def _shapes(fast: FastPath, pipeline: Any) -> Iterator[Shape]:
    factor, size = pipeline.vae_scale_factor, pipeline.unet.config.sample_size
    if not fast.compiled_shapes:
        height, width = (size, size) if isinstance(size, int) else size
        yield Shape(batch=1, height=height * factor, width=width * factor)
    for text in fast.compiled_shapes:
        numbers = text.split("x")
        if len(numbers) != 3 or not all(n.isascii() and n.isdecimal() for n in numbers):
            raise UserError("--compiled-shapes", text, wanted="BATCHxHEIGHTxWIDTH")
        batch, height, width = map(int, numbers)
        # 8 is what the pipeline itself asks for.
        if min(batch, height, width) < 1 or height % 8 or width % 8:
            raise UserError("--compiled-shapes", text, wanted="sides that are multiples of 8")
        yield Shape(batch=batch, height=height, width=width)
