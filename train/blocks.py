"""diffusers' U-Net blocks with a forward pass of ours: channels-last throughout, fused kernels.

Each function here gives modules of a U-Net another class and nothing else: parameters, names and
hooks stay the very same. They may be called in any order, before or after
`train.norms.use_low_precision_norms`, which keeps the layer norms where both are used: a fused norm
computes in float32 and reads and writes the dtype of its input, autocast or not.

This module imports diffusers: import it where a U-Net is at hand.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from train.fused.geglu import geglu
from train.fused.group_norm import group_norm
from train.norms import LowPrecisionGroupNorm


class FusedGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` in one operator with a shift before it and, where `silu` says so, SiLU after.

    The result is channels-last and has the input's dtype.
    """

    silu: bool

    def forward(self, input: Tensor, shift: Tensor | None = None) -> Tensor:  # noqa: A002 - torch's
        """[B, C, H, W] and a shift [B, C] of its channels to [B, C, H, W]."""
        return group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps, shift=shift, silu=self.silu
        )


class PlainResnetBlock(ResnetBlock2D):
    """A residual block that shifts its channels by the time embedding, and changes no size.

    diffusers' block copies the input of a shortcut to NCHW in training.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        """[B, C, H, W] and the time embedding [B, E] to [B, C', H, W]."""
        hidden_states = self.conv1(self._activate(self.norm1, input_tensor))
        shift = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        hidden_states = self.dropout(self._activate(self.norm2, hidden_states, shift))
        hidden_states = self.conv2(hidden_states)
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        output: Tensor = input_tensor + hidden_states
        return output if self.output_scale_factor == 1 else output / self.output_scale_factor

    def _activate(self, norm: nn.Module, hidden_states: Tensor, shift: Tensor | None = None) -> Any:
        if isinstance(norm, FusedGroupNorm):
            return norm(hidden_states, shift)
        if shift is not None:
            hidden_states = hidden_states + shift[:, :, None, None]
        return self.nonlinearity(norm(hidden_states))


class ChannelsLastUpsample(Upsample2D):
    """Twice the size by nearest neighbours, then a convolution; NHWC at any batch size.

    diffusers goes through NCHW from a batch of 64 on, because torch's NHWC kernel fails on large
    tensors. A broadcast copy has no such limit. Other sizes are left to diffusers.
    """

    def forward(self, hidden_states: Tensor, output_size: Any = None) -> Tensor:
        """[B, C, H, W] to [B, C', 2H, 2W], or to the size asked for."""
        batch, channels, height, width = hidden_states.shape
        if output_size is not None and tuple(output_size) != (2 * height, 2 * width):
            resized: Tensor = super().forward(hidden_states, output_size)
            return resized
        pixels = hidden_states.permute(0, 2, 3, 1)[:, :, None, :, None]
        pixels = pixels.expand(batch, height, 2, width, 2, channels)
        pixels = pixels.reshape(batch, 2 * height, 2 * width, channels)
        upsampled: Tensor = self.conv(pixels.permute(0, 3, 1, 2))
        return upsampled


class ChannelsLastTransformer(Transformer2DModel):
    """A transformer over pixels, whose result stays channels-last; diffusers copies it to NCHW."""

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> Tensor:
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        hidden_states = hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        if not self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        return hidden_states + residual


class FusedGEGLU(GEGLU):
    """A gated linear unit whose gate is one operator, forward and backward."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., C] to [..., I]."""
        return geglu(self.proj(hidden_states))


# Into a U-Net -------------------------------------------------------------------------------------


def keep_channels_last(unet: Any) -> int:
    """Take out what makes NCHW copies of activations, in place.

    Args:
        unet: diffusers U-Net with channels-last weights.

    Returns:
        how many modules keep the layout where diffusers' would not.
    """
    kinds = (
        (PlainResnetBlock, _is_plain_block),
        (ChannelsLastUpsample, _is_plain_upsample),
        (ChannelsLastTransformer, _is_over_pixels),
    )
    num_modules = 0
    for module in unet.modules():
        for kind, fits in kinds:
            if fits(module):
                # Its class alone is another one: optimizers and hooks hold on to what they know.
                module.__class__ = kind
                num_modules += 1
    return num_modules


def use_fused_norms(unet: Any) -> int:
    """Let a U-Net's group norms run as one operator with what surrounds them, in place.

    Those of residual blocks with time embedding and SiLU, those before SiLU and the last
    convolution, and those of the transformers; others stay as they are.

    Returns:
        how many norms were changed.
    """
    num_changed = 0
    for module in unet.modules():
        if _is_plain_block(module):
            module.__class__ = PlainResnetBlock
            num_changed += _fuse(module.norm1, silu=True) + _fuse(module.norm2, silu=True)
        elif _is_over_pixels(module):
            num_changed += _fuse(module.norm, silu=False)
    if type(getattr(unet, "conv_act", None)) is nn.SiLU and _fuse(unet.conv_norm_out, silu=True):
        unet.conv_act.__class__ = nn.Identity
        num_changed += 1
    return num_changed


def use_fused_geglu(unet: Any) -> int:
    """Let the gates of a U-Net's feed-forward layers run as one operator, in place.

    Returns:
        how many layers were changed.
    """
    layers = [module for module in unet.modules() if type(module) is GEGLU]
    for layer in layers:
        layer.__class__ = FusedGEGLU
    return len(layers)


def _fuse(norm: Any, *, silu: bool) -> bool:
    if type(norm) not in (nn.GroupNorm, LowPrecisionGroupNorm) or not norm.affine:
        return False
    norm.__class__, norm.silu = FusedGroupNorm, silu
    return True


def _is_plain_block(module: Any) -> bool:
    return (
        type(module) in (ResnetBlock2D, PlainResnetBlock)
        and module.time_embedding_norm == "default"
        and module.time_emb_proj is not None
        and type(module.nonlinearity) is nn.SiLU
        and module.upsample is None
        and module.downsample is None
    )


def _is_plain_upsample(module: Any) -> bool:
    return (
        type(module) in (Upsample2D, ChannelsLastUpsample)
        and module.norm is None
        and module.interpolate
        and module.use_conv
        and not module.use_conv_transpose
        and module.name == "conv"
    )


def _is_over_pixels(module: Any) -> bool:
    kinds = (Transformer2DModel, ChannelsLastTransformer)
    return type(module) in kinds and module.is_input_continuous
