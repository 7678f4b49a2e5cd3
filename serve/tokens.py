"""What a tokenizer's limit cuts from a prompt."""

from __future__ import annotations

from typing import Any

_SHOWN_CHARS = 80


def max_tokens_of(pipeline: Any) -> int:
    """Tokens that a prompt may have, start and end included."""
    positions: int = pipeline.text_encoder.config.max_position_embeddings
    return min(int(pipeline.tokenizer.model_max_length), positions)


def cut_warning(pipeline: Any, name: str, text: str) -> str:
    """Say which words of a text the model does not see; empty: it sees all of it.

    Args:
        pipeline: has a tokenizer, which puts a token before the text and one behind it.
        name: of the text, for the message.
        text: a prompt.
    """
    tokenizer, limit = pipeline.tokenizer, max_tokens_of(pipeline)
    input_ids = tokenizer(text, truncation=False).input_ids
    if len(input_ids) <= limit:
        return ""
    cut = " ".join(tokenizer.decode(input_ids[limit - 1 : -1]).split())
    shown = cut if len(cut) <= _SHOWN_CHARS else f"{cut[:_SHOWN_CHARS]}…"
    return f"{name} has {len(input_ids)} tokens, {limit} are used; not seen: {shown!r}"
