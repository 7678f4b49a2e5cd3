"""One text encoder with its tokenizer: captions to token ids, states and pooled states."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from precompute.compilation import compile_encode, filled_up
from precompute.loading import load_frozen, load_part
from precompute.model_folder import ModelFolder, tokenizer_of
from shards.column import HiddenState
from shards.errors import UserError

_CAUSAL = "latentmill_causal"  # our attention, as the library knows it


class TextStates(NamedTuple):
    """What a text encoder makes of captions.

    Attributes:
        states: [B, T, D] float32; all T positions, as the U-Net attends to them.
        pooled: [B, P] float32 (`text_embeds`); None where the encoder has no projection.
    """

    states: Tensor
    pooled: Tensor | None


def encode_ids(encoder: Any, input_ids: Tensor, hidden_state: HiddenState) -> TextStates:
    """States of token ids [B, T] on the encoder's device."""
    is_last = hidden_state == "last"
    output = encoder(input_ids, output_hidden_states=not is_last)
    states = output.last_hidden_state if is_last else output.hidden_states[-2]
    pooled = getattr(output, "text_embeds", None)
    return TextStates(states.float(), None if pooled is None else pooled.float())


class TextEncoder:
    """Tokenizer and text encoder.

    Args:
        model: folder with `tokenizer/` and `text_encoder/`, or with those of `part`.
        device: where it runs.
        dtype: precision that it runs in.
        part: which one, where the model has several: `text_encoder`, `text_encoder_2`.
        hidden_state: which layer's states; None: the one that the folder's pipeline takes.
        tokenizer_only: load no weights; `encode` must not be called then.
        compiled_batch_size: compile it for batches of this size, fill up smaller ones and split
            larger ones; None runs it as it is, on batches of any size.

    Raises:
        UserError: it cannot be loaded, lacks weights, or its tokenizer is another model's.
    """

    def __init__(
        self,
        model: ModelFolder,
        device: torch.device,
        dtype: torch.dtype,
        part: str = "text_encoder",
        *,
        hidden_state: HiddenState | None = None,
        tokenizer_only: bool = False,
        compiled_batch_size: int | None = None,
    ) -> None:
        self._device = device
        self._compiled_batch_size = compiled_batch_size
        self._hidden_state: HiddenState = hidden_state or model.hidden_state
        self._num_tokens = model.text_config(part)["max_position_embeddings"]
        self._tokenizer = _load_tokenizer(model, part)
        self._encoder = None if tokenizer_only else _load_encoder(model, part, dtype).to(device)
        self._encode_ids = encode_ids
        if self._encoder and compiled_batch_size:
            self._run_once()
            self._encode_ids = compile_encode(encode_ids)

    def tokenize(self, captions: list[str]) -> np.ndarray:
        """Padded and truncated token ids, uint16 [B, T]; the pipelines' own settings."""
        ids = self._tokenizer(
            captions, padding="max_length", truncation=True, max_length=self._num_tokens
        ).input_ids
        return np.asarray(ids, dtype=np.uint16)

    @torch.inference_mode()
    def encode(self, input_ids: np.ndarray) -> TextStates:
        """States, and pooled states, of token ids [B, T]; does not wait for a GPU."""
        size = self._compiled_batch_size or len(input_ids)
        starts = range(0, len(input_ids), size)
        parts = [self._encode_batch(input_ids[start : start + size], size) for start in starts]
        if len(parts) == 1:
            return parts[0]
        states, pooled = zip(*parts, strict=True)
        return TextStates(torch.cat(states), None if pooled[0] is None else torch.cat(pooled))

    @torch.inference_mode()
    def _run_once(self) -> None:
        """The library then puts its hooks in, under a lock, at which a graph would break."""
        ids = torch.zeros((1, self._num_tokens), dtype=torch.int64, device=self._device)
        encode_ids(self._encoder, ids, self._hidden_state)

    def _encode_batch(self, input_ids: np.ndarray, size: int) -> TextStates:
        """States of up to `size` captions, encoded as `size` of them."""
        assert self._encoder, "was asked for the tokenizer only"
        # Of pinned memory, and so without waiting for what the device has yet to do.
        on_gpu, shape = self._device.type == "cuda", (size, input_ids.shape[1])
        here = torch.empty(shape, dtype=torch.int64, pin_memory=on_gpu)
        filled_up(torch.from_numpy(input_ids.astype(np.int64)), like=here)
        ids = here.to(self._device, non_blocking=True)
        states, pooled = self._encode_ids(self._encoder, ids, self._hidden_state)
        num = len(input_ids)
        return TextStates(states[:num], None if pooled is None else pooled[:num])


def _load_tokenizer(model: ModelFolder, part: str) -> Any:
    from transformers import CLIPTokenizer

    tokenizer = load_part(model, tokenizer_of(part), CLIPTokenizer)
    vocab_size = model.text_config(part)["vocab_size"]
    if len(tokenizer) > min(vocab_size, 2**16):
        raise UserError(
            model.path / tokenizer_of(part),
            f"{len(tokenizer)} tokens",
            wanted=f"at most {vocab_size}, the text encoder's, and 65536: ids have 16 bits",
        )
    return tokenizer


def _load_encoder(model: ModelFolder, part: str, dtype: torch.dtype) -> Any:
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()  # loading takes a moment; the job has a bar of its own
    transformers.AttentionInterface.register(_CAUSAL, _causal_attention)
    loader = getattr(transformers, model.text_class(part))
    return load_frozen(model, part, loader, dtype=dtype, attn_implementation=_CAUSAL)


def _causal_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any
) -> tuple[Tensor, None]:
    """Attention as CLIP's text encoders have it: causal, and padding counts as any other token.

    So no mask is needed, and the flash kernels take none. The library's own function leaves it
    out as well, but with some releases of torch not in a graph; under a name that is not its own,
    none is made.

    Args:
        module: not needed.
        query: [B, heads, T, head_dim]; keys and values likewise.
        key: see above.
        value: see above.
        scaling: of the products.

    Returns:
        [B, T, heads, head_dim], and no attention weights.
    """
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling
    )
    return attended.transpose(1, 2).contiguous(), None
