"""Decode the samples of a shard in threads, in order, a bounded number ahead."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from precompute.filters import Filter
from precompute.pixels import UnusableImageError, crop_to, decode, peek_size
from shards.image_shards import ImageSample
from shards.ledger import OK, LedgerRow

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class DecodedSample:
    """A sample's ledger row, and its squares by resolution where it is large enough."""

    row: LedgerRow
    squares: dict[int, np.ndarray] = field(default_factory=dict)


def decode_sample(
    sample: ImageSample, resolutions: list[int], wanted: Filter | None = None
) -> DecodedSample:
    """One decode for all resolutions; what is not wanted or cannot be decoded becomes a reason."""
    status, squares = sample.problem or OK, {}
    width = height = None
    if status == OK:
        assert sample.image is not None
        try:
            if wanted and (reason := _reason_against(sample, wanted)):
                raise UnusableImageError(reason)
            image = decode(sample.image)
            width, height = image.size
            fitting = [r for r in resolutions if min(image.size) >= r]
            squares = {resolution: crop_to(image, resolution) for resolution in fitting}
        except UnusableImageError as error:
            status = error.reason
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
    return DecodedSample(row, squares)


def _reason_against(sample: ImageSample, wanted: Filter) -> str:
    """Judge a sample undecoded; width and height are those of the image itself."""
    image = sample.image
    assert image is not None
    fields = {**sample.metadata, "key": sample.key, "caption": sample.caption}

    def look_up(name: str) -> Any:
        if name in ("width", "height"):
            return peek_size(image)[name == "height"]
        return fields.get(name)

    return wanted.reason_against(look_up)


def map_ahead(
    pool: ThreadPoolExecutor, function: Callable[[A], B], items: Iterable[A], depth: int
) -> Iterator[B]:
    """`map` in threads: results in order, at most `depth` items read ahead."""
    pending: deque[Future[B]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) >= depth:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
