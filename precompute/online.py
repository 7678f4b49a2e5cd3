"""The online arm: the same batches as the reader of latent shards, encoded while training waits.

What most trainers do in every step (read, decode, VAE, text encoder), with the encoders of stage
1. It takes the same samples in the same order, so the two arms differ by what they cost alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

from precompute.image_encoder import ImageEncoder, to_pixel_values
from precompute.model_folder import find_model
from precompute.pixels import quieten_decoder
from precompute.text_encoder import TextEncoder
from precompute.transform import cut_crop
from shards.batch import LatentBatch
from shards.column import ImageColumn, TextColumn
from shards.dataset import Column
from shards.image_index import ShardIndex
from shards.prefetch import prefetch
from shards.reader import LatentReader
from shards.receipt import read_receipt, receipt_path

_PREFETCH_DEPTH = 4


class OnlineBatches:
    """A `BatchSource` that encodes on the way.

    Args:
        reader: the reader of latent shards whose samples and order to follow.
        image: its image column; names source shards, model and transform.
        text: its text column.
        device: where the encoders run.
        dtype: precision of the encoders.
        num_workers: threads that read and decode.
        caption_field: the dataset's, see `ShardIndex`.
    """

    def __init__(
        self,
        reader: LatentReader,
        image: Column[ImageColumn],
        text: Column[TextColumn],
        *,
        device: torch.device,
        dtype: torch.dtype,
        num_workers: int,
        caption_field: str = "",
    ) -> None:
        quieten_decoder()
        model = find_model(image.model)
        self._reader, self._image, self._device = reader, image, device
        self._image_encoder = ImageEncoder(model, device, dtype)
        self._text_encoder = TextEncoder(
            model, device, dtype, text.spec.part, hidden_state=text.spec.hidden_state
        )
        self._num_workers = num_workers
        self._shards = sorted(image.shards)
        self._caption_field = caption_field
        self._open_shard = lru_cache(maxsize=256)(self._index_shard)
        self.latent_shape = reader.latent_shape
        self.scaling_factor = reader.scaling_factor
        self.null_states = reader.null_states
        self.identity = f"online-{reader.identity}"

    def epoch_at(self, step: int) -> float:
        """Epochs completed when `step` steps are done."""
        return self._reader.epoch_at(step)

    def iter_batches(self, first_step: int, positions: range) -> Iterator[LatentBatch]:
        """Batches of `first_step` and all that follow: decoded ahead, encoded when asked for."""
        for step, samples, squares, captions in prefetch(
            self._decode_all(first_step, positions), _PREFETCH_DEPTH
        ):
            moments, _ = self._image_encoder.encode(to_pixel_values(squares, self._device))
            states = self._text_encoder.encode(self._text_encoder.tokenize(captions)).states
            yield LatentBatch(
                step=step, samples=samples, moments=moments.half(), states=states.half()
            )

    def _decode_all(
        self, first_step: int, positions: range
    ) -> Iterator[tuple[int, np.ndarray, tuple[np.ndarray, ...], list[str]]]:
        step = first_step
        with ThreadPoolExecutor(self._num_workers, thread_name_prefix="decode") as pool:
            while True:
                shards, rows = self._reader.order.locate(step, positions)
                places = list(zip(shards.tolist(), rows.tolist(), strict=True))
                squares, captions = zip(*pool.map(self._read_and_decode, places), strict=True)
                samples = self._reader.sample_numbers(shards, rows)
                yield step, samples, squares, list(captions)
                step += 1

    def _read_and_decode(self, place: tuple[int, int]) -> tuple[np.ndarray, str]:
        index, row_of = self._open_shard(place[0])
        sample = index.read(int(row_of[place[1]]))
        assert sample.image is not None
        assert sample.caption is not None
        square = cut_crop(sample.image, self._image.spec)
        assert square is not None
        return square, sample.caption

    def _index_shard(self, shard: int) -> tuple[ShardIndex, np.ndarray]:
        """Index of the source shard, and the ledger row of each row of the image column."""
        name = self._shards[shard]
        source = read_receipt(receipt_path(self._image.path_of(name))).source["url"]
        return ShardIndex(source, self._caption_field), np.array(self._image.map_shard(name)["row"])
