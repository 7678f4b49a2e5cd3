"""Pictures to measure: of a folder, of image shards, or that `python -m evaluate generate` wrote.

They come in batches of one size, each prepared as stage 1 prepares what it encodes: shrunk until
the shorter side fits (bicubic, antialiased), cut from the centre, never enlarged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from evaluate.generated import PROMPTS, Generated
from precompute.pixels import Picture, UnusableImageError
from precompute.transform import Crop, Cropper
from shards.errors import UserError
from shards.find_shards import find_shards
from shards.image_sample import IMAGE_SUFFIXES
from shards.image_shards import ShardStream
from shards.storage import location, size_of

if TYPE_CHECKING:
    from torch import Tensor

TRANSFORM = "shortest side shrunk to fit (bicubic, antialiased), centre crop; never enlarged"
TOO_SMALL = "too_small"
_READ_AHEAD = 16


class PictureBatch(NamedTuple):
    """Pictures uint8 [B, 3, H, W], and the caption of each where there are captions."""

    images: Tensor
    captions: list[str] | None


@dataclass
class Pictures:
    """All pictures of one source, read anew by each iteration.

    Args:
        where: a folder of pictures, image shards as `make precompute SHARDS=` takes them, or a
            folder that holds shards or generated pictures.
        size: (height, width) in pixels; None takes that of the first picture.
        limit: pictures at most; 0: all.

    Attributes:
        dropped: what the last iteration left out, by reason.
    """

    where: str
    size: tuple[int, int] | None = None
    limit: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def batches(self, batch_size: int) -> Iterator[PictureBatch]:
        """Pictures in order; the last batch may be smaller.

        Raises:
            UserError: nothing there that is a picture, or generated pictures are incomplete.
        """
        import torch

        self.dropped.clear()
        usable = islice(self._iter_usable(), self.limit or None)
        count = 0
        while chunk := list(islice(usable, batch_size)):
            count += len(chunk)
            images = torch.from_numpy(np.stack([image for image, _ in chunk])).permute(0, 3, 1, 2)
            captions = [caption for _, caption in chunk if caption]
            yield PictureBatch(images, captions if len(captions) == len(chunk) else None)
        if not count:
            reasons = ", ".join(f"{n} {reason}" for reason, n in self.dropped.items())
            raise UserError(self.where, f"no usable picture ({reasons or 'none there'})")

    def _iter_usable(self) -> Iterator[tuple[np.ndarray, str | None]]:
        """Pictures uint8 [H, W, 3] with their captions; what is left out is counted."""
        if size_of(location(self.where) / PROMPTS) is not None:
            yield from self._iter_generated()
            return
        for data, caption in self._iter_files():
            try:
                image = self._cut(data)
            except UnusableImageError as error:
                self.dropped[error.reason] += 1
                continue
            if image is None:
                self.dropped[TOO_SMALL] += 1
            else:
                yield image, caption

    def _iter_generated(self) -> Iterator[tuple[np.ndarray, str | None]]:
        """As they are: what a generator makes is not to be improved."""
        generated = Generated(self.where)
        prompts = iter(generated.prompts)
        for images in generated.iter_images(_READ_AHEAD):
            self.size = self.size or images.shape[1:3]
            if images.shape[1:3] != self.size:
                height, width = images.shape[1:3]
                wanted = f"{self.size[0]}x{self.size[1]}"
                raise UserError(self.where, f"pictures of {height}x{width}", wanted=wanted)
            yield from zip(images, prompts, strict=False)

    def _cut(self, data: bytes) -> np.ndarray | None:
        """uint8 [H, W, 3]; None where the picture is too small."""
        picture = Picture(data)
        picture.expect_usable()
        self.size = self.size or (picture.height, picture.width)
        crop = Crop((self.size,))
        placement = crop.place(picture.width, picture.height)
        if placement is None:
            return None
        cropper = Cropper(picture)
        cropper.decode([placement])
        return cropper.crop(crop, placement)

    def _iter_files(self) -> Iterator[tuple[bytes, str | None]]:
        """Files with their captions; what shards hold that is no usable sample is counted."""
        folder = Path(self.where)
        if folder.is_dir() and not any(folder.glob("*.tar")):
            for path in _picture_files(folder):
                yield path.read_bytes(), None
            return
        shards, _ = find_shards(self.where)
        for shard in shards:
            for sample in ShardStream(shard):
                if sample.image and sample.problem in ("", "no_caption"):
                    yield sample.image, sample.caption
                else:
                    self.dropped[sample.problem] += 1


def _picture_files(folder: Path) -> list[Path]:
    endings = {f".{suffix}" for suffix in IMAGE_SUFFIXES}
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings)
    if not found:
        raise UserError(
            folder, "no pictures", wanted=f"{', '.join(sorted(endings))} files, or image shards"
        )
    return found
