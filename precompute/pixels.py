"""From an image file's bytes to its upright RGB pixels, whatever kind of picture it is.

JPEGs are decoded by libjpeg-turbo straight into an array, on request at 1/2, 1/4 or 1/8 of their
size; all else, and what is unusual among JPEGs (CMYK, damage), by PIL. Both give the same pixels.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 120_000_000  # below the limit at which PIL itself refuses
MAX_ASPECT_RATIO = 20  # banners and rulers: a square of them shows a twentieth
# What the web serves as pictures; PIL would also run programs (PostScript) on a stranger's bytes.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "PPM", "ICO", "AVIF")
_UPRIGHT_FORMATS = ("TIFF",)  # PIL turns them itself, and says their size as turned


class UnusableImageError(Exception):
    """An image that costs one sample; `reason` goes into the ledger."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def quieten_decoder() -> None:
    """PIL warns of every oddity that it then handles; once for a process, before its threads."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


class Picture:
    """An image file whose header was read.

    Args:
        data: the file's bytes.

    Attributes:
        width, height: in pixels, of the upright image.

    Raises:
        UnusableImageError: not an image.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        try:
            self._image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
            self._orientation = self._image.getexif().get(ExifTags.Base.Orientation, 1)
        except MemoryError:
            raise
        except Image.DecompressionBombError:
            raise UnusableImageError("too_many_pixels") from None
        except UnidentifiedImageError:
            raise UnusableImageError("not_an_image") from None
        except Exception:  # PIL's decoders raise nearly anything for damaged files
            raise UnusableImageError("broken_image") from None
        self.width, self.height = self._image.size
        if self._orientation in (5, 6, 7, 8) and self._image.format not in _UPRIGHT_FORMATS:
            self.width, self.height = self.height, self.width

    def expect_usable(self) -> None:
        """Refuse what is not worth the memory.

        Raises:
            UnusableImageError: of too many pixels, or of a shape that no square shows.
        """
        if self.width * self.height > MAX_PIXELS:
            raise UnusableImageError("too_many_pixels")
        if max(self.width, self.height) > MAX_ASPECT_RATIO * min(self.width, self.height):
            raise UnusableImageError("absurd_aspect_ratio")

    def decode(self, divisor: int = 1) -> np.ndarray:
        """Upright RGB, uint8 [H, W, 3]; transparent parts become white.

        Args:
            divisor: 2, 4 or 8 let a JPEG come out that much smaller (sides rounded up), which
                costs less; other files come out whole.

        Raises:
            UnusableImageError: cut short or damaged.
        """
        pixels = self._decode_jpeg(divisor)
        if pixels is None:
            pixels = self._decode_any()
        return np.ascontiguousarray(pixels)

    def _decode_jpeg(self, divisor: int) -> np.ndarray | None:
        """By libjpeg-turbo; None where PIL must judge."""
        from simplejpeg import decode_jpeg

        if self._image.format not in ("JPEG", "MPO") or self._image.mode not in ("RGB", "L"):
            return None
        width, height = self._image.size
        least = {"min_width": -(-width // divisor), "min_height": -(-height // divisor)}
        try:
            stored = decode_jpeg(self._data, "RGB", min_factor=divisor, **least)
        except ValueError:  # damaged, or odd in a way that does no harm
            return None
        return _upright(stored, self._orientation)

    def _decode_any(self) -> np.ndarray:
        try:
            self._image.load()
            pixels = np.array(_to_rgb(ImageOps.exif_transpose(self._image)))
        except MemoryError:
            raise
        except Exception:  # PIL's decoders raise nearly anything for damaged files
            raise UnusableImageError("broken_image") from None
        if pixels.shape[:2] != (self.height, self.width):  # its header lied
            raise UnusableImageError("broken_image")
        return pixels


def _upright(stored: np.ndarray, orientation: int) -> np.ndarray:
    """Undo what EXIF's orientation says was done to pixels [H, W, 3]."""
    turned = stored.transpose(1, 0, 2) if orientation in (5, 6, 7, 8) else stored
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
