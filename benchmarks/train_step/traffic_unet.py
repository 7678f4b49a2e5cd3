"""Bytes of a U-Net's forward and backward pass, counted on no device.

What grows with the micro-batch is a sample's; what does not is a step's: reading the weights,
writing their gradients and, under autocast, casting both. So one count at two micro-batches gives
both, exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.train_step.traffic_cuda import CudaFunctions, CudaLayouts
from benchmarks.train_step.traffic_operators import OperatorTraffic, kind_of
from train.step_plan import StepPlan

NUM_TOKENS = 77
_LOW = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a U-Net is computed.

    Args:
        plan: its switches.
        low_weights: bfloat16 weights; else float32 ones under autocast to bfloat16.
    """

    plan: StepPlan
    low_weights: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and inputs."""
        return _LOW if self.low_weights else torch.float32


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A forward and backward pass.

    Args:
        num_bytes: read and written, by kind of operator.
        num_operators: that touch memory.
        saved_bytes: what is kept for the backward pass, weights included.
    """

    num_bytes: Mapping[str, int]
    num_operators: int
    saved_bytes: int


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of a forward and backward pass.

    Args:
        batch: samples of the micro-batch at which operators were counted.
        image_bytes: of each sample, by kind of operator.
        step_bytes: of each pass, whatever its samples, by kind of operator.
        saved_bytes_per_image: what is kept for the backward pass.
        num_operators: that touch memory.
    """

    batch: int
    image_bytes: Mapping[str, int]
    step_bytes: Mapping[str, int]
    saved_bytes_per_image: int
    num_operators: int

    @property
    def bytes_per_image(self) -> int:
        """Of each sample, whatever their number."""
        return sum(self.image_bytes.values())

    @property
    def bytes_per_step(self) -> int:
        """Of each pass, whatever its samples."""
        return sum(self.step_bytes.values())

    @property
    def bytes_per_image_in_batch(self) -> float:
        """Of each sample, with its share of the pass's."""
        return self.bytes_per_image + self.bytes_per_step / self.batch


def count_traffic(
    unet_config: dict[str, Any], latent_size: int, setting: Setting, batch: int
) -> Traffic:
    """Count a forward and backward pass as PyTorch runs it on a GPU; `--compile` is not regarded.

    Args:
        unet_config: diffusers configuration.
        latent_size: h = w.
        setting: how it is computed.
        batch: samples of the micro-batch; at least 2: to a single one more layouts are alike.
    """
    unet = build_unet(unet_config, latent_size, setting)
    return traffic_of(lambda samples: _eager_pass(unet, setting, samples), batch)


def traffic_of(count: Callable[[int], Pass], batch: int) -> Traffic:
    """What a sample takes, and what each pass takes, from passes of two micro-batches.

    Args:
        count: a pass of so many samples.
        batch: of the smaller one.
    """
    assert batch > 1
    small, large = count(batch), count(batch + 1)
    kinds = sorted(small.num_bytes)
    image_bytes = {kind: large.num_bytes[kind] - small.num_bytes[kind] for kind in kinds}
    return Traffic(
        batch=batch,
        image_bytes=image_bytes,
        step_bytes={kind: small.num_bytes[kind] - batch * image_bytes[kind] for kind in kinds},
        saved_bytes_per_image=large.saved_bytes - small.saved_bytes,
        num_operators=small.num_operators,
    )


def build_unet(unet_config: dict[str, Any], latent_size: int, setting: Setting) -> Any:
    """A U-Net without weights, with the modules and in the layout that a setting gives it."""
    from diffusers import UNet2DConditionModel

    from train.blocks import keep_channels_last, use_fused_geglu, use_fused_norms
    from train.projections import batch_projections

    plan = setting.plan
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config({**unet_config, "sample_size": latent_size})
    torch.nn.Module.to(unet, setting.dtype)
    if plan.channels_last:
        unet.to(memory_format=torch.channels_last)
        keep_channels_last(unet)
    if plan.fused_norms:
        use_fused_norms(unet)
    if plan.fused_geglu:
        use_fused_geglu(unet)
    if plan.batched_projections:
        batch_projections(unet)
    return unet


def count_parameters(unet_config: dict[str, Any]) -> int:
    """Parameters of a U-Net."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config)
    return sum(parameter.numel() for parameter in unet.parameters())


def empty_inputs(unet: Any, setting: Setting, batch: int, device: str) -> dict[str, Tensor]:
    """What `loss` takes, with whatever is in the memory; on no device nothing is."""
    config = unet.config
    latent_shape = (batch, config.in_channels, config.sample_size, config.sample_size)
    layout = torch.channels_last if setting.plan.channels_last else torch.contiguous_format
    return {
        "noisy_latents": torch.empty(
            latent_shape, dtype=setting.dtype, device=device, memory_format=layout
        ),
        "timesteps": torch.zeros(batch, dtype=torch.long, device=device),
        "states": torch.empty(
            batch, NUM_TOKENS, config.cross_attention_dim, dtype=setting.dtype, device=device
        ),
        "target": torch.empty(latent_shape, device=device),
    }


def loss(
    unet: Any, noisy_latents: Tensor, timesteps: Tensor, states: Tensor, target: Tensor
) -> Tensor:
    """The mean squared error of a prediction."""
    prediction = unet(noisy_latents, timesteps, states, return_dict=False)[0]
    return F.mse_loss(prediction.float(), target)


def _eager_pass(unet: Any, setting: Setting, batch: int) -> Pass:
    inputs = empty_inputs(unet, setting, batch, "meta")
    saved: dict[int, Any] = {}  # storages, each once, held so that none takes another's place

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    unet.zero_grad(set_to_none=True)
    with ExitStack() as held:
        counter = held.enter_context(OperatorTraffic())
        held.enter_context(CudaLayouts())
        held.enter_context(torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor))
        with CudaFunctions(autocast=None if setting.low_weights else _LOW):
            mean = loss(unet, **inputs)
        mean.backward()
    num_bytes: Counter[str] = Counter()
    for name, amount in counter.num_bytes.items():
        num_bytes[kind_of(name)] += amount
    return Pass(
        num_bytes=num_bytes,
        num_operators=counter.num_calls.total(),
        saved_bytes=sum(storage.nbytes() for storage in saved.values()),
    )
