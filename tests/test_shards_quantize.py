"""Eight bits a number: never off by more than half a step, whatever the numbers are."""

import itertools

import numpy as np
import pytest

from shards.quantize import (
    Quantized,
    channel_scale,
    latents_of,
    quantize_latents,
    quantize_states,
    states_of,
)

LARGEST_HALF = 65504.0
SMALLEST_HALF = 2.0**-24
ROUNDING = 1 + 1e-5  # of float32, on top of half a step


def random_latents(*shape: int, seed: int = 0) -> np.ndarray:
    """Like moments: channels of very different size."""
    rng = np.random.default_rng(seed)
    size = np.array([0.01, 1.0, 5.0, 30.0])[:, None, None]
    return (rng.standard_normal(shape) * size).astype(np.float16)


def random_states(*shape: int, seed: int = 0) -> np.ndarray:
    """Like CLIP's: a few channels are tens of times larger than the rest in every token."""
    rng = np.random.default_rng(seed)
    states = rng.standard_normal(shape)
    states[..., 3] *= 40
    states[..., 0, :] *= 20  # the first token
    return states.astype(np.float16)


def exact(stored: Quantized) -> np.ndarray:
    """The numbers once more, in float64."""
    numbers = stored.values.astype(np.float64)
    for scale in stored.scales:
        numbers = numbers * scale.astype(np.float64)
    return numbers


def assert_within_half_a_step(numbers: np.ndarray, stored: Quantized) -> None:
    step = np.ones((), np.float64)
    for scale in stored.scales:
        step = step * scale.astype(np.float64)
    error = np.abs(numbers.astype(np.float64) - exact(stored))
    assert (error <= 0.5 * step * ROUNDING).all(), (error / step).max()


def awkward_latents() -> dict[str, np.ndarray]:
    outlier = random_latents(2, 4, 3, 3)
    outlier[0, 1, 2, 2] = LARGEST_HALF
    extremes = np.full((1, 4, 2, 2), LARGEST_HALF, np.float16)
    extremes[:, ::2] *= -1
    tiny = np.full((1, 4, 2, 2), SMALLEST_HALF, np.float16)
    tiny[0, 0, 0, 0] = 0
    return {
        "random": random_latents(5, 4, 8, 8),
        "one number large": outlier,
        "all extreme": extremes,
        "smallest of all": tiny,
        "zeros": np.zeros((3, 4, 2, 2), np.float16),
        "a single number each": random_latents(3, 4, 1, 1),
        "no rows": np.zeros((0, 4, 2, 2), np.float16),
        "float32": random_latents(2, 4, 3, 3).astype(np.float32) * 1e-30,
    }


@pytest.mark.parametrize("name", awkward_latents())
def test_latents_come_back_within_half_a_step(name):
    latents = awkward_latents()[name]
    values, scale = quantize_latents(latents)
    assert (values.dtype, values.shape) == (np.int8, latents.shape)
    assert (scale.dtype, scale.shape) == (np.float32, latents.shape[:2])
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    assert_within_half_a_step(latents, latents_of(values, scale))


def awkward_states() -> dict[str, np.ndarray]:
    outlier = random_states(2, 5, 8)
    outlier[1, 2] = LARGEST_HALF
    outlier[1, 3, 4] = -LARGEST_HALF
    zeros = random_states(3, 5, 8)
    zeros[1] = 0
    return {
        "random": random_states(6, 5, 8),
        "a huge token and a huge number": outlier,
        "a caption of zeros": zeros,
        "smallest of all": np.full((1, 5, 8), SMALLEST_HALF, np.float16),
        "no captions": np.zeros((0, 5, 8), np.float16),
    }


@pytest.mark.parametrize("name", awkward_states())
def test_states_come_back_within_half_a_step(name):
    states, static = awkward_states()[name], channel_scale(random_states(9, 5, 8, seed=1))
    values, scale = quantize_states(states, static)
    assert (values.dtype, values.shape) == (np.int8, states.shape)
    assert (scale.dtype, scale.shape) == (np.float32, states.shape[:2])
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    assert_within_half_a_step(states, states_of(values, scale, static))


def test_the_error_of_a_channel_does_not_depend_on_its_neighbours():
    """A huge log-variance or a huge token may cost itself its resolution, nobody else."""
    latents = random_latents(2, 4, 3, 3)
    louder = latents.copy()
    louder[0, 1] = LARGEST_HALF
    others = np.ones((2, 4), bool)
    others[0, 1] = False
    for one, other in zip(quantize_latents(latents), quantize_latents(louder), strict=True):
        assert (one[others] == other[others]).all()

    states, static = random_states(2, 5, 8), channel_scale(random_states(9, 5, 8, seed=1))
    louder = states.copy()
    louder[1, 2] = LARGEST_HALF
    others = np.ones((2, 5), bool)
    others[1, 2] = False
    for one, other in zip(
        quantize_states(states, static), quantize_states(louder, static), strict=True
    ):
        assert (one[others] == other[others]).all()


