"""Latents from the shards, text states from an encoder that runs along: the least bytes a sample.

For datasets that store token ids alone: 154 bytes a caption, where states take 158 kB.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from precompute.compilation import even_batch_size
from precompute.model_folder import find_model
from precompute.text_encoder import TextEncoder
from precompute.text_rows import TEXT_BATCH_SIZE
from shards.batch import LatentBatch
from shards.column import TextColumn
from shards.dataset import Column
from shards.errors import DatasetError
from shards.follow import FollowingReader
from shards.reader import LatentReader


class EncodedText:
    """A `BatchSource` over a reader whose text column has token ids alone.

    Args:
        reader: of the dataset.
        text: its text column; names the model.
        device: where the text encoder runs.
        model: diffusers model folder or hub id; default: the one that the dataset was made with.
        compiled_share: compile the encoder, for a process that takes so many samples a step; None
            runs it as it is.

    Raises:
        UserError: the encoder cannot be loaded, or not be compiled.
        DatasetError: it is another text encoder than the one that the dataset was made for.
    """

    def __init__(
        self,
        reader: LatentReader | FollowingReader,
        text: Column[TextColumn],
        *,
        device: torch.device,
        model: str = "",
        compiled_share: int | None = None,
    ) -> None:
        folder = find_model(model or text.model)
        part = text.spec.part
        if folder.weights_sha256(part) != text.spec.weights_sha256:
            raise DatasetError(
                folder.path / part,
                "is another text encoder",
                wanted=f"the one of {text.model}, which {text.column_id} was made for",
                remedy="--model <its folder or hub id>, or precompute with this one",
            )
        on_gpu = device.type == "cuda"
        dtype = getattr(torch, text.spec.compute_dtype) if on_gpu else torch.float32
        size = even_batch_size(compiled_share, TEXT_BATCH_SIZE) if compiled_share else None
        self._encoder = TextEncoder(
            folder,
            device,
            dtype,
            part,
            hidden_state=text.spec.hidden_state,
            compiled_batch_size=size,
        )
        self._reader = reader
        self.latent_shape = reader.latent_shape
        self.scaling_factor = reader.scaling_factor
        self.null_states: np.ndarray = self._encode(reader.null_input_ids[None])[0].cpu().numpy()
        self.identity = f"encoded-{reader.identity}"

    def epoch_at(self, step: int) -> float:
        """Epochs completed when `step` steps are done."""
        return self._reader.epoch_at(step)

    def keys_of(self, samples: np.ndarray) -> list[str]:
        """`<shard>/<key>` of samples given by their numbers."""
        return self._reader.keys_of(samples)

    @property
    def num_held_out(self) -> int:
        """Samples that `iter_held_out` has."""
        return self._reader.num_held_out

    def iter_held_out(self, first: int, last: int, batch_size: int) -> Iterator[LatentBatch]:
        """The reader's held-out samples, likewise."""
        yield from self._encoded(self._reader.iter_held_out(first, last, batch_size))

    def iter_batches(self, first_step: int, positions: range) -> Iterator[LatentBatch]:
        """The reader's batches with states in place of token ids."""
        yield from self._encoded(self._reader.iter_batches(first_step, positions))

    def _encoded(self, batches: Iterator[LatentBatch]) -> Iterator[LatentBatch]:
        for batch in batches:
            assert batch.input_ids is not None
            yield replace(batch, states=self._encode(batch.input_ids), input_ids=None)

    def _encode(self, input_ids: np.ndarray) -> torch.Tensor:
        """States [B, T, D] float16, as a dataset would have them."""
        return self._encoder.encode(input_ids).states.half()
