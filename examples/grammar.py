"""Scenes in words: what a picture may show, the exact caption for it, and the way back.

A scene is one object, or two and the relation between them, on a background of one colour. The
caption says everything the picture holds, and nothing else, so text alignment can be measured:

    a large red circle on a yellow background
    a large red circle above a small blue square on a yellow background

Combinations, not pictures, are held out: a caption of the held-out split never occurs in
training, under any seed, and neither does the same content told from the other object's side.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 40),
    "orange": (245, 126, 14),
    "yellow": (250, 218, 48),
    "green": (36, 150, 66),
    "blue": (36, 84, 214),
    "purple": (136, 40, 178),
    "white": (245, 245, 245),
    "black": (22, 22, 26),
}
SHAPES = ("circle", "square", "triangle")
SIZES = ("small", "large")
OPPOSITES = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
RELATIONS = tuple(OPPOSITES)
CANONICAL_RELATIONS = ("above", "left of")
GRAMMARS = ("single", "pairs", "mixed")
HELD_OUT_FRAC = 0.15

Grammar = Literal["single", "pairs", "mixed"]
Split = Literal["train", "held_out"]

SPLITS: tuple[Split, ...] = ("train", "held_out")

_OBJECT = rf"an? ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(
    rf"{_OBJECT}(?: ({'|'.join(RELATIONS)}) {_OBJECT})? on an? ({'|'.join(COLOURS)}) background"
)


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One flat shape."""

    size: str
    colour: str
    shape: str


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a picture shows: one object, or two of which the first stands `relation` the second."""

    objects: tuple[SceneObject, ...]
    background: str
    relation: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn or told apart."""
        if len(self.objects) not in (1, 2):
            raise ValueError(f"a scene has one object or two, got {len(self.objects)}")
        if (self.relation is None) != (len(self.objects) == 1):
            raise ValueError("two objects need a relation, and one object has none")
        if self.relation is not None and self.relation not in RELATIONS:
            raise ValueError(f"relation {self.relation!r} is none of {', '.join(RELATIONS)}")
        if self.background not in COLOURS:
            raise ValueError(f"background {self.background!r} is none of {', '.join(COLOURS)}")
        for item in self.objects:
            _check_object(item, self.background)
        if len(set(self.objects)) != len(self.objects):
            raise ValueError("two objects that are alike make the relation unreadable")

    def canonical(self) -> Scene:
        """Return the same content told as `above` or `left of`."""
        if self.relation is None or self.relation in CANONICAL_RELATIONS:
            return self
        return Scene(
            objects=self.objects[::-1],
            relation=OPPOSITES[self.relation],
            background=self.background,
        )


def _check_object(item: SceneObject, background: str) -> None:
    if item.size not in SIZES or item.colour not in COLOURS or item.shape not in SHAPES:
        raise ValueError(f"{item} is outside the grammar")
    if item.colour == background:
        raise ValueError(f"a {item.colour} {item.shape} cannot be seen on its own colour")


def caption_of(scene: Scene) -> str:
    """Say what the scene shows, exactly."""
    text = _say_object(scene.objects[0])
    if scene.relation is not None:
        text += f" {scene.relation} {_say_object(scene.objects[1])}"
    article = "an" if scene.background[0] in "aeiou" else "a"
    return f"{text} on {article} {scene.background} background"


def _say_object(item: SceneObject) -> str:
    return f"a {item.size} {item.colour} {item.shape}"


def parse_caption(text: str) -> Scene:
    """Read a caption back; the inverse of `caption_of`.

    Raises:
        ValueError: The text is not a caption of this grammar.
    """
    match = _CAPTION.fullmatch(" ".join(text.lower().split()))
    if match is None:
        raise ValueError(
            f"caption {text!r} is not of the form 'a large red circle [above a small blue square] "
            "on a yellow background'"
        )
    size, colour, shape, relation, size2, colour2, shape2, background = match.groups()
    objects: tuple[SceneObject, ...] = (SceneObject(size=size, colour=colour, shape=shape),)
    if relation is not None:
        objects += (SceneObject(size=size2, colour=colour2, shape=shape2),)
    return Scene(objects=objects, relation=relation, background=background)


def words() -> tuple[str, ...]:
    """Return every word that a caption can hold, each once."""
    relation_words = dict.fromkeys(itertools.chain.from_iterable(r.split() for r in RELATIONS))
    return ("a", "an", "on", "background", *SIZES, *COLOURS, *SHAPES, *relation_words)


def all_scenes(grammar: Literal["single", "pairs"]) -> Iterator[Scene]:
    """Yield every scene of the grammar: 336, or 55,104 for pairs."""
    for background in COLOURS:
        items = [
            SceneObject(size=size, colour=colour, shape=shape)
            for size, colour, shape in itertools.product(SIZES, COLOURS, SHAPES)
            if colour != background
        ]
        if grammar == "single":
            yield from (Scene(objects=(item,), background=background) for item in items)
            continue
        for pair in itertools.permutations(items, 2):
            for relation in RELATIONS:
                yield Scene(objects=pair, relation=relation, background=background)


def split_of(scene: Scene) -> Split:
    """Tell the side a combination is on: a stable hash of its content, independent of any seed."""
    digest = hashlib.sha256(caption_of(scene.canonical()).encode()).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") < HELD_OUT_FRAC * 2**64 else "train"


def sample_scene(grammar: Grammar, split: Split, rng: np.random.Generator) -> Scene:
    """Draw one scene of the given grammar and split, evenly over its combinations."""
    if grammar == "mixed":
        grammar = "pairs" if rng.random() < 0.5 else "single"
    while True:
        scene = _draw_scene(2 if grammar == "pairs" else 1, rng)
        if scene is not None and split_of(scene) == split:
            return scene


def _draw_scene(num_objects: int, rng: np.random.Generator) -> Scene | None:
    """Draw a scene, or None where the draw is outside the grammar."""
    names = tuple(COLOURS)
    background, *colours = (names[i] for i in rng.integers(len(names), size=1 + num_objects))
    objects = tuple(
        SceneObject(
            size=SIZES[rng.integers(len(SIZES))],
            colour=colour,
            shape=SHAPES[rng.integers(len(SHAPES))],
        )
        for colour in colours
    )
    relation = RELATIONS[rng.integers(len(RELATIONS))] if num_objects == 2 else None
    if background in colours or len(set(objects)) != num_objects:
        return None
    return Scene(objects=objects, relation=relation, background=background)
