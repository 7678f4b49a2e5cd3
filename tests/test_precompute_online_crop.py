"""The squares of an online run: stage 1's own, or placed and mirrored at random."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import image_bytes, smooth_image
from PIL import Image

from precompute.online_crop import Cut, SquareCutter
from precompute.pixels import UnusableImageError
from precompute.transform import cut_crop
from shards.column import ImageColumn
from shards.flip import draw_flips

COLUMN = ImageColumn(
    weights_sha256="",
    encoder_config={},
    compute_dtype="float32",
    storage_dtype="float16",
    resolution=32,
    latent_channels=4,
    latent_size=4,
    scaling_factor=1.0,
    transform={},
)
ENDS = {"first": 0.0, "last": 1 - 2**-53}


def cutter(**settings: object) -> SquareCutter:
    defaults = {"random_crop": True, "flip_prob": 0.5, "seed": 1, "global_batch_size": 8}
    return SquareCutter(column=COLUMN, **(defaults | settings))  # type: ignore[arg-type]


def picture(width: int, height: int) -> Image.Image:
    return smooth_image(np.random.default_rng(0), width, height)


def ramp(width: int, height: int) -> bytes:
    """Red grows along the longer side."""
    line = np.linspace(0, 255, max(width, height)).astype(np.uint8)
    rows = np.broadcast_to(line, (min(width, height), len(line)))
    red = rows if width >= height else rows.T
    return image_bytes(Image.fromarray(np.stack([red, 0 * red, 0 * red], axis=-1)), "PNG")


@pytest.mark.parametrize("size", [(32, 32), (80, 33), (41, 100), (64, 48)])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_the_centre_is_where_stage_one_cuts(size, file_format):
    data = image_bytes(picture(*size), file_format)
    square = cutter().cut(data, Cut())
    np.testing.assert_array_equal(square, cut_crop(data, COLUMN))
    np.testing.assert_array_equal(cutter().cut(data, Cut(mirrored=True)), square[:, ::-1])


@pytest.mark.parametrize("size", [(70, 32), (32, 70)])
def test_a_place_is_one_along_the_longer_side(size):
    image = picture(*size)  # at its resolution already: what is cut is what is there
    pixels, data = np.asarray(image), image_bytes(image, "PNG")
    for place, first in ((0.0, 0), (0.5, 19), (ENDS["last"], 38)):
        rows, columns = (slice(first, first + 32), slice(None))[:: 1 if size[1] == 70 else -1]
        square = cutter().cut(data, Cut(place))
        np.testing.assert_array_equal(square, pixels[rows, columns])
        np.testing.assert_array_equal(cutter().cut(data, Cut(place, True)), square[:, ::-1])


@pytest.mark.parametrize("size", [(300, 90), (90, 300)])
def test_places_reach_from_one_end_to_the_other_of_a_larger_image(size):
    first, last = (cutter().cut(ramp(*size), Cut(place))[..., 0] for place in ENDS.values())
    assert first.min() < 3
    assert last.max() > 252
    assert first.max() < last.min()


def test_a_square_image_leaves_no_choice():
    data = image_bytes(picture(40, 40), "PNG")
    for place in ENDS.values():
        np.testing.assert_array_equal(cutter().cut(data, Cut(place)), cut_crop(data, COLUMN))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no image", "not_an_image"),
        (ramp(31, 99), "too_small"),
        (ramp(32 * 21, 32), "absurd_aspect_ratio"),
        (image_bytes(picture(64, 64), "PNG")[:2000], "broken_image"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("cut", [Cut(), Cut(0.3)])
def test_what_cannot_be_cut_has_a_reason(data, reason, cut):
    with pytest.raises(UnusableImageError, match=reason):
        cutter().cut(data, cut)


def test_draws_depend_on_seed_step_and_position_alone():
    whole = cutter().draw(5, range(8))
    parts = [cutter().draw(5, range(first, first + 2)) for first in range(0, 8, 2)]
    assert [cut for part in parts for cut in part] == whole
    assert cutter().draw(6, range(8)) != whole
    assert cutter(seed=2).draw(5, range(8)) != whole
    assert len({cut.place for cut in whole}) == 8


def test_one_feature_does_not_move_the_other():
    both = cutter().draw(3, range(8))
    places, flips = cutter(flip_prob=0).draw(3, range(8)), cutter(random_crop=False)
    assert [cut.place for cut in places] == [cut.place for cut in both]
    assert not any(cut.mirrored for cut in places)
    assert [cut.mirrored for cut in flips.draw(3, range(8))] == [cut.mirrored for cut in both]
    assert all(cut.place is None for cut in flips.draw(3, range(8)))


def test_coins_are_those_of_stored_mirrored_latents():
    large = cutter(global_batch_size=64, flip_prob=0.3)
    coins = [cut.mirrored for cut in large.draw(9, range(16, 48))]
    np.testing.assert_array_equal(coins, draw_flips(1, 9, range(16, 48), 64, 0.3))


def test_places_are_uniform_and_coins_fair():
    many = cutter(global_batch_size=4096, flip_prob=0.25).draw(0, range(4096))
    places = np.array([cut.place for cut in many])
    assert (np.histogram(places, 8, (0, 1))[0] > 430).all()  # of 512
    assert abs(np.mean([cut.mirrored for cut in many]) - 0.25) < 0.03
    correlation = np.corrcoef(places, [cut.mirrored for cut in many])[0, 1]
    assert abs(correlation) < 0.05
