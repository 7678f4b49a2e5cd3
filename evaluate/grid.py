"""A grid of images with their captions, as one picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shards.storage import Location, write_whole

_MIN_SIDE, _MARGIN, _FONT_SIZE, _LINES = 160, 8, 12, 3


def write_grid(
    where: Location, images: Sequence[np.ndarray], captions: Sequence[str], columns: int = 0
) -> None:
    """Write a grid as a PNG; see `draw_grid`."""
    write_png(where, draw_grid(images, captions, columns))


def write_png(where: Location, pixels: np.ndarray) -> None:
    """Write [H, W, 3] uint8 as a PNG."""
    picture = Image.fromarray(pixels)
    write_whole(where, lambda temporary: picture.save(temporary, format="PNG"))


def draw_grid(
    images: Sequence[np.ndarray], captions: Sequence[str], columns: int = 0
) -> np.ndarray:
    """Images [H, W, 3] uint8 with their captions below, as one such image.

    Args:
        images: of one size; small ones are shown enlarged.
        captions: one for each image.
        columns: images in a row; 0 makes the grid about square.
    """
    columns = columns or max(1, round(len(images) ** 0.5))
    rows = -(-len(images) // columns)
    side = max(images[0].shape[0], _MIN_SIDE)
    font = ImageFont.load_default(_FONT_SIZE)
    cell_width = side + _MARGIN
    cell_height = side + _MARGIN + _LINES * (_FONT_SIZE + 3)
    sheet = Image.new(
        "RGB", (columns * cell_width + _MARGIN, rows * cell_height + _MARGIN), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for index, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        left = _MARGIN + index % columns * cell_width
        top = _MARGIN + index // columns * cell_height
        picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        sheet.paste(picture, (left, top))
        text = _wrap(caption, font, side)
        draw.multiline_text((left, top + side + 2), text, fill="black", font=font, spacing=2)
    return np.asarray(sheet)


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, max_width: int) -> str:
    """Break into lines that fit; what does not fit into the last one ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= max_width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) < _LINES:
            lines.append(word)
        else:
            lines[-1] += " …"
            break
    return "\n".join(lines)
