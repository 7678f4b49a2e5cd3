"""One text encoder with its tokenizer: captions to token ids, states and pooled states."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from precompute.loading import load_frozen, load_part
from precompute.model_folder import ModelFolder, tokenizer_of
from shards.column import HiddenState
from shards.errors import UserError


class TextStates(NamedTuple):
    """What a text encoder makes of captions.

    Attributes:
        states: [B, T, D] float32; all T positions, as the U-Net attends to them.
        pooled: [B, P] float32 (`text_embeds`); None where the encoder has no projection.
    """

    states: Tensor
    pooled: Tensor | None


class TextEncoder:
    """Tokenizer and text encoder.

    Args:
        model: folder with `tokenizer/` and `text_encoder/`, or with those of `part`.
        device: where it runs.
        dtype: precision that it runs in.
        part: which one, where the model has several: `text_encoder`, `text_encoder_2`.
        hidden_state: which layer's states; None: the one that the folder's pipeline takes.
        tokenizer_only: load no weights; `encode` must not be called then.

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
    ) -> None:
        self._device = device
        self._hidden_state = hidden_state or model.hidden_state
        self._num_tokens = model.text_config(part)["max_position_embeddings"]
        self._tokenizer = _load_tokenizer(model, part)
        self._encoder = None if tokenizer_only else _load_encoder(model, part, dtype).to(device)

    def tokenize(self, captions: list[str]) -> np.ndarray:
        """Padded and truncated token ids, uint16 [B, T]; the pipelines' own settings."""
        ids = self._tokenizer(
            captions, padding="max_length", truncation=True, max_length=self._num_tokens
        ).input_ids
        return np.asarray(ids, dtype=np.uint16)

    @torch.inference_mode()
    def encode(self, input_ids: np.ndarray) -> TextStates:
        """States, and pooled states, of token ids [B, T]."""
        assert self._encoder, "was asked for the tokenizer only"
        ids = torch.from_numpy(input_ids.astype(np.int64)).to(self._device)
        penultimate = self._hidden_state == "penultimate"
        output = self._encoder(ids, output_hidden_states=penultimate)
        states = output.hidden_states[-2] if penultimate else output.last_hidden_state
        pooled = getattr(output, "text_embeds", None)
        return TextStates(states.float(), None if pooled is None else pooled.float())


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
    loader = getattr(transformers, model.text_class(part))
    return load_frozen(model, part, loader, dtype=dtype)
