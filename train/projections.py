"""One matrix product in the place of many: the U-Net's projections of the same input, batched.

Queries, keys and values of a self-attention; keys and values of all cross-attentions, which all
read the same text states; the time embedding's projections of all residual blocks. The products of
Stable Diffusion's U-Net fall by 84 in the forward pass. The many weights become rows of a few, and
`Part` says which, so that masters, optimizer and checkpoints keep diffusers' names.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.attention_processors import BatchedProcessor


@dataclass(frozen=True)
class Part:
    """Where one of diffusers' parameters is now: `stop - start` rows of another.

    Args:
        parameter: its name in the U-Net.
        start: first row, along dimension 0.
        stop: the row after the last.
        position: of the original in diffusers' order of parameters.
    """

    parameter: str
    start: int
    stop: int
    position: int


def batch_projections(unet: Any) -> dict[str, Part]:
    """Batch what a U-Net projects from the same input, in place; it computes the same.

    What is not plain is left as it is: layers with norms of their own queries, keys or text states,
    with added keys, residuals or processors that somebody chose; cross-attention where anything
    else may read the text states; time embeddings that anything else is added to or reads. Masks
    are not supported afterwards.

    Args:
        unet: diffusers `UNet2DConditionModel`, not sharded, before `apply_attention`.

    Returns:
        the place of each parameter that no longer is one, by diffusers' name, in its order.
    """
    originals = {parameter: name for name, parameter in unet.named_parameters()}
    batches = [*_batch_self_attention(unet), *_batch_cross_attention(unet), *_batch_time(unet)]
    names = {parameter: name for name, parameter in unet.named_parameters()}
    positions = {name: position for position, name in enumerate(originals.values())}
    parts: dict[str, Part] = {}
    for linears, batched in batches:
        stops = itertools.accumulate(batched.widths)
        for linear, width, stop in zip(linears, batched.widths, stops, strict=True):
            for kind, original in linear.named_parameters():
                name, parameter = originals[original], names[getattr(batched, kind)]
                parts[name] = Part(parameter, stop - width, stop, positions[name])
    return dict(sorted(parts.items(), key=lambda item: item[1].position))


def original_parameters(unet: nn.Module, parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """A U-Net's weights by diffusers' names, in its order: views, detached.

    Args:
        unet: after `batch_projections`, which returned `parts`; any module where there are none.
        parts: what became of the parameters that are no longer there, in their order.
    """
    batched = {part.parameter for part in parts.values()}
    tensors = {name: parameter.detach() for name, parameter in unet.named_parameters()}
    originals = [item for item in tensors.items() if item[0] not in batched]
    for name, part in parts.items():
        originals.insert(part.position, (name, tensors[part.parameter][part.start : part.stop]))
    return dict(originals)


# Modules ------------------------------------------------------------------------------------------


class SplitLinear(nn.Linear):
    """Linear layers of one input as one; the output is cut into theirs.

    It is cut at once, so that the backward pass puts the gradient together in one go. Slices taken
    one by one would each have a gradient as large as the whole, zero all around.

    Args:
        linears: of equal input width, all with a bias or none.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        widths = [linear.out_features for linear in linears]
        has_bias = linears[0].bias is not None
        super().__init__(linears[0].in_features, sum(widths), bias=has_bias, device="meta")
        self.widths = widths
        self.weight = _stack([linear.weight for linear in linears])
        if has_bias:
            self.bias = _stack([linear.bias for linear in linears])

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # noqa: A002
        """[..., in_features] to one [..., width] of each, which are views."""
        return super().forward(input).split(self.widths, dim=-1)


class Pick(nn.Module):
    """In the place of a projection: its output out of those computed at once.

    Args:
        index: among all outputs.
    """

    def __init__(self, index: int | slice) -> None:
        super().__init__()
        self.index = index

    def forward(self, outputs: tuple[Tensor, ...]) -> Any:
        """The output, or a tuple of them where the index is a slice."""
        return outputs[self.index]


def _stack(parameters: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.cat([parameter.detach() for parameter in parameters]))


# Batching -----------------------------------------------------------------------------------------

Batch = tuple[list[nn.Linear], SplitLinear]


def _batch_self_attention(unet: nn.Module) -> Iterator[Batch]:
    """Each layer's own queries, keys and values: `to_qkv`."""
    for block in _transformer_blocks(unet):
        layer = block.attn1
        if not _is_plain(layer, is_cross=False):
            continue
        linears = [layer.to_q, layer.to_k, layer.to_v]
        layer.to_qkv = SplitLinear(linears)
        del layer.to_q, layer.to_k, layer.to_v
        layer.set_processor(BatchedProcessor())
        yield linears, layer.to_qkv


