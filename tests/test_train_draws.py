from typing import Any

import pytest
import torch

from shards.order import positions_of_rank
from train.draws import Draws, draw

GLOBAL_BATCH = 24
PARTS = ("posterior_noise", "noise", "timesteps", "drop_caption")


def draws_of(**changes: Any) -> Draws:
    settings: dict[str, Any] = {
        "seed": 0,
        "step": 0,
        "positions": range(GLOBAL_BATCH),
        "global_batch_size": GLOBAL_BATCH,
        "latent_shape": (4, 8, 8),
        "num_train_timesteps": 1000,
        "caption_drop_prob": 0.5,
        "device": torch.device("cpu"),
    }
    return draw(**(settings | changes))


def assert_equal(first: Draws, second: Draws, parts: tuple[str, ...] = PARTS) -> None:
    for part in parts:
        assert torch.equal(getattr(first, part), getattr(second, part)), part


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8, 12, 24])
@pytest.mark.parametrize("step", [0, 17])
def test_the_ranks_together_draw_what_one_process_draws(world_size, step):
    alone = draws_of(step=step)
    positions = [
        positions_of_rank(GLOBAL_BATCH, GLOBAL_BATCH, rank, world_size)
        for rank in range(world_size)
    ]
    ranks = [draws_of(step=step, positions=part) for part in positions]
    for name in PARTS:
        assert torch.equal(torch.cat([getattr(rank, name) for rank in ranks]), getattr(alone, name))


def test_equal_arguments_give_equal_draws_in_any_order_of_steps():
    forwards = [draws_of(step=step) for step in range(4)]
    backwards = [draws_of(step=step) for step in reversed(range(4))]
    for first, second in zip(forwards, reversed(backwards), strict=True):
        assert_equal(first, second)


@pytest.mark.parametrize("change", [{"step": 1}, {"seed": 1}, {"seed": 1, "step": 2}])
def test_another_step_or_seed_draws_everything_anew(change):
    one, other = draws_of(), draws_of(**change)
    for name in PARTS:
        assert not torch.equal(getattr(one, name), getattr(other, name)), name


def test_seed_and_step_are_not_interchangeable():
    assert not torch.equal(draws_of(seed=1, step=2).noise, draws_of(seed=2, step=1).noise)
    assert not torch.equal(draws_of(seed=0, step=3).noise, draws_of(seed=3, step=0).noise)


def test_late_steps_and_large_seeds_can_be_drawn():
    far = draws_of(seed=2**63, step=10**9)
    assert_equal(far, draws_of(seed=2**63, step=10**9))
    assert not torch.equal(far.noise, draws_of(seed=2**63, step=10**9 + 1).noise)


def test_the_drop_probability_moves_nothing_else():
    reference = draws_of(caption_drop_prob=0.0)
    for probability in (0.1, 0.9, 1.0):
        changed = draws_of(caption_drop_prob=probability)
        assert_equal(reference, changed, ("posterior_noise", "noise", "timesteps"))


def test_a_higher_drop_probability_drops_more_of_the_same_captions():
    seldom, often = (draws_of(caption_drop_prob=p).drop_caption for p in (0.3, 0.6))
    assert (often | ~seldom).all()
    assert often.sum() > seldom.sum()


@pytest.mark.parametrize(("probability", "dropped"), [(0.0, False), (1.0, True)])
def test_the_extremes_drop_nothing_or_everything(probability, dropped):
    for step in range(50):
        assert (draws_of(step=step, caption_drop_prob=probability).drop_caption == dropped).all()


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_captions_are_dropped_as_often_as_asked_others_in_every_step(probability):
    num_steps, num_rows = 300, 64
    dropped = torch.stack(
        [
            draws_of(
                step=step,
                positions=range(num_rows),
                global_batch_size=num_rows,
                latent_shape=(1, 1, 1),
                caption_drop_prob=probability,
            ).drop_caption
            for step in range(num_steps)
        ]
    ).double()
    deviation = (probability * (1 - probability)) ** 0.5
    assert abs(dropped.mean() - probability) < 4 * deviation / (num_steps * num_rows) ** 0.5
    worst_position = (dropped.mean(dim=0) - probability).abs().max()
    assert worst_position < 4.5 * deviation / num_steps**0.5
    assert len({tuple(row) for row in dropped.tolist()}) > 0.95 * num_steps


def test_noise_is_standard_normal_and_the_two_noises_differ():
    large = draws_of(positions=range(512), global_batch_size=512, latent_shape=(4, 16, 16))
    for noise in (large.noise, large.posterior_noise):
        assert noise.dtype == torch.float32
        assert abs(noise.mean()) < 0.006
        assert abs(noise.std() - 1) < 0.006
    both = torch.stack([large.noise.flatten(), large.posterior_noise.flatten()])
    assert abs(torch.corrcoef(both)[0, 1]) < 0.006


def test_timesteps_cover_the_whole_schedule_evenly():
    timesteps = draws_of(
        positions=range(50_000), global_batch_size=50_000, latent_shape=(1, 1, 1)
    ).timesteps
    counts = torch.bincount(timesteps, minlength=1000).double()
    assert timesteps.dtype == torch.int64
    assert len(counts) == 1000
    assert counts.min() > 0
    chi_square = ((counts - 50) ** 2 / 50).sum()
    assert abs(chi_square - 999) < 5 * (2 * 999) ** 0.5


def test_torchs_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    first = draws_of()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(12345)
    assert_equal(first, draws_of())
