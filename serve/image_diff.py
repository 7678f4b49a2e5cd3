"""How far images are from those of another way to compute them, in numbers and side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluate.grid import write_grid, write_png
from shards.canonical import canonical_json
from shards.storage import write_text_whole

DIFFERENCES = "image-diff.json"
SHEET = "image-diff.png"
_LEVELS = 255
_AMPLIFIED = 16  # differences on the sheet


@dataclass(frozen=True, kw_only=True)
class ImageDifference:
    """Of two images of 8 bits a channel.

    Args:
        max_levels: largest difference of a channel, out of 255.
        mean_levels: mean absolute difference.
        psnr_db: peak signal-to-noise ratio; None where the images are equal.
    """

    max_levels: int
    mean_levels: float
    psnr_db: float | None


def compare(image: np.ndarray, reference: np.ndarray) -> ImageDifference:
    """The difference of two images [H, W, 3] uint8 of one size."""
    assert image.shape == reference.shape
    difference = np.abs(image.astype(np.int16) - reference)
    mean_square = float(np.square(difference.astype(np.float64)).mean())
    return ImageDifference(
        max_levels=int(difference.max()),
        mean_levels=float(difference.mean()),
        psnr_db=10 * float(np.log10(_LEVELS**2 / mean_square)) if mean_square else None,
    )


def write_differences(
    folder: Path,
    images: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
    names: tuple[str, str] = ("fast", "plain"),
) -> list[ImageDifference]:
    """Write images, references, their differences and a sheet that shows all three.

    Args:
        folder: gets `<name>-<n>.png`, `image-diff.json` and `image-diff.png`.
        images: [H, W, 3] uint8.
        references: the same images, computed in another way.
        names: of the two ways.
    """
    folder.mkdir(parents=True, exist_ok=True)
    differences = [compare(*pair) for pair in zip(images, references, strict=True)]
    cells: list[tuple[np.ndarray, str]] = []
    rows: list[dict[str, Any]] = []
    for number, (image, reference) in enumerate(zip(images, references, strict=True)):
        pair = dict(zip(names, (image, reference), strict=True))
        files = {name: f"{name}-{number:02d}.png" for name in pair}
        for name, pixels in pair.items():
            write_png(folder / files[name], pixels)
        difference = differences[number]
        rows.append({**files, **asdict(difference)})
        cells += [(reference, names[1]), (image, names[0])]
        cells.append((_amplified(image, reference), f"difference x{_AMPLIFIED}: {say(difference)}"))
    write_text_whole(folder / DIFFERENCES, canonical_json({"differences": rows}))
    pictures, captions = zip(*cells, strict=True)
    write_grid(folder / SHEET, pictures, captions, columns=3)
    return differences


def say(difference: ImageDifference) -> str:
    """A difference in one line."""
    if difference.psnr_db is None:
        return "equal"
    return (
        f"max {difference.max_levels}, mean {difference.mean_levels:.3f} of {_LEVELS}, "
        f"PSNR {difference.psnr_db:.1f} dB"
    )


def to_uint8(images: Any) -> list[np.ndarray]:
    """A pipeline's tensor [B, 3, H, W] in [0, 1] as arrays [H, W, 3].

    What is not a number becomes 0.
    """
    pixels = (images.float().nan_to_num(0.0) * _LEVELS).round().byte()
    return list(pixels.permute(0, 2, 3, 1).cpu().numpy())


def _amplified(image: np.ndarray, reference: np.ndarray) -> np.ndarray:
    difference = np.abs(image.astype(np.int16) - reference) * _AMPLIFIED
    return difference.clip(0, _LEVELS).astype(np.uint8)
