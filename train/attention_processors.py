"""What a layer of the U-Net runs: its projections, one kernel, its output.

Layers that are as diffusers built them run diffusers' processors. Those whose projections are
batched (`train.projections`) run ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def build_processor(kernel: str, layer: Any) -> Any:
    """The processor that runs a kernel.

    Args:
        kernel: `sdpa` leaves the choice to torch, `xformers`, or one of `BACKENDS`.
        layer: diffusers `Attention`, as it was built or batched.

    Raises:
        ImportError: the kernel's package is not here.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor

    if kernel == "xformers":
        import xformers.ops  # noqa: F401 - diffusers imports it too, but not if it is missing

        return BatchedProcessor(attend_xformers) if is_batched(layer) else XFormersAttnProcessor()
    processor = BatchedProcessor() if is_batched(layer) else AttnProcessor2_0()
    return processor if kernel == "sdpa" else PinnedProcessor(processor, BACKENDS[kernel])


def is_batched(layer: Any) -> bool:
    """Whether a layer's keys and values come out of a product with others."""
    return not hasattr(layer, "to_k")


class PinnedProcessor:
    """A processor that calls torch's attention, with one kernel allowed for the call.

    Which kernels torch may use is a state of the process; it is set around the call alone, also
    inside a compiled graph.

    Args:
        processor: diffusers' `AttnProcessor2_0` or ours.
        backend: the kernel; a call that it cannot run raises RuntimeError.
    """

    def __init__(self, processor: Any, backend: SDPBackend) -> None:
        self.processor, self.backend = processor, backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """As the processor inside."""
        with sdpa_kernel(self.backend):
            output: Tensor = self.processor(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb
            )
        return output


def attend_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The attention of torch; [B, tokens, heads, head_dim] each, and the output like the query."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def attend_xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The attention of xFormers, which takes these shapes as they are."""
    import xformers.ops

    output: Tensor = xformers.ops.memory_efficient_attention(query, key, value)
    return output


class BatchedProcessor:
    """The plain attention of a layer whose projections are batched.

    Queries, keys and values go to the kernel as views of the products, without a copy.

    Args:
        attend: the kernel.
    """

    def __init__(self, attend: Attend = attend_sdpa) -> None:
        self.attend = attend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: tuple[Tensor, ...] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """As diffusers' `AttnProcessor2_0`, without masks.

        Args:
            attn: diffusers `Attention` with `to_qkv`, or with `to_q` and `to_kv`.
            hidden_states: [B, tokens, channels].
            encoder_hidden_states: all cross-attention layers' keys and values, [B, T, C] each.
            attention_mask: none.
            temb: diffusers' layers of other kinds read it.

        Returns:
            [B, tokens, channels].
        """
        assert attention_mask is None, "batched projections are for training, which masks nothing"
        if encoder_hidden_states is None:
            query, key, value = attn.to_qkv(hidden_states)
        else:
            query, (key, value) = attn.to_q(hidden_states), attn.to_kv(encoder_hidden_states)
        heads = (tensor.unflatten(-1, (attn.heads, -1)) for tensor in (query, key, value))
        linear, dropout = attn.to_out
        output: Tensor = dropout(linear(self.attend(*heads).flatten(2)))
        return output
