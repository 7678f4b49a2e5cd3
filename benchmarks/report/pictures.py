"""Pictures as data URIs, so small that all of them together keep the page light."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from benchmarks.report.blocks import Picture
from shards.errors import UserError

BUDGET_BYTES = 4_000_000  # of all pictures of a page
_MAX_WIDTH, _MIN_WIDTH = 900, 120
_QUALITY = 85


def load_picture(path: Path, title: str, alt: str, max_bytes: int) -> Picture:
    """A picture, made smaller until it is small enough.

    Args:
        path: of the image file.
        title: above it.
        alt: what it shows, in words.
        max_bytes: of its data URI; one of 120 pixels is taken as it is.

    Raises:
        UserError: it is no image, or broken.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(path, f"cannot be read as an image ({error})") from None
    width = min(image.width, _MAX_WIDTH)
    while True:
        height = max(1, round(image.height * width / image.width))
        smaller = image.resize((width, height), Image.Resampling.LANCZOS)
        source = _data_uri(smaller)
        if len(source) <= max_bytes or width <= _MIN_WIDTH:
            return Picture(title=title, source=source, alt=alt, width=width, height=height)
        width = max(_MIN_WIDTH, int(0.8 * width))


def _data_uri(image: Any) -> str:
    """As JPEG: the samples of a model and their captions lose nothing that can be seen."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
