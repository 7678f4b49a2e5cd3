"""The scene reader: exact on true pictures, and not fooled by wrong, broken or empty ones."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from examples.grammar import COLOURS, SHAPES, SIZES, all_scenes, caption_of, parse_caption
from examples.grammar import sample_scene as draw_scene
from examples.render import draw, place, render
from examples.scene_reader import read_scene, score
from examples.scenes import JPEG_OPTIONS


def pictures_of(grammar: str, count: int, seed: int, resolution: int = 64):
    rng = np.random.default_rng(seed)
    scenes = [draw_scene(grammar, "train", rng) for _ in range(count)]
    return scenes, [np.asarray(render(scene, rng, resolution)) for scene in scenes]


def misread(scenes, pictures):
    return [
        (caption_of(scene), read_scene(picture))
        for scene, picture in zip(scenes, pictures, strict=True)
        if read_scene(picture).scene() != scene.canonical()
    ]


def test_every_single_scene_is_read_exactly():
    scenes = list(all_scenes("single"))
    rng = np.random.default_rng(0)
    assert not misread(scenes, [np.asarray(render(scene, rng)) for scene in scenes])


@pytest.mark.parametrize("resolution", [64, 96, 256, 512])
def test_pairs_are_read_exactly_at_any_resolution(resolution):
    count = 300 if resolution == 64 else 40
    assert not misread(*pictures_of("pairs", count, 1, resolution))


def test_what_the_shards_hold_is_read_exactly():
    scenes, pictures = pictures_of("mixed", 200, 2)
    decoded = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, **JPEG_OPTIONS)
        decoded.append(np.asarray(Image.open(buffer)))
    assert not misread(scenes, decoded)


def test_blur_noise_and_shifted_colours_do_not_disturb():
    scenes, pictures = pictures_of("mixed", 200, 3)
    rng = np.random.default_rng(3)
    spoilt = []
    for picture in pictures:
        blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1.0)), float)
        blurred += rng.normal(0, 10, size=blurred.shape) + rng.normal(0, 10, size=3)
        spoilt.append(np.rint(blurred.clip(0, 255)).astype(np.uint8))
    assert len(misread(scenes, spoilt)) <= 4


def test_specks_are_no_objects():
    scenes, pictures = pictures_of("single", 50, 4)
    specked = [picture.copy() for picture in pictures]
    for picture in specked:
        picture[0:4, 0:4] = 255 - picture[0:4, 0:4]
    assert not misread(scenes, specked)


CHANGES = {
    "background": [{"background": colour} for colour in COLOURS],
    "colour": [{"colour": colour} for colour in COLOURS],
    "shape": [{"shape": shape} for shape in SHAPES],
    "size": [{"size": size} for size in SIZES],
}


def altered(scene, name, change):
    """Return the scene with one thing changed, or None where that is no scene."""
    try:
        if name == "background":
            return replace(scene, **change)
        objects = (replace(scene.objects[0], **change), *scene.objects[1:])
        return replace(scene, objects=objects)
    except ValueError:
        return None


@pytest.mark.parametrize("grammar", ["single", "pairs"])
@pytest.mark.parametrize("name", list(CHANGES))
def test_a_wrong_picture_is_marked_wrong_in_that_and_nothing_else(grammar, name):
    rng = np.random.default_rng(5)
    captions, pictures = [], []
    for _ in range(25):
        scene = draw_scene(grammar, "train", rng)
        for change in CHANGES[name]:
            wrong = altered(scene, name, change)
            if wrong is not None and wrong.canonical() != scene.canonical():
                captions.append(caption_of(scene))
                pictures.append(np.asarray(render(wrong, rng)))
    accuracy = score(captions, pictures)
    assert accuracy.all_right == 0
    assert getattr(accuracy, name) == 0
    for other in set(CHANGES) - {name}:
        # Two objects can be paired either way where the change makes both ways equally wrong.
        assert getattr(accuracy, other) >= (1.0 if grammar == "single" else 0.9), other


def test_a_turned_relation_costs_the_relation_alone():
    rng = np.random.default_rng(6)
    captions, pictures = [], []
    for _ in range(60):
        scene = draw_scene("pairs", "train", rng)
        boxes = place(scene, rng)
        mirrored = tuple(replace(box, x=1 - box.x, y=1 - box.y) for box in boxes)
        captions.append(caption_of(scene))
        pictures.append(draw(scene, mirrored, 64))
    accuracy = score(captions, pictures)
    assert (accuracy.relation, accuracy.all_right) == (0, 0)
    assert (accuracy.colour, accuracy.shape, accuracy.size) == (1, 1, 1)


def test_exchanged_colours_are_marked_wrong():
    caption = "a large red circle above a small blue square on a yellow background"
    wrong = parse_caption(
        caption.replace("red", "tmp").replace("blue", "red").replace("tmp", "blue")
    )
    assert score([caption], [np.asarray(render(wrong, np.random.default_rng(7)))]).all_right == 0


def test_one_object_instead_of_two_is_marked_wrong_and_so_is_one_too_many():
    pair = "a large red circle above a small blue square on a yellow background"
    one = "a large red circle on a yellow background"
    rng = np.random.default_rng(8)
    for asked, shown in ((pair, one), (one, pair)):
        accuracy = score([asked], [np.asarray(render(parse_caption(shown), rng))])
        assert (accuracy.background, accuracy.colour, accuracy.all_right) == (1, 0, 0)


@pytest.mark.parametrize(
    "picture",
    [
        np.full((64, 64, 3), 245, np.uint8),
        np.zeros((64, 64, 3), np.uint8),
        np.random.default_rng(9).integers(0, 256, (64, 64, 3), dtype=np.uint8),
        np.full((64, 64, 3), 128, np.uint8),
    ],
    ids=["white", "black", "noise", "grey"],
)
def test_empty_and_meaningless_pictures_are_unreadable_and_never_right(picture):
    assert read_scene(picture).scene() is None
    captions = [caption_of(scene) for scene in list(all_scenes("single"))[::24]]
    assert score(captions, [picture] * len(captions)).all_right == 0


def test_random_blobs_never_crash_the_reader():
    rng = np.random.default_rng(10)
    for scale in (2, 4, 8, 16, 32):
        small = rng.integers(0, 256, (20, scale, scale, 3), dtype=np.uint8)
        for picture in small:
            resized = Image.fromarray(picture).resize((64, 64), Image.Resampling.BICUBIC)
            read_scene(np.asarray(resized)).scene()


def test_a_reading_of_true_pictures_is_all_right_and_chance_is_low():
    scenes, pictures = pictures_of("mixed", 120, 11)
    accuracy = score([caption_of(scene) for scene in scenes], pictures)
    assert accuracy.all_right == accuracy.relation == accuracy.shape == 1.0
    assert accuracy.chance.all_right < 0.03
    assert accuracy.chance.background < 0.3


def test_single_scenes_have_no_relation_to_score():
    scenes, pictures = pictures_of("single", 3, 12)
    assert score([caption_of(scene) for scene in scenes], pictures).relation is None


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((64, 64, 3), np.float32), "uint8"),
        (np.zeros((3, 64, 64), np.uint8), r"\[H, W, 3\]"),
        (np.zeros((64, 64), np.uint8), r"\[H, W, 3\]"),
    ],
)
def test_other_arrays_are_refused(picture, message):
    with pytest.raises(ValueError, match=message):
        read_scene(picture)


def test_counts_must_agree():
    with pytest.raises(ValueError, match="one caption per picture"):
        score(["a large red circle on a yellow background"], [])
