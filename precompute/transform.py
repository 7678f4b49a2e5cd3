"""From pixels to the crop that the VAE sees, and which crop that is. No randomness.

The crop is covered by the image's shortest side (of a bucket: by whichever side is tighter),
resized with bicubic interpolation and antialiasing (torch's for uint8, which is PIL's but for
rounding and several times as fast), and cut from the centre. Images are never upsampled. All of
this is part of an image column's fingerprint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from precompute.pixels import Picture, Pixels, upright
from shards.column import ImageColumn, Json

# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size while that leaves the shortest side this many
# times as long as it is resized to, and this many pixels: so all resolutions up to 512 share one
# decode. Against the whole image's crop that of a photo has a PSNR of 45 dB or more (measured: 49
# to 62), that of random black and white pixels, the worst case, 30; tests hold both.
_REDUCED_TIMES, _REDUCED_SIDE = 2, 1024
_DIVISORS = (8, 4, 2)
_MAX_BUCKET_RATIO = 2.0
_MAX_OVERHANG = 2  # what a crop may keep in memory, in its own sizes


def transform_spec(flip: bool = False) -> Json:
    """The transform as it enters the fingerprint."""
    spec = {
        "orientation": "exif",
        "alpha": "white",
        "jpeg_reduced_to": {"times": _REDUCED_TIMES, "shortest_side": _REDUCED_SIDE},
        "resize": "shortest_side",
        "interpolation": "bicubic",
        "antialias": True,
        "crop": "center",
        "range": [-1, 1],
    }
    return {**spec, "flip": "horizontal"} if flip else spec


def build_buckets(resolution: int, step: int) -> list[list[int]]:
    """Crops of many shapes and about one area, by height.

    Sides are multiples of `step`, the area is at most that of the square, the ratio at most 2:
    for each height the widest that fits (NovelAI's aspect-ratio buckets).

    Returns:
        [height, width] in pixels of each.
    """
    buckets = []
    for height in range(step, 2 * resolution + 1, step):
        width = resolution**2 // height // step * step
        if width and max(height, width) <= _MAX_BUCKET_RATIO * min(height, width):
            buckets.append([height, width])
    return buckets


@dataclass(frozen=True)
class Placement:
    """Where an image comes to lie in a crop: the bucket, and the sides that it is resized to."""

    bucket: int
    height: int
    width: int


@dataclass(frozen=True)
class Crop:
    """What an image column holds of an image.

    Args:
        sizes: (height, width) of its buckets in pixels; one, a square, where there are none.
        flip: mirrored from left to right.
    """

    sizes: tuple[tuple[int, int], ...]
    flip: bool = False

    @classmethod
    def of_column(cls, column: ImageColumn) -> Crop:
        """The crop of an image column."""
        return cls(tuple((height, width) for height, width in column.crop_sizes), column.is_flipped)

    def place(self, width: int, height: int) -> Placement | None:
        """The bucket of the nearest aspect ratio; None where the image is too small for it."""
        ratio = math.log(width / height)
        distances = [abs(math.log(w / h) - ratio) for h, w in self.sizes]
        bucket = distances.index(min(distances))
        crop_height, crop_width = self.sizes[bucket]
        scale = max(crop_height / height, crop_width / width)
        if scale > 1:
            return None
        resized = max(crop_height, round(height * scale)), max(crop_width, round(width * scale))
        return Placement(bucket, *resized)


class Cropper:
    """Makes the crops of one picture: it is decoded once, and resized once, where they agree."""

    def __init__(self, picture: Picture) -> None:
        self._picture = picture
        self._decoded: dict[int, Pixels] = {}
        self._resized: dict[tuple[int, int], np.ndarray] = {}

    def decode(self, placements: list[Placement]) -> None:
        """Decode for these crops; without any, to see whether the picture can be decoded.

        Raises:
            UnusableImageError: it cannot.
        """
        for divisor in {self._divisor(placement) for placement in placements} or {_DIVISORS[0]}:
            self._decoded[divisor] = self._picture.decode(divisor)

    def crop(self, crop: Crop, placement: Placement) -> np.ndarray:
        """The crop, uint8 [H, W, 3], of a picture that was decoded for it.

        It may lie within a larger array: batches are copied together anyway.
        """
        side = placement.height, placement.width
        if side not in self._resized:
            self._resized[side] = resize(self._decoded[self._divisor(placement)], *side)
        height, width = crop.sizes[placement.bucket]
        top, left = (placement.height - height) // 2, (placement.width - width) // 2
        whole = self._resized[side]
        cut = whole[top : top + height, left : left + width]
        if whole.nbytes > _MAX_OVERHANG * cut.nbytes:
            cut = cut.copy()
        return cut[:, ::-1] if crop.flip else cut

    def _divisor(self, placement: Placement) -> int:
        shortest = min(self._picture.width, self._picture.height)
        least = max(_REDUCED_TIMES * min(placement.height, placement.width), _REDUCED_SIDE)
        return next((d for d in _DIVISORS if shortest >= d * least), 1)


def resize(pixels: Pixels, height: int, width: int) -> np.ndarray:
    """Shrink to the upright uint8 [height, width, 3].

    As the pixels are stored, and turned afterwards: there a reduced decode has its fractions of a
    pixel at the end, where they shift nothing.
    """
    import torch

    if pixels.is_sideways:
        height, width = width, height
    small = pixels.stored
    if small.shape[:2] != (height, width):
        image = torch.from_numpy(small).permute(2, 0, 1)[None]  # as it lies: channels last
        # What torch.nn.functional.interpolate calls, which would take size or scales, not both.
        shrunk = torch.ops.aten._upsample_bicubic2d_aa(
            image, [height, width], False, height / pixels.height, width / pixels.width
        )
        small = shrunk[0].permute(1, 2, 0).numpy()
    return upright(small, pixels.orientation)


def cut_crop(data: bytes, column: ImageColumn) -> np.ndarray | None:
    """What an image column holds of an image file, uint8 [H, W, 3]; None where it is too small.

    Raises:
        UnusableImageError: not an image, or not a usable one.
    """
    picture, crop = Picture(data), Crop.of_column(column)
    picture.expect_usable()
    placement = crop.place(picture.width, picture.height)
    if placement is None:
        return None
    cropper = Cropper(picture)
    cropper.decode([placement])
    return cropper.crop(crop, placement)
