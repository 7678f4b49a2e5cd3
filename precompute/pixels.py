"""From image bytes to the exact square that the VAE sees: one decode, every resolution.

The transform is part of an image column's fingerprint: shortest side to the resolution (bicubic
with antialiasing, PIL's), centre crop, [-1, 1]. Images are never upsampled.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from shards.column import Json

MAX_PIXELS = 120_000_000  # below the limit at which PIL itself refuses
# What the web serves as pictures; PIL would also run programs (PostScript) on a stranger's bytes.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "PPM", "ICO", "AVIF")


def transform_spec() -> Json:
    """The transform as it enters the fingerprint."""
    return {
        "orientation": "exif",
        "alpha": "white",
        "resize": "shortest_side",
        "interpolation": "bicubic",
        "antialias": True,
        "crop": "center",
        "range": [-1, 1],
    }


class UnusableImageError(Exception):
    """An image that costs one sample; `reason` goes into the ledger."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def quieten_decoder() -> None:
    """PIL warns of every oddity that it then handles; once for a process, before its threads."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def peek_size(data: bytes) -> tuple[int, int]:
    """Width and height of the upright image, from the file's header alone.

    Raises:
        UnusableImageError: not an image.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except MemoryError:
        raise
    except Exception:  # PIL's decoders raise nearly anything for damaged files
        raise UnusableImageError("not_an_image") from None
    return (image.height, image.width) if turned else (image.width, image.height)


def decode(data: bytes) -> Image.Image:
    """Decode to upright RGB; transparent parts become white.

    Raises:
        UnusableImageError: not an image, cut short, or of too many pixels.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise UnusableImageError("too_many_pixels")
        image.load()
        image = ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except (UnusableImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UnusableImageError("not_an_image") from None
    except Image.DecompressionBombError:
        raise UnusableImageError("too_many_pixels") from None
    except Exception:  # PIL's decoders raise nearly anything for damaged files
        raise UnusableImageError("broken_image") from None


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


def crop_to(image: Image.Image, resolution: int) -> np.ndarray:
    """Resize the shortest side to `resolution` and cut the centre square.

    Args:
        image: RGB, at least `resolution` on its shortest side.

    Returns:
        uint8 [3, resolution, resolution].
    """
    width, height = image.size
    scale = resolution / min(width, height)
    assert scale <= 1, "images are never upsampled"
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    square = image.crop((left, top, left + resolution, top + resolution))
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))
