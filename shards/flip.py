"""Mirrored images: the column that holds them, and which samples of a step are taken from it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from shards.column import ImageColumn
from shards.errors import DatasetError
from shards.storage import Location

if TYPE_CHECKING:
    from shards.dataset import Column

_FLIP = 2  # what the random bits are for, beside those of `shards.order`


def draw_flips(
    seed: int, step: int, positions: range, global_batch_size: int, prob: float
) -> np.ndarray:
    """A coin for each position: a pure function of (seed, step, position).

    Args:
        seed: of the run.
        step: of the global batch.
        positions: contiguous range within [0, global_batch_size).
        global_batch_size: coins are drawn for all of it, from raw generator bits, which numpy
            fixes across releases.
        prob: of a flip; 0 is never and 1 is always.

    Returns:
        bool [len(positions)].
    """
    generator = np.random.Philox(np.random.SeedSequence((seed, _FLIP, step)))
    bits = generator.random_raw(global_batch_size)[positions.start : positions.stop]
    flips: np.ndarray = (bits >> np.uint64(11)) * 2.0**-53 < prob
    return flips


def mirror_spec(spec: ImageColumn) -> ImageColumn:
    """The spec of the column that holds a column's images mirrored."""
    return replace(spec, transform={**spec.transform, "flip": "horizontal"})


def no_mirror(where: Location, found: str, image: Column[ImageColumn]) -> DatasetError:
    """The error that says how to get the mirrored column of an image column."""
    return DatasetError(
        where,
        found,
        wanted=f"the mirrored images of {image.column_id}",
        remedy='make precompute with the same arguments and ARGS="--flip"',
    )


def expect_mirror(image: Column[ImageColumn], flipped: Column[ImageColumn]) -> None:
    """Refuse a column whose rows cannot take the place of another's.

    Raises:
        DatasetError: it was made with other settings than that and the flip, or of other samples.
    """
    where = flipped.dataset / flipped.column_id
    if image.spec.is_flipped or flipped.spec != mirror_spec(image.spec):
        raise no_mirror(where, "was made with other settings", image)
    rows, mirrored = ({n: e["rows"] for n, e in c.shards.items()} for c in (image, flipped))
    if differing := sorted(n for n in rows.keys() | mirrored if rows.get(n) != mirrored.get(n)):
        found = f"{len(differing)} of {len(rows)} shards missing or of other rows"
        raise no_mirror(where, f"{found} ({differing[0]}, …)", image)
