"""Read a shard and decode its samples in threads, in order, a bounded number ahead."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from precompute.filters import Filter
from precompute.pixels import Picture, UnusableImageError
from precompute.time_account import DECODE, READ, TRANSFORM
from precompute.transform import Crop, Cropper
from shards.column import Json
from shards.image_sample import ImageSample
from shards.image_shards import ShardStream
from shards.ledger import OK, LedgerRow

_LOOK_SEC = 0.1  # how often a reader that waits for room looks whether it is still wanted


@dataclass(frozen=True)
class DecodedSample:
    """A sample's ledger row, and what each crop holds of it.

    Args:
        row: of the ledger.
        crops: by the crop's number: its bucket, and pixels uint8 [H, W, 3]; absent where the
            image is too small for it.
        seconds: of the thread that decoded, by stage.
    """

    row: LedgerRow
    crops: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class _Judged:
    """A sample undecoded; its header is read when something asks for it."""

    def __init__(self, sample: ImageSample) -> None:
        self.sample = sample

    @cached_property
    def picture(self) -> Picture:
        assert self.sample.image is not None
        return Picture(self.sample.image)

    def refuse_unwanted(self, wanted: Filter) -> None:
        """Hold it to the filter; width and height are those of the image itself."""
        sample = self.sample
        fields = {**sample.metadata, "key": sample.key, "caption": sample.caption}

        def look_up(name: str) -> Any:
            if name in ("width", "height"):
                return getattr(self.picture, name)
            return fields.get(name)

        if reason := wanted.reason_against(look_up):
            raise UnusableImageError(reason)


def decode_sample(sample: ImageSample, crops: list[Crop], wanted: Filter) -> DecodedSample:
    """One decode for all crops; what is not wanted or cannot be decoded becomes a reason."""
    status, cut, judged = sample.problem or OK, {}, _Judged(sample)
    seconds: dict[str, float] = {}
    width = height = None
    start = time.perf_counter()
    if status == OK:
        try:
            judged.refuse_unwanted(wanted)
            picture = judged.picture
            picture.expect_usable()
            placed = [crop.place(picture.width, picture.height) for crop in crops]
            cropper = Cropper(picture)
            cropper.decode([placement for placement in placed if placement])
            width, height = picture.width, picture.height
            seconds[DECODE] = time.perf_counter() - start
            for number, (crop, placement) in enumerate(zip(crops, placed, strict=True)):
                if placement:
                    cut[number] = placement.bucket, cropper.crop(crop, placement)
            seconds[TRANSFORM] = time.perf_counter() - start - seconds[DECODE]
        except UnusableImageError as error:
            status = error.reason
            seconds[DECODE] = time.perf_counter() - start
    url = sample.metadata.get("url")
    row = LedgerRow(
        key=sample.key,
        status=status,
        caption=sample.caption,
        url=url if isinstance(url, str) else None,
        width=width,
        height=height,
        sha256=hashlib.sha256(sample.image).hexdigest() if sample.image is not None else None,
        metadata=sample.metadata,
    )
    return DecodedSample(row, cut, seconds)


class DecodePool:
    """Threads that decode, for one shard after the other: the next waits until all of it is read.

    Otherwise shards that begin together would share the threads, and the encoders wait for all of
    them instead of for the first.
    """

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self.turn = threading.Lock()

    def submit(
        self, decode: Callable[[ImageSample], DecodedSample], sample: ImageSample
    ) -> Future[DecodedSample]:
        """Decode a sample when a thread is free."""
        return self._threads.submit(decode, sample)

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; what was not begun is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class DecodedShard:
    """The decoded samples of one shard, in order. Reading and decoding begin before they are taken.

    It returns when its turn to decode has come; the shard is brought here before that, where it is
    elsewhere. So whoever has one never waits for one that is taken later.

    Args:
        stream: the shard.
        decode: makes the decoded sample; runs in the pool.
        pool: threads; may be shared with other shards.
        depth: samples read ahead of those that were taken.
    """

    def __init__(
        self,
        stream: ShardStream,
        decode: Callable[[ImageSample], DecodedSample],
        pool: DecodePool,
        depth: int,
    ) -> None:
        self._read_sec = 0.0
        self._stream, self._decode, self._pool = stream, decode, pool
        self._pending: queue.Queue[Future[DecodedSample] | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._begun, self._closed = threading.Event(), threading.Event()
        self._reader = threading.Thread(target=self._read, name="read-shard", daemon=True)
        self._reader.start()
        self._begun.wait()

    def __iter__(self) -> Iterator[DecodedSample]:
        while (decoded := self._pending.get()) is not None:
            yield decoded.result()
        if self._error:
            raise self._error

    def close(self) -> None:
        """End the reading; samples that were not taken are lost."""
        self._closed.set()
        self._reader.join()

    def _read(self) -> None:
        samples = iter(self._stream)
        try:
            sample = self._next(samples)
            with self._pool.turn:
                self._begun.set()
                while sample and self._put(self._pool.submit(self._decode, sample)):
                    sample = self._next(samples)
        except BaseException as error:  # handed over to the consumer, whatever it is
            self._error = error
        finally:
            self._begun.set()
            samples.close()  # type: ignore[attr-defined]  # a generator; what it holds ends now
        self._put(None)

    def _next(self, samples: Iterator[ImageSample]) -> ImageSample | None:
        start = time.perf_counter()
        sample = next(samples, None)
        self._read_sec += time.perf_counter() - start
        return sample

    def _put(self, item: Future[DecodedSample] | None) -> bool:
        while not self._closed.is_set():
            try:
                self._pending.put(item, timeout=_LOOK_SEC)
                return True
            except queue.Full:
                continue
        return False

    @property
    def source(self) -> Json:
        """`url`, `bytes` and `sha256` of the shard, once all samples were taken."""
        shard = self._stream.shard
        return {"url": shard.url, "bytes": self._stream.num_bytes, "sha256": self._stream.sha256}

    @property
    def seconds(self) -> dict[str, float]:
        """Of the thread that read."""
        return {READ: self._read_sec}
