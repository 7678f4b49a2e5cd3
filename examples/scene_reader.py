"""Tells from pixels alone what a scene shows, and scores pictures against their captions.

A generated picture is blurry and its colours are off, so every step works on medians, on nearest
palette colours and on best fits: the background is the commonest palette colour of the border;
objects are the patches of other colours; a shape is the one whose ideal outline, at the patch's
centre and area, overlaps the patch best. On true renders the reading is exact.

    score(captions, images)     # fractions right, and the same against shuffled captions
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from examples.grammar import COLOURS, SHAPES, Scene, SceneObject, parse_caption
from examples.render import WIDTHS, Placement, coverage

READ_RESOLUTION = 64
MAX_COLOUR_DISTANCE = 100.0  # farther than this from every palette colour is no colour
MIN_FOREGROUND_DISTANCE = 60.0
MIN_BORDER_FRAC = 0.5  # share of the border that must agree on the background
MIN_AREA_FRAC = 0.012  # the smallest object covers 0.034
MIN_AREA_OF_LARGEST = 0.1
MIN_OVERLAP = 0.6
SIZE_THRESHOLD = {n: (w["small"][1] + w["large"][0]) / 2 for n, w in WIDTHS.items()}
AREA_OF_UNIT_WIDTH = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}
CENTROID_BELOW_CENTRE = {"circle": 0.0, "square": 0.0, "triangle": 1 / 6}  # in widths
CHANCE_SHUFFLES = 16

_NAMES = tuple(COLOURS)
_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class ReadObject:
    """One patch of colour; what could not be told is None."""

    size: str | None
    colour: str | None
    shape: str | None
    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was read from one picture; what could not be told is None."""

    background: str | None
    objects: tuple[ReadObject, ...]
    relation: str | None

    def scene(self) -> Scene | None:
        """Return the scene, or None where a part is unreadable or outside the grammar."""
        parts = [(item.size, item.colour, item.shape) for item in self.objects]
        if self.background is None or any(part is None for part in itertools.chain(*parts)):
            return None
        try:
            return Scene(
                objects=tuple(
                    SceneObject(size=str(size), colour=str(colour), shape=str(shape))
                    for size, colour, shape in parts
                ),
                background=self.background,
                relation=self.relation,
            )
        except ValueError:
            return None


@dataclass(frozen=True, kw_only=True)
class SceneAccuracy:
    """Fractions of pictures that show what their captions ask for.

    `relation` counts captions with two objects only, and is None without any. `chance` is the
    same against shuffled captions: what a generator scores that ignores its prompt.
    """

    num_images: int
    background: float
    colour: float
    shape: float
    size: float
    relation: float | None
    all_right: float
    chance: SceneAccuracy | None = None


def read_scene(pixels: np.ndarray) -> Reading:
    """Read one picture.

    Args:
        pixels: [H, W, 3] uint8, square, of any resolution.
    """
    picture = _to_read_resolution(pixels)
    labels = _nearest_colour(picture)
    background = _read_background(picture, labels)
    if background is None:
        return Reading(background=None, objects=(), relation=None)
    ground = np.median(picture[_border() & (labels == background)], axis=0)
    distance = np.linalg.norm(picture - ground, axis=-1)
    foreground = (labels != background) & (distance > MIN_FOREGROUND_DISTANCE)
    patches = _patches(foreground)
    threshold = SIZE_THRESHOLD[min(max(len(patches), 1), max(SIZE_THRESHOLD))]
    objects = [_read_object(picture, patch, ground, threshold) for patch in patches]
    relation = None
    if len(objects) == 2:
        relation = _relation(objects[0], objects[1])
        if relation not in ("above", "left of"):
            objects.reverse()
            relation = _relation(objects[0], objects[1])
    return Reading(background=_NAMES[background], objects=tuple(objects), relation=relation)