def test_the_largest_of_a_channel_becomes_127_and_never_wraps_around():
    rng = np.random.default_rng(0)
    peaks = np.concatenate(
        [rng.uniform(0, LARGEST_HALF, 3000), rng.uniform(0, 1e-5, 1000), [LARGEST_HALF]]
    ).astype(np.float16)
    latents = np.stack([peaks, -peaks], axis=1)[:, :, None, None]
    values, scale = quantize_latents(latents)
    present = peaks > 0
    assert (values[present, 0] == 127).all()
    assert (values[present, 1] == -127).all()
    assert values.min() == -127  # -128 is left out: the range is symmetric
    assert (np.sign(values.astype(int)) == np.sign(latents)).all()
    wanted = np.where(present, peaks.astype(np.float32), 127)
    np.testing.assert_allclose(scale[:, 0] * 127, wanted, rtol=1e-6)


def test_zeros_stay_zeros():
    values, scale = quantize_latents(np.zeros((2, 4, 3, 3), np.float16))
    assert not values.any()
    assert not latents_of(values, scale).dequantize().any()
    static = channel_scale(np.zeros((4, 5, 8), np.float16))
    assert (static == 1).all()
    values, scale = quantize_states(np.zeros((2, 5, 8), np.float16), static)
    assert not states_of(values, scale, static).dequantize().any()


def test_the_result_is_the_same_from_float16_and_float32_and_leaves_its_input_alone():
    latents, states = random_latents(3, 4, 5, 5), random_states(3, 5, 8)
    static, before = channel_scale(states), (latents.copy(), states.copy())
    for one, other in [
        (quantize_latents(latents), quantize_latents(latents.astype(np.float32))),
        (quantize_states(states, static), quantize_states(states.astype(np.float32), static)),
    ]:
        for first, second in zip(one, other, strict=True):
            np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(latents, before[0])
    np.testing.assert_array_equal(states, before[1])


def test_a_row_does_not_depend_on_its_company():
    latents, states = random_latents(6, 4, 3, 3), random_states(6, 5, 8)
    static = channel_scale(states)
    for row in range(6):
        one = slice(row, row + 1)
        for alone, among in [
            (quantize_latents(latents[one]), quantize_latents(latents)),
            (quantize_states(states[one], static), quantize_states(states, static)),
        ]:
            for first, second in zip(alone, among, strict=True):
                np.testing.assert_array_equal(first, second[one])


def test_dequantize_is_the_product_of_integers_and_all_scales():
    latents, states = random_latents(3, 4, 5, 5), random_states(3, 7, 8)
    static = channel_scale(states)
    for stored in (
        latents_of(*quantize_latents(latents)),
        states_of(*quantize_states(states, static), static),
    ):
        numbers = stored.dequantize()
        assert numbers.dtype == np.float32
        np.testing.assert_allclose(numbers, exact(stored), rtol=3e-7)

    values, scale = quantize_states(states, static)
    numbers = states_of(values, scale, static).dequantize()
    for caption, token, channel in itertools.product(range(3), range(7), range(8)):
        factor = float(scale[caption, token]) * float(static[channel])
        wanted = int(values[caption, token, channel]) * factor
        assert numbers[caption, token, channel] == pytest.approx(wanted, rel=3e-7)


def test_dequantize_can_be_called_again_with_the_same_result():
    stored = latents_of(*quantize_latents(random_latents(2, 4, 3, 3)))
    before = stored.values.copy()
    first = stored.dequantize()
    first[:] = 0
    assert stored.dequantize().any()
    np.testing.assert_array_equal(stored.values, before)


def test_the_channel_scale_is_the_largest_over_captions_and_all_tokens_but_the_first():
    states = random_states(4, 5, 8)
    static = channel_scale(states)
    assert (static.dtype, static.shape) == (np.float32, (8,))
    np.testing.assert_array_equal(static, np.abs(states[:, 1:]).max(axis=(0, 1)))
    louder = states.copy()
    louder[:, 0] = LARGEST_HALF
    np.testing.assert_array_equal(channel_scale(louder), static)
    louder[2, 4, 5] = -LARGEST_HALF
    assert channel_scale(louder)[5] == LARGEST_HALF
    np.testing.assert_array_equal(channel_scale(states[0]), np.abs(states[0, 1:]).max(axis=0))


def test_a_channel_scale_of_silent_channels_is_usable():
    calibration = random_states(4, 5, 8)
    calibration[..., 2] = 0
    static = channel_scale(calibration)
    assert static[2] == 1
    states = random_states(3, 5, 8, seed=2)
    values, scale = quantize_states(states, static)
    assert_within_half_a_step(states, states_of(values, scale, static))


def test_static_scales_spare_the_channels_beside_a_loud_one():
    """What the second scale is for: with one scale a token, 40:1 would cost all others a digit."""
    states = random_states(64, 77, 32)[:, 1:]
    ones = np.ones(32, np.float32)
    static = channel_scale(states)
    quiet = np.arange(32) != 3

    def error(factors: np.ndarray) -> float:
        numbers = states_of(*quantize_states(states, factors), factors).dequantize()
        wrong = (numbers - states.astype(np.float32))[..., quiet]
        return float(np.sqrt(np.square(wrong).mean() / np.square(states[..., quiet] * 1.0).mean()))

    assert error(static) < 0.02
    assert error(ones) > 5 * error(static)
