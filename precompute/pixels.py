"""From an image file's bytes to its RGB pixels, whatever kind of picture it is.

JPEGs are decoded by libjpeg-turbo straight into an array, on request at 1/2, 1/4 or 1/8 of their
size; all else, and what is unusual among JPEGs (CMYK, damage), by PIL. Both give the same pixels.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

MAX_PIXELS = 120_000_000  # below the limit at which PIL itself refuses
MAX_ASPECT_RATIO = 20  # banners and rulers: a square of them shows a twentieth
# What the web serves as pictures; PIL would also run programs (PostScript) on a stranger's bytes.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "PPM", "ICO", "AVIF")
_UPRIGHT_FORMATS = ("TIFF",)  # PIL turns them itself, and says their size as turned
_SIDEWAYS = (5, 6, 7, 8)  # EXIF's orientations that make rows of columns


class UnusableImageError(Exception):
    """An image that costs one sample; `reason` goes into the ledger."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def quieten_decoder() -> None:
    """PIL warns of every oddity that it then handles; once for a process, before its threads."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class Pixels:
    """What a file holds, as it is stored: not upright yet, a JPEG perhaps at reduced scale.

    Args:
        stored: RGB, uint8 [H, W, 3].
        orientation: EXIF's.
        divisor: what the sides were divided by.
        height, width: of the image, in these pixels: of the last row and column less than a whole
            one belongs to it where the divisor left a remainder.
    """

    stored: np.ndarray
    orientation: int
    divisor: int
    height: float
    width: float

    @property
    def is_sideways(self) -> bool:
        """Whether rows become columns."""
        return self.orientation in _SIDEWAYS

    def upright(self) -> np.ndarray:
        """The pixels as they are meant to be seen: uint8 [H, W, 3] or [W, H, 3], contiguous."""
        return np.ascontiguousarray(upright(self.stored, self.orientation))


class Picture:
    """An image file whose header was read.

    Args:
        data: the file's bytes.

    Attributes:
        width, height: in pixels, of the upright image.

    Raises:
        UnusableImageError: not an image, or of too many pixels to hold.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        with _damage_as_a_reason():
            self._image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        self.width, self.height = self._image.size
        if self.width * self.height > MAX_PIXELS:  # before EXIF: a PNG's may be behind its pixels
            raise UnusableImageError("too_many_pixels")
        with _damage_as_a_reason():
            orientation = self._image.getexif().get(ExifTags.Base.Orientation, 1)
        self._orientation = 1 if self._image.format in _UPRIGHT_FORMATS else orientation
        if self._orientation in _SIDEWAYS:
            self.width, self.height = self.height, self.width

    def expect_usable(self) -> None:
        """Refuse what is not worth its decoding.

        Raises:
            UnusableImageError: of a shape that no square shows.
        """
        if max(self.width, self.height) > MAX_ASPECT_RATIO * min(self.width, self.height):
            raise UnusableImageError("absurd_aspect_ratio")

    def decode(self, divisor: int = 1) -> Pixels:
        """The image's pixels; transparent parts become white.

        Args:
            divisor: 2, 4 or 8 let a JPEG come out that much smaller (sides rounded up), which
                costs less; other files come out whole.

        Raises:
            UnusableImageError: cut short or damaged.
        """
        stored = self._decode_jpeg(divisor)
        if stored is None:
            stored, divisor = self._decode_any(), 1
        width, height = self._stored_size
        return Pixels(stored, self._orientation, divisor, height / divisor, width / divisor)

    @property
    def _stored_size(self) -> tuple[int, int]:
        """Width and height before the image is turned."""
        sides = self.width, self.height
        return sides[::-1] if self._orientation in _SIDEWAYS else sides

    def _decode_jpeg(self, divisor: int) -> np.ndarray | None:
        """By libjpeg-turbo; None where PIL must judge."""
        from simplejpeg import decode_jpeg

        if self._image.format not in ("JPEG", "MPO") or self._image.mode not in ("RGB", "L"):
            return None
        width, height = (-(-side // divisor) for side in self._stored_size)
        try:
            stored: np.ndarray = decode_jpeg(
                self._data, "RGB", min_factor=divisor, min_width=width, min_height=height
            )
        except ValueError:  # damaged, or odd in a way that does no harm
            return None
        return stored if stored.shape == (height, width, 3) else None

    def _decode_any(self) -> np.ndarray:
        with _damage_as_a_reason():
            self._image.load()
            pixels = np.array(_to_rgb(self._image))
        width, height = self._stored_size
        if pixels.shape != (height, width, 3):  # its header lied
            raise UnusableImageError("broken_image")
        return pixels


@contextmanager
def _damage_as_a_reason() -> Iterator[None]:
    """Turn what PIL raises into what goes into the ledger."""
    try:
        yield
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        raise UnusableImageError("too_many_pixels") from None
    except UnidentifiedImageError:
        raise UnusableImageError("not_an_image") from None
    except Exception:  # PIL's decoders raise nearly anything for damaged files
        raise UnusableImageError("broken_image") from None


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A view of pixels [H, W, 3] that undoes what EXIF's orientation says was done to them."""
    turned = pixels.transpose(1, 0, 2) if orientation in _SIDEWAYS else pixels
    vertically = -1 if orientation in (3, 4, 7, 8) else 1
    horizontally = -1 if orientation in (2, 3, 6, 7) else 1
    return turned[::vertically, ::horizontally]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # PIL clips 16-bit greyscale to 255; scale it down instead.
        values = np.asarray(image, dtype=np.float32)
        grey = np.where(values == image.info.get("transparency"), 255, values / 257)
        image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