def _to_read_resolution(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(
            f"a picture must be [H, W, 3] uint8, got {pixels.shape} {pixels.dtype}; "
            "scale to 0..255 and put the channels last"
        )
    if pixels.shape[:2] != (READ_RESOLUTION, READ_RESOLUTION):
        side = (READ_RESOLUTION, READ_RESOLUTION)
        pixels = np.asarray(Image.fromarray(pixels).resize(side, Image.Resampling.BOX))
    return pixels.astype(np.float32)


def _nearest_colour(picture: np.ndarray) -> np.ndarray:
    """Return the index of the nearest palette colour per pixel, -1 where none is near."""
    distance = np.linalg.norm(picture[..., None, :] - _PALETTE, axis=-1)
    nearest = distance.argmin(axis=-1)
    nearest[distance.min(axis=-1) > MAX_COLOUR_DISTANCE] = -1
    return nearest


def _border() -> np.ndarray:
    border = np.ones((READ_RESOLUTION, READ_RESOLUTION), dtype=bool)
    border[2:-2, 2:-2] = False
    return border


def _read_background(picture: np.ndarray, labels: np.ndarray) -> int | None:
    on_border = labels[_border()]
    counts = np.bincount(on_border[on_border >= 0], minlength=len(_NAMES))
    if counts.max() < MIN_BORDER_FRAC * on_border.size:
        return None
    return int(counts.argmax())


def _patches(mask: np.ndarray) -> list[np.ndarray]:
    """Return the connected patches that are large enough to be objects, largest first."""
    patches = _components(_erode(mask))
    patches = [_dilate(patch) & mask for patch in patches]
    patches.sort(key=lambda patch: -int(patch.sum()))
    if not patches:
        return []
    least = max(MIN_AREA_FRAC * mask.size, MIN_AREA_OF_LARGEST * patches[0].sum())
    return [patch for patch in patches if patch.sum() >= least]


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """Split a mask into its 4-connected components by flooding each from a seed."""
    left = mask.copy()
    components = []
    while left.any():
        seed = np.zeros_like(mask)
        seed.flat[left.argmax()] = True
        while True:
            grown = _dilate(seed) & left
            if grown.sum() == seed.sum():
                break
            seed = grown
        components.append(seed)
        left &= ~seed
    return components


def _dilate(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    return mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]


def _erode(mask: np.ndarray) -> np.ndarray:
    return ~_dilate(~mask)


def _read_object(
    picture: np.ndarray, patch: np.ndarray, ground: np.ndarray, size_threshold: float
) -> ReadObject:
    interior = patch
    for _ in range(2):
        interior = _erode(interior) if _erode(interior).sum() >= 12 else interior
    colour = np.median(picture[interior], axis=0)
    alpha = _alpha(picture, _dilate(_dilate(patch)), ground, colour)
    area = float(alpha.sum()) / alpha.size
    centres = (np.arange(READ_RESOLUTION) + 0.5) / READ_RESOLUTION
    x = float((alpha.sum(axis=0) * centres).sum() / alpha.sum())
    y = float((alpha.sum(axis=1) * centres).sum() / alpha.sum())
    shape, overlap = _best_shape(alpha, area, x, y)
    width = np.sqrt(area / AREA_OF_UNIT_WIDTH[shape])
    distance = np.linalg.norm(colour - _PALETTE, axis=-1)
    return ReadObject(
        size="large" if width > size_threshold else "small",
        colour=_NAMES[distance.argmin()] if distance.min() <= MAX_COLOUR_DISTANCE else None,
        shape=shape if overlap >= MIN_OVERLAP else None,
        x=x,
        y=y,
    )


def _alpha(
    picture: np.ndarray, region: np.ndarray, ground: np.ndarray, colour: np.ndarray
) -> np.ndarray:
    """Return how much of each pixel is the object: its place between the two colours."""
    axis = colour - ground
    share = ((picture - ground) @ axis) / max(float(axis @ axis), 1.0)
    return np.where(region, np.clip(share, 0.0, 1.0), 0.0)


def _best_shape(alpha: np.ndarray, area: float, x: float, y: float) -> tuple[str, float]:
    """Return the shape whose outline, at this centroid and area, overlaps best, and how well."""
    overlaps = {}
    for shape in SHAPES:
        width = np.sqrt(area / AREA_OF_UNIT_WIDTH[shape])
        box = Placement(x=x, y=y - CENTROID_BELOW_CENTRE[shape] * width, width=width)
        ideal = coverage(shape, box, READ_RESOLUTION)
        overlaps[shape] = float(np.minimum(alpha, ideal).sum() / np.maximum(alpha, ideal).sum())
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best, overlaps[best]


def _relation(first: ReadObject, second: ReadObject) -> str:
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dy) > abs(dx):
        return "above" if dy > 0 else "below"
    return "left of" if dx > 0 else "right of"


