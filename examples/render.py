"""Scenes in pixels: where the objects stand, and how they are drawn.

Everything is measured in fractions of the picture's side, so one placement can be drawn at any
resolution. Edges are anti-aliased by the exact share of a pixel that a shape covers (for a
circle and for slanted edges, by their distance from the pixel's centre). Pure numpy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from examples.grammar import COLOURS, Scene

# Every shape fills a square box of this width, by the number of objects in the scene. What is
# narrower than two cells of an 8x VAE (16 pixels of 64) does not survive the round trip; an object
# that has the picture for itself is larger, so that a small model learns its shape in minutes.
WIDTHS = {
    1: {"small": (0.34, 0.38), "large": (0.54, 0.60)},
    2: {"small": (0.26, 0.30), "large": (0.39, 0.43)},
}
MARGIN = 0.025
GAP = 0.06
MAX_SLANT = 0.35  # off-axis offset per on-axis distance: "above" must not look like "left of"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The box of one object: centre and width, in fractions of the side; y points down."""

    x: float
    y: float
    width: float


def place(scene: Scene, rng: np.random.Generator) -> tuple[Placement, ...]:
    """Choose sizes and positions at random, within what the caption allows."""
    ranges = WIDTHS[len(scene.objects)]
    widths = [float(rng.uniform(*ranges[item.size])) for item in scene.objects]
    if scene.relation is None:
        x, y = (float(rng.uniform(*_range(widths[0]))) for _ in range(2))
        return (Placement(x=x, y=y, width=widths[0]),)
    first, second = _place_pair(widths, rng)
    if scene.relation in ("below", "right of"):
        first, second = _mirror(first), _mirror(second)
    if scene.relation in ("left of", "right of"):
        return first, second
    return _transpose(first), _transpose(second)


def _place_pair(widths: list[float], rng: np.random.Generator) -> tuple[Placement, Placement]:
    """Place the first object left of the second."""
    least = sum(widths) / 2 + GAP
    (low, _), (_, high) = _range(widths[0]), _range(widths[1])
    distance = float(rng.uniform(least, max(least, high - low)))
    x = float(rng.uniform(low, high - distance))
    slant = MAX_SLANT * distance
    y = float(rng.uniform(*_range(widths[0])))
    bottom, top = _range(widths[1])
    y2 = float(rng.uniform(max(bottom, y - slant), min(top, y + slant)))
    return (
        Placement(x=x, y=y, width=widths[0]),
        Placement(x=x + distance, y=y2, width=widths[1]),
    )


def _range(width: float) -> tuple[float, float]:
    """Return the span of centres that keep a box of this width inside the picture."""
    return MARGIN + width / 2, 1 - MARGIN - width / 2


def _mirror(box: Placement) -> Placement:
    return Placement(x=1 - box.x, y=box.y, width=box.width)


def _transpose(box: Placement) -> Placement:
    return Placement(x=box.y, y=box.x, width=box.width)


def coverage(shape: str, box: Placement, resolution: int) -> np.ndarray:
    """Return the share of each pixel that the shape covers: [H, W] float32 in [0, 1]."""
    centres = np.arange(resolution, dtype=np.float64) + 0.5
    dx = (centres - box.x * resolution)[None, :]
    dy = (centres - box.y * resolution)[:, None]
    half = box.width * resolution / 2
    if shape == "circle":
        covered = np.clip(half - np.hypot(dx, dy) + 0.5, 0.0, 1.0)
    elif shape == "square":
        covered = _overlap(dx, -half, half) * _overlap(dy, -half, half)
    elif shape == "triangle":
        # Apex at the top, base at the bottom; the sides' inward normal is (2, -1) / sqrt(5).
        sides = (2 * np.abs(dx) - (dy + half)) / np.sqrt(5.0)
        covered = np.clip(0.5 - sides, 0.0, 1.0) * _overlap(dy, -half, half)
    else:
        raise ValueError(f"shape {shape!r} is unknown")
    return covered.astype(np.float32)


def _overlap(offset: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return the share of unit intervals, centred at `offset`, that lies within [low, high]."""
    return np.clip(np.minimum(offset + 0.5, high) - np.maximum(offset - 0.5, low), 0.0, 1.0)


def draw(scene: Scene, boxes: tuple[Placement, ...], resolution: int) -> np.ndarray:
    """Draw the scene with its objects in the given boxes: [H, W, 3] uint8."""
    picture = np.empty((resolution, resolution, 3), dtype=np.float32)
    picture[:] = COLOURS[scene.background]
    for item, box in zip(scene.objects, boxes, strict=True):
        alpha = coverage(item.shape, box, resolution)[..., None]
        picture += alpha * (np.array(COLOURS[item.colour], dtype=np.float32) - picture)
    return np.rint(picture).astype(np.uint8)


def render(scene: Scene, rng: np.random.Generator, resolution: int = 64) -> Image.Image:
    """Place and draw the scene; the same generator state gives the same pixels."""
    return Image.fromarray(draw(scene, place(scene, rng), resolution))
