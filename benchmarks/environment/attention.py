"""Which attention kernels run here, found by running them, and how fast each is on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.result import spread
from shards.column import Json

if TYPE_CHECKING:
    import torch

    from train.attention import Trial

KERNELS = ("flash", "cudnn", "efficient", "math", "xformers")
_HEAD_DIM = 64
_TEXT_SHAPE = (77, 1024)  # tokens and width of Stable Diffusion 2's captions
_SMALL = {"8x8 self": (64, 320, False), "8x8 cross": (64, 320, True)}
# Stable Diffusion 2's U-Net at 512 px: its self-attention, and its largest cross-attention.
_SD2 = {
    "64x64 self": (4096, 320, False),
    "32x32 self": (1024, 640, False),
    "16x16 self": (256, 1280, False),
    "8x8 self": (64, 1280, False),
    "64x64 cross": (4096, 320, True),
}


def probe_attention(device: torch.device) -> Json:
    """Run every kernel forward and backward on a small self- and cross-attention layer.

    Returns:
        `dtype`; `torch_picks`, the kernel that torch itself takes; `kernels`: for each None, or the
        reason why it does not run.
    """
    dtype = _dtype(device)
    trials = [_build_trial(name, *shape, device, dtype, 1) for name, shape in _SMALL.items()]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "torch_picks": sorted({trial.use("sdpa") for trial in trials}),
        "kernels": {
            kernel: next(filter(None, (_why_not(trial, kernel) for trial in trials)), None)
            for kernel in KERNELS
        },
    }


def time_attention(device: torch.device, batch_size: int, repeats: int) -> list[Json]:
    """Milliseconds of the layers of Stable Diffusion 2 at 512 px, kernels in turns.

    The whole layer with its projections, forward and backward, as the trainer times it to choose; a
    sample is the median of several runs.

    Args:
        device: a GPU.
        batch_size: samples of the input.
        repeats: samples of each kernel.

    Returns:
        a row for each shape and kernel: `samples` and `ms`, or the reason in `not_measured`.
    """
    from train.attention import milliseconds_on_gpu

    rows: list[Json] = []
    for name, shape in _SD2.items():
        trial = _build_trial(name, *shape, device, _dtype(device), batch_size)
        reasons = {kernel: _why_not(trial, kernel) for kernel in KERNELS}
        samples: dict[str, list[float]] = {kernel: [] for kernel in KERNELS if not reasons[kernel]}
        for _ in range(repeats):
            for kernel, times in samples.items():
                trial.use(kernel)
                times.append(milliseconds_on_gpu(trial))
        for kernel, reason in reasons.items():
            row = {"shape": name, "kernel": kernel, "not_measured": reason}
            times = samples.get(kernel, [])
            rows.append(row | ({"samples": times, "ms": spread(times)} if times else {}))
    return rows


def _dtype(device: torch.device) -> torch.dtype:
    """What training computes in on such a device."""
    import torch

    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _build_trial(
    name: str,
    num_tokens: int,
    channels: int,
    is_cross: bool,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
) -> Trial:
    """A layer as diffusers builds it for such a U-Net, with random weights."""
    import torch
    from diffusers.models.attention_processor import Attention

    from train.attention import LayerShape, Trial

    layer = Attention(
        query_dim=channels,
        cross_attention_dim=_TEXT_SHAPE[1] if is_cross else None,
        heads=channels // _HEAD_DIM,
        dim_head=_HEAD_DIM,
    ).to(device, dtype)
    context_shape = torch.Size(_TEXT_SHAPE) if is_cross else None
    shape = LayerShape(name, torch.Size((num_tokens, channels)), context_shape, [layer])
    return Trial(shape, device, dtype, batch_size)


def _why_not(trial: Trial, kernel: str) -> str | None:
    from train.attention import KernelUnavailableError

    try:
        trial.use(kernel)
    except KernelUnavailableError as error:
        return str(error)
    return None
