"""Online training: the batches that a reader of latent shards yields, encoded while it trains.

What most trainers do in every step (read, decode, VAE, text encoder), with the encoders of stage
1. Samples and order are those of the latents that stage 1 would make, so online and offline
training differ by their cost, and by the rounding of what is stored, alone.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from precompute.online_crop import Cut, SquareCutter
from precompute.online_encoders import Encoders
from precompute.online_index import index_samples
from precompute.online_samples import DecodedImage, OnlineSamples
from precompute.pixels import quieten_decoder
from shards.batch import LatentBatch
from shards.canonical import canonical_json
from shards.column import ImageColumn, TextColumn
from shards.dataset import Column
from shards.order import DEFAULT_WINDOW
from shards.prefetch import prefetch

_PREFETCH_DEPTH = 4
_BATCHES_AT_A_TIME = 2  # in the threads: none idles while the last image of a batch is decoded


class OnlineBatches:
    """A `BatchSource` that encodes on the way: moments and states are float32 tensors.

    Args:
        samples: what is read, and in which order.
        image: says what is made of the images; see `online_columns`.
        text: the same of the captions.
        device: where the encoders run.
        num_workers: threads that read and decode.
        random_crop: place the squares at random along the longer side, else as stage 1 does.
        flip_prob: share of squares that are mirrored.
        compiled_share: see `Encoders`.

    Attributes:
        encoders: autoencoder and text encoder.

    Raises:
        UserError: an encoder cannot be loaded.
    """

    def __init__(
        self,
        samples: OnlineSamples,
        image: Column[ImageColumn],
        text: Column[TextColumn],
        *,
        device: torch.device,
        num_workers: int,
        random_crop: bool = False,
        flip_prob: float = 0.0,
        compiled_share: int | None = None,
    ) -> None:
        quieten_decoder()
        self._samples, self._num_workers = samples, num_workers
        self._cutter = SquareCutter(
            column=image.spec,
            random_crop=random_crop,
            flip_prob=flip_prob,
            seed=samples.order.seed,
            global_batch_size=samples.order.global_batch_size,
        )
        self.encoders = Encoders(image, text, device, compiled_share=compiled_share)
        self.latent_shape = image.spec.latent_shape
        self.scaling_factor = image.spec.scaling_factor
        self.identity = self._identity(image.spec, text.spec)

    def _identity(self, image: ImageColumn, text: TextColumn) -> str:
        """Hash of all that the batches depend on: weights, transform, shards, order, draws."""
        facts = {
            "image": image.column_id,
            "text": text.column_id,
            "samples": self._samples.identity,
            **self._cutter.spec,
        }
        return f"online-{hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:16]}"

    @cached_property
    def null_states(self) -> np.ndarray:
        """States of the empty caption, [T, D] float32."""
        states: np.ndarray = self.encoders.encode_texts([""])[0].cpu().numpy()
        return states

    def epoch_at(self, step: int) -> float:
        """Epochs completed when `step` steps are done."""
        return self._samples.order.epoch_at(step)

    def keys_of(self, samples: np.ndarray) -> list[str]:
        """`<shard>/<key>` of samples by their numbers."""
        return self._samples.keys_of(samples)

    def captions(self, num_captions: int) -> list[str]:
        """Different captions of the samples, to draw images of."""
        return self._samples.captions(num_captions)

    def iter_batches(self, first_step: int, positions: range) -> Iterator[LatentBatch]:
        """Batches of `first_step` and all that follow: decoded ahead, encoded when asked for."""
        ahead: Any = prefetch(self._decode_all(first_step, positions), _PREFETCH_DEPTH)
        try:
            with closing(ahead):
                for step, images in ahead:
                    yield LatentBatch(
                        step=step,
                        samples=np.array([image.number for image in images]),
                        moments=self.encoders.encode_images([image.square for image in images]),
                        states=self.encoders.encode_texts([image.caption for image in images]),
                    )
        finally:
            self._samples.say_what_was_replaced()

    def decode(self, step: int, positions: range) -> list[DecodedImage]:
        """The images of one step, on all threads."""
        with ThreadPoolExecutor(self._num_workers, thread_name_prefix="decode") as pool:
            return [future.result() for future in self._start_decoding(pool, step, positions)]

    def _decode_all(
        self, first_step: int, positions: range
    ) -> Iterator[tuple[int, list[DecodedImage]]]:
        pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="decode")
        pending: deque[tuple[int, list[Future[DecodedImage]]]] = deque()
        try:
            for step in itertools.count(first_step):
                pending.append((step, self._start_decoding(pool, step, positions)))
                if len(pending) == _BATCHES_AT_A_TIME:
                    decoded, futures = pending.popleft()
                    yield decoded, [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)

    def _start_decoding(
        self, pool: ThreadPoolExecutor, step: int, positions: range
    ) -> list[Future[DecodedImage]]:
        shards, rows = self._samples.order.locate(step, positions)
        cuts = self._cutter.draw(step, positions)
        return [
            pool.submit(self._decode, shard, row, cut)
            for shard, row, cut in zip(shards.tolist(), rows.tolist(), cuts, strict=True)
        ]

    def _decode(self, shard: int, row: int, cut: Cut) -> DecodedImage:
        return self._samples.decode(shard, row, partial(self._cutter.cut, cut=cut))


def open_online(
    shards: str,
    image: Column[ImageColumn],
    text: Column[TextColumn],
    *,
    device: torch.device,
    num_workers: int,
    seed: int,
    global_batch_size: int,
    num_partitions: int,
    window: int = DEFAULT_WINDOW,
    random_crop: bool = False,
    flip_prob: float = 0.0,
    compiled_share: int | None = None,
    say: Callable[[str], object] = print,
    quiet: bool = False,
) -> OnlineBatches:
    """Batches straight from image shards, without a latent dataset.

    Args:
        shards: local tars, as stage 1 takes them.
        image: of `online_columns`.
        text: the same.
        device: where the encoders run.
        num_workers: threads that read and decode.
        seed: of the order, and of what is random about the squares.
        global_batch_size: samples per step over all processes.
        num_partitions: see `shards.order`.
        window: shuffle window in samples.
        random_crop: see `OnlineBatches`.
        flip_prob: the same.
        compiled_share: the same.
        say: takes a line for the user, on every process: each replaces samples of its own.
        quiet: another process of the run says what they all find; see `index_samples`.

    Raises:
        UserError: the shards or the model cannot be used.
    """
    quieten_decoder()
    samples = index_samples(
        shards,
        image.spec,
        seed=seed,
        global_batch_size=global_batch_size,
        num_partitions=num_partitions,
        window=window,
        num_threads=num_workers,
        say=say,
        quiet=quiet,
    )
    return OnlineBatches(
        samples,
        image,
        text,
        device=device,
        num_workers=num_workers,
        random_crop=random_crop,
        flip_prob=flip_prob,
        compiled_share=compiled_share,
    )
