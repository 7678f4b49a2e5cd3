"""The square of an image that one step sees: as stage 1 cuts it, or placed and mirrored at random.

What is random is a function of (seed, step, position in the global batch), as all draws of a run
are (`train/draws.py`): the same for any number of processes, and after any interruption.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from precompute.pixels import Picture, UnusableImageError
from precompute.transform import Crop, Cropper, Placement
from shards.column import ImageColumn, Json
from shards.flip import draw_flips

_PLACE = 3  # what the random bits are for, beside those of `shards.order` and `shards.flip`
_UNIT = 2.0**-53  # from 53 random bits to [0, 1)


@dataclass(frozen=True)
class Cut:
    """How one square is cut.

    Args:
        place: where it lies along the image's longer side, in [0, 1); None: in the centre.
        mirrored: from left to right.
    """

    place: float | None = None
    mirrored: bool = False


@dataclass(frozen=True, kw_only=True)
class SquareCutter:
    """Draws cuts, and makes them.

    Args:
        column: the image column whose transform is followed.
        random_crop: else the square is the centre's.
        flip_prob: share of squares that are mirrored.
        seed: of the run.
        global_batch_size: samples per step over all processes.
    """

    column: ImageColumn
    random_crop: bool
    flip_prob: float
    seed: int
    global_batch_size: int

    @property
    def spec(self) -> Json:
        """What the squares depend on, beside their column."""
        return {"random_crop": self.random_crop, "flip_prob": self.flip_prob}

    def draw(self, step: int, positions: range) -> list[Cut]:
        """The cuts for some positions of one step's global batch.

        The coins are those that choose between stored latents and mirrored ones.
        """
        whole = self.global_batch_size
        flips = draw_flips(self.seed, step, positions, whole, self.flip_prob)
        bits = np.random.Philox(np.random.SeedSequence((self.seed, _PLACE, step)))
        places = (bits.random_raw(whole) >> np.uint64(11)) * _UNIT
        return [
            Cut(place if self.random_crop else None, flip)
            for place, flip in zip(places[positions].tolist(), flips.tolist(), strict=True)
        ]

    def cut(self, data: bytes, cut: Cut) -> np.ndarray:
        """The square of an image file, uint8 [H, W, 3].

        Raises:
            UnusableImageError: not an image, not a usable one, or too small.
        """
        picture, crop = Picture(data), Crop.of_column(self.column)
        picture.expect_usable()
        placement = crop.place(picture.width, picture.height)
        if placement is None:
            raise UnusableImageError("too_small")
        cropper = Cropper(picture)
        cropper.decode([placement])
        if cut.place is None:
            square = cropper.crop(crop, placement)
        else:
            square = _cut_at(cropper, crop, placement, cut.place)
        return square[:, ::-1] if cut.mirrored else square


def _cut_at(cropper: Cropper, crop: Crop, placement: Placement, place: float) -> np.ndarray:
    """The square at `place`: of the two sides, at most one has room to choose from."""
    height, width = crop.sizes[placement.bucket]
    whole = Crop(((placement.height, placement.width),), crop.flip)
    pixels = cropper.crop(whole, Placement(0, placement.height, placement.width))
    top = int(place * (placement.height - height + 1))
    left = int(place * (placement.width - width + 1))
    return pixels[top : top + height, left : left + width].copy()  # of a long image, a small part
