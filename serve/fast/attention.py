"""Which kernel each attention of the U-Net runs, measured without a backward pass."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from serve.fast.plan import FastPlan
from shards.errors import UserError
from train.attention import (
    KernelUnavailableError,
    Trial,
    describe,
    find_layers,
    milliseconds_on_gpu,
    pin_fastest,
    use,
)
from train.attention_processors import PinnedProcessor

_CANDIDATES = ("flash", "cudnn", "efficient", "xformers")
# What a kernel that was pinned gives way to, where it cannot run a size that comes later.
_OTHERS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def choose_attention(
    unet: Any,
    plan: FastPlan,
    device: torch.device,
    latent_shape: tuple[int, int, int],
    num_tokens: int,
) -> list[str]:
    """Give a U-Net's attention layers their kernels.

    Args:
        unet: diffusers U-Net on `device`, with the modules that it will have.
        plan: what is on.
        device: where it runs.
        latent_shape: [C, h, w] at which kernels are measured or tried.
        num_tokens: of the text states.

    Returns:
        the line about it; none where nothing was asked for.

    Raises:
        UserError: the kernel that was asked for does not run here.
    """
    if plan.attention is None:
        return []
    rows = 2 * plan.shapes[0].batch  # guided
    layers = find_layers(unet, latent_shape, num_tokens)
    trials: list[Trial] = [ForwardTrial(layer, device, plan.dtype, rows) for layer in layers]
    on_gpu = device.type == "cuda"
    with (
        torch.random.fork_rng(devices=[device] if on_gpu else []),
        torch.cuda.device(device) if on_gpu else nullcontext(),
    ):
        if plan.attention == "auto":
            ran = pin_fastest(trials, _CANDIDATES, milliseconds_on_gpu)
        else:
            ran = _use(trials, plan.attention)
    _prefer_pinned(unet)
    return [f"attention {describe(ran)}"]


def _use(trials: list[Trial], kernel: str) -> dict[str, str]:
    try:
        return use(trials, kernel)
    except KernelUnavailableError as error:
        raise UserError(
            "--fast.attention", f"{kernel} does not run here: {error}", remedy="auto"
        ) from None


class ForwardTrial(Trial):
    """Runs a layer as inference does."""

    def __call__(self) -> None:
        """Forward alone."""
        layer = self.layers[0]
        dtype = next(layer.parameters()).dtype
        hidden_states = self._random(self._shape.hidden_shape, dtype)
        context, _ = self._context(dtype)
        with torch.no_grad():
            layer(hidden_states, encoder_hidden_states=context)


class PreferringProcessor:
    """A processor that calls torch's attention with one kernel where it can run, else another.

    Args:
        processor: diffusers' `AttnProcessor2_0` or ours.
        backend: the kernel to prefer.
    """

    def __init__(self, processor: Any, backend: SDPBackend) -> None:
        self.processor = processor
        self.backends = [backend, *(other for other in _OTHERS if other != backend)]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """As the processor inside."""
        with sdpa_kernel(self.backends, set_priority=True):
            output: Tensor = self.processor(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb
            )
        return output


def _prefer_pinned(unet: Any) -> None:
    from diffusers.models.attention_processor import Attention

    for layer in unet.modules():
        if isinstance(layer, Attention) and isinstance(layer.processor, PinnedProcessor):
            pinned = layer.processor
            if pinned.backend == SDPBackend.MATH:  # it runs any size; on a CPU it comes last
                continue
            layer.set_processor(PreferringProcessor(pinned.processor, pinned.backend))