def _batch_cross_attention(unet: Any) -> Iterator[Batch]:
    """All layers' keys and values: `unet.to_all_kv`, once per forward pass.

    Its outputs take the place of the text states, which diffusers hands on untouched.
    """
    layers = [block.attn2 for block in _transformer_blocks(unet)]
    if not layers or not _only_layers_read_states(unet):
        return
    linears = [linear for layer in layers for linear in (layer.to_k, layer.to_v)]
    if not _are_alike(linears):
        return
    unet.to_all_kv = SplitLinear(linears)
    for number, layer in enumerate(layers):
        layer.to_kv = Pick(slice(2 * number, 2 * number + 2))
        del layer.to_k, layer.to_v
        layer.set_processor(BatchedProcessor())
    unet.register_forward_pre_hook(_project_states, with_kwargs=True)
    yield linears, unet.to_all_kv


def _batch_time(unet: Any) -> Iterator[Batch]:
    """All residual blocks' projections: `unet.time_embedding.to_all_blocks`, once per forward pass.

    Its outputs take the place of the embedding, which diffusers hands on untouched.
    """
    from diffusers.models.resnet import ResnetBlock2D

    blocks = [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]
    linears: list[nn.Linear] = [block.time_emb_proj for block in blocks]
    if not _only_blocks_read_time(unet, blocks) or not _are_alike(linears):
        return
    unet.time_embedding.to_all_blocks = SplitLinear(linears)
    for number, block in enumerate(blocks):
        block.time_emb_proj = Pick(number)
        block.skip_time_act = True
    unet.time_embedding.register_forward_hook(_project_embedding)
    yield linears, unet.time_embedding.to_all_blocks


# Hooks hold no module of their own, so that a copy of a U-Net computes with its own weights.


def _project_states(
    unet: Any, args: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the U-Net's forward pass; the text states are its third argument."""
    name = "encoder_hidden_states"
    if name in keywords:
        return args, {**keywords, name: unet.to_all_kv(keywords[name])}
    return (*args[:2], unet.to_all_kv(args[2]), *args[3:]), keywords


def _project_embedding(
    time_embedding: Any, args: tuple[Any, ...], embedding: Tensor
) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = time_embedding.to_all_blocks(F.silu(embedding))
    return outputs


# What is plain ------------------------------------------------------------------------------------


def _transformer_blocks(unet: nn.Module) -> list[Any]:
    from diffusers.models.attention import BasicTransformerBlock

    return [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]


def _is_plain(layer: Any, *, is_cross: bool) -> bool:
    """Whether a layer is projections, the kernel and the output alone."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    extras = ("norm_q", "norm_k", "norm_cross", "group_norm", "spatial_norm", "added_kv_proj_dim")
    return (
        layer.is_cross_attention == is_cross
        and type(layer.processor) is AttnProcessor2_0
        and all(getattr(layer, extra) is None for extra in extras)
        and not layer.residual_connection
        and layer.rescale_output_factor == 1
        and layer.inner_kv_dim == layer.inner_dim
        and _are_alike([layer.to_k, layer.to_v, *([] if is_cross else [layer.to_q])])
    )


def _are_alike(linears: Sequence[Any]) -> bool:
    """Whether linear layers can be one, and none is more than a linear layer."""
    if not all(type(linear) is nn.Linear for linear in linears):
        return False
    return len({(linear.in_features, linear.bias is None) for linear in linears}) == 1


def _only_layers_read_states(unet: Any) -> bool:
    """Whether text states reach plain cross-attention layers alone."""
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    if unet.encoder_hid_proj is not None or unet.config.addition_embed_type is not None:
        return False
    models = [model for block in _parts_of(unet) for model in getattr(block, "attentions", ())]
    return (
        _has_plain_parts(unet)
        and all(isinstance(model, Transformer2DModel) for model in models)
        and all(
            not block.only_cross_attention and _is_plain(block.attn2, is_cross=True)
            for block in _transformer_blocks(unet)
        )
    )


def _only_blocks_read_time(unet: Any, blocks: Sequence[Any]) -> bool:
    """Whether the time embedding reaches plain residual blocks alone."""
    return (
        _has_plain_parts(unet)
        and unet.class_embedding is None
        and unet.config.addition_embed_type is None
        and unet.time_embed_act is None
        and all(
            block.time_embedding_norm == "default"
            and type(block.nonlinearity) is nn.SiLU
            and not block.skip_time_act
            for block in blocks
        )
    )


def _has_plain_parts(unet: Any) -> bool:
    """Whether the U-Net is made of Stable Diffusion's blocks, whose every reader is known."""
    from diffusers.models.unets import unet_2d_blocks as known

    plain = (
        *(known.DownBlock2D, known.CrossAttnDownBlock2D, known.UNetMidBlock2DCrossAttn),
        *(known.UpBlock2D, known.CrossAttnUpBlock2D),
    )
    return all(type(part) in plain for part in _parts_of(unet))


def _parts_of(unet: Any) -> list[Any]:
    middle = [] if unet.mid_block is None else [unet.mid_block]
    return [*unet.down_blocks, *middle, *unet.up_blocks]