def score(captions: Sequence[str], images: Sequence[np.ndarray]) -> SceneAccuracy:
    """Score pictures against the captions they were made from.

    Args:
        captions: One caption of the grammar per picture.
        images: Pictures, each [H, W, 3] uint8.

    Returns:
        The fractions right; `chance` holds those against shuffled captions.
    """
    if len(captions) != len(images) or not captions:
        raise ValueError(
            f"one caption per picture is needed, got {len(captions)} captions "
            f"and {len(images)} pictures"
        )
    wanted = [parse_caption(caption).canonical() for caption in captions]
    readings = [read_scene(np.asarray(image)) for image in images]
    marks = np.array([_marks(*pair) for pair in zip(wanted, readings, strict=True)])
    chance = None
    if len(wanted) > 1:
        rng = np.random.default_rng(0)
        order = rng.permutation(len(wanted))
        turns = rng.integers(1, len(wanted), size=CHANCE_SHUFFLES)
        # Turned along one shuffled circle, no picture ever meets its own caption.
        shuffled = [
            _marks(wanted[order[(i + turn) % len(order)]], readings[order[i]])
            for turn in turns
            for i in range(len(order))
        ]
        chance = _accuracy(np.array(shuffled), len(wanted), None)
    return _accuracy(marks, len(wanted), chance)


def _accuracy(marks: np.ndarray, num_images: int, chance: SceneAccuracy | None) -> SceneAccuracy:
    with_relation = marks[~np.isnan(marks[:, 4]), 4]
    return SceneAccuracy(
        num_images=num_images,
        background=float(marks[:, 0].mean()),
        colour=float(marks[:, 1].mean()),
        shape=float(marks[:, 2].mean()),
        size=float(marks[:, 3].mean()),
        relation=float(with_relation.mean()) if with_relation.size else None,
        all_right=float((np.nan_to_num(marks, nan=1.0) == 1.0).all(axis=1).mean()),
        chance=chance,
    )


def _marks(wanted: Scene, reading: Reading) -> tuple[float, float, float, float, float]:
    """Return 1 or 0 for background, colour, shape, size, relation; relation is NaN for one object.

    The objects read are paired with those wanted in the way that suits the picture best, so
    that two right objects in the wrong order cost the relation and nothing else.
    """
    background = float(reading.background == wanted.background)
    num_objects = len(wanted.objects)
    relation = float("nan") if wanted.relation is None else 0.0
    if len(reading.objects) != num_objects:
        return background, 0.0, 0.0, 0.0, relation
    best = (-1, 0.0, 0.0, 0.0, relation)
    for order in itertools.permutations(range(num_objects)):
        pairs = [(item, reading.objects[i]) for item, i in zip(wanted.objects, order, strict=True)]
        equal = [
            (item.colour == read.colour, item.shape == read.shape, item.size == read.size)
            for item, read in pairs
        ]
        right = sum(map(sum, equal))
        if right <= best[0]:
            continue
        colour, shape, size = (float(all(column)) for column in zip(*equal, strict=True))
        if wanted.relation is not None:
            relation = float(_relation(pairs[0][1], pairs[1][1]) == wanted.relation)
        best = (right, colour, shape, size, relation)
    return (background, *best[1:])
