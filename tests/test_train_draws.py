from typing import Any

import pytest
import torch

from shards.order import positions_of_rank
from train.draws import Draws, draw

GLOBAL_BATCH = 24
PARTS = ("posterior_noise", "noise", "timesteps", "drop_caption")
SAMPLINGS = ["uniform", "sobol", "logit-normal"]


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
@pytest.mark.parametrize("timestep_sampling", SAMPLINGS)
def test_the_ranks_together_draw_what_one_process_draws(world_size, step, timestep_sampling):
    settings = {"step": step, "timestep_sampling": timestep_sampling, "offset_noise": 0.1}
    alone = draws_of(**settings)
    positions = [
        positions_of_rank(GLOBAL_BATCH, GLOBAL_BATCH, rank, world_size)
        for rank in range(world_size)
    ]
    ranks = [draws_of(positions=part, **settings) for part in positions]
    for name in PARTS:
        assert torch.equal(torch.cat([getattr(rank, name) for rank in ranks]), getattr(alone, name))


@pytest.mark.parametrize("timestep_sampling", SAMPLINGS)
def test_equal_arguments_give_equal_draws_in_any_order_of_steps(timestep_sampling):
    settings = {"timestep_sampling": timestep_sampling, "offset_noise": 0.1}
    forwards = [draws_of(step=step, **settings) for step in range(4)]
    backwards = [draws_of(step=step, **settings) for step in reversed(range(4))]
    for first, second in zip(forwards, reversed(backwards), strict=True):
        assert_equal(first, second)


@pytest.mark.parametrize("change", [{"step": 1}, {"seed": 1}, {"seed": 1, "step": 2}])
@pytest.mark.parametrize("timestep_sampling", SAMPLINGS)
def test_another_step_or_seed_draws_everything_anew(change, timestep_sampling):
    one, other = (
        draws_of(timestep_sampling=timestep_sampling, **changed) for changed in ({}, change)
    )
    for name in PARTS:
        assert not torch.equal(getattr(one, name), getattr(other, name)), name


def test_seed_and_step_are_not_interchangeable():
    assert not torch.equal(draws_of(seed=1, step=2).noise, draws_of(seed=2, step=1).noise)
    assert not torch.equal(draws_of(seed=0, step=3).noise, draws_of(seed=3, step=0).noise)


@pytest.mark.parametrize("timestep_sampling", SAMPLINGS)
def test_late_steps_and_large_seeds_can_be_drawn(timestep_sampling):
    settings = {"seed": 2**63, "timestep_sampling": timestep_sampling}
    far = draws_of(step=10**9, **settings)
    assert ((far.timesteps >= 0) & (far.timesteps < 1000)).all()
    assert_equal(far, draws_of(step=10**9, **settings))
    next_one = draws_of(step=10**9 + 1, **settings)
    for name in PARTS:
        assert not torch.equal(getattr(far, name), getattr(next_one, name)), name


def test_the_draws_of_older_runs_have_not_moved():
    """A run that is resumed goes on with the numbers that it was started with."""
    first = draws_of(positions=range(2, 6), global_batch_size=8)
    assert first.posterior_noise.flatten()[[0, 100, -1]].tolist() == pytest.approx(
        [0.3062984, -1.1906475, -1.1800061], rel=1e-5
    )
    assert first.noise.flatten()[[0, 100, -1]].tolist() == pytest.approx(
        [-0.4135989, 1.8914863, -0.1331252], rel=1e-5
    )
    assert first.noise.double().square().sum().item() == pytest.approx(1050.0845413, rel=1e-6)
    assert first.timesteps.tolist() == [650, 710, 814, 466]
    assert first.drop_caption.tolist() == [False, True, True, True]
    later = draws_of(seed=7, step=123456, positions=range(2, 6), global_batch_size=8)
    assert later.posterior_noise.double().sum().item() == pytest.approx(17.1237594, rel=1e-5)
    assert later.noise.double().square().sum().item() == pytest.approx(1006.3718238, rel=1e-6)
    assert later.timesteps.tolist() == [46, 463, 538, 277]
    assert later.drop_caption.tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("timestep_sampling", "early", "late"),
    [
        ("sobol", [374, 124, 749, 624], [905, 280, 655, 405]),
        ("logit-normal", [780, 906, 307, 214], [464, 454, 335, 763]),
    ],
)
def test_the_timesteps_of_other_samplings_have_not_moved(timestep_sampling, early, late):
    settings = {"timestep_sampling": timestep_sampling, "global_batch_size": 8}
    for seed, step, timesteps in ((0, 0, early), (7, 123456, late)):
        draws = draws_of(seed=seed, step=step, positions=range(2, 6), **settings)
        assert draws.timesteps.tolist() == timesteps


@pytest.mark.parametrize("timestep_sampling", SAMPLINGS)
def test_the_choice_of_timesteps_moves_nothing_else(timestep_sampling):
    changed = draws_of(timestep_sampling=timestep_sampling, offset_noise=0.1)
    reference = draws_of(offset_noise=0.1)
    assert_equal(reference, changed, ("posterior_noise", "noise", "drop_caption"))
    moved = not torch.equal(reference.timesteps, changed.timesteps)
    assert moved == (timestep_sampling != "uniform")


@pytest.mark.parametrize("timestep_sampling", SAMPLINGS)
def test_offset_noise_moves_nothing_else(timestep_sampling):
    reference, changed = (
        draws_of(timestep_sampling=timestep_sampling, offset_noise=amount) for amount in (0.0, 0.3)
    )
    assert_equal(reference, changed, ("posterior_noise", "timesteps", "drop_caption"))
    assert not torch.equal(reference.noise, changed.noise)


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


@pytest.mark.parametrize("timestep_sampling", SAMPLINGS)
def test_torchs_global_generator_is_left_alone(timestep_sampling):
    settings = {"timestep_sampling": timestep_sampling, "offset_noise": 0.1}
    before = torch.random.get_rng_state()
    first = draws_of(**settings)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(12345)
    assert_equal(first, draws_of(**settings))


# Offset noise ------------------------------------------------------------------------------------


def offset_of(amount: float, **changes: Any) -> torch.Tensor:
    return draws_of(offset_noise=amount, **changes).noise - draws_of(**changes).noise


def test_the_offset_is_constant_over_each_channel_and_proportional_to_its_setting():
    small, large = offset_of(0.1), offset_of(0.4)
    assert (small.amax((2, 3)) - small.amin((2, 3))).max() < 1e-6
    torch.testing.assert_close(large, 4 * small, rtol=1e-3, atol=1e-5)


def test_offsets_are_normal_and_independent_from_channel_to_channel_and_sample_to_sample():
    settings = {"positions": range(4096), "global_batch_size": 4096, "latent_shape": (4, 1, 1)}
    plain, shifted = (draws_of(offset_noise=amount, **settings).noise for amount in (0.0, 0.5))
    offsets = (shifted - plain).view(4096, 4).double() / 0.5
    assert offsets.mean().abs() < 0.025  # 3 deviations
    assert abs(offsets.std() - 1) < 0.02
    assert abs((offsets**4).mean() - 3) < 0.25
    channels = torch.corrcoef(offsets.T) - torch.eye(4)
    assert channels.abs().max() < 0.06
    neighbours = torch.corrcoef(torch.stack([offsets[:-1, 0], offsets[1:, 0]]))[0, 1]
    assert neighbours.abs() < 0.06
    with_noise = torch.corrcoef(torch.stack([plain.view(4096, 4)[:, 0].double(), offsets[:, 0]]))
    assert with_noise[0, 1].abs() < 0.06
    assert abs(shifted.var() - 1.25) < 0.05


# Sobol -------------------------------------------------------------------------------------------


def sobol_of(steps: range, global_batch_size: int, **changes: Any) -> torch.Tensor:
    """[steps, rows] timesteps."""
    settings: dict[str, Any] = {
        "positions": range(global_batch_size),
        "global_batch_size": global_batch_size,
        "latent_shape": (1, 1, 1),
        "timestep_sampling": "sobol",
    }
    return torch.stack([draws_of(step=step, **settings | changes).timesteps for step in steps])


def counts_per_stratum(timesteps: torch.Tensor, num_strata: int, of: int) -> torch.Tensor:
    return torch.bincount(timesteps.flatten() * num_strata // of, minlength=num_strata)


@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_a_power_of_two_of_points_is_sobols_sequence_but_for_the_shift(seed):
    """torch's engine walks the same blocks in another order (Gray code), unscrambled."""
    engine = torch.quasirandom.SobolEngine(dimension=1, scramble=False)
    theirs = (engine.draw(4 * 256, dtype=torch.float64).flatten() * 2**32).long().view(4, 256)
    ours = sobol_of(range(4), 256, seed=seed, num_train_timesteps=2**20)
    # The first block is a grid of 256 points, which the shift moves off zero; its leading bits
    # only change the order within a block.
    shift = int(ours[0, 0]) % 2**12
    assert shift > 0
    for block in (slice(0, 1), slice(1, 2), slice(2, 4)):
        unshifted = (ours[block] ^ shift).flatten()
        assert torch.equal(unshifted.sort().values, (theirs[block] >> 12).flatten().sort().values)


@pytest.mark.parametrize("global_batch_size", [8, 64, 256])
@pytest.mark.parametrize("first_step", [0, 1, 10**6 + 3])
def test_every_batch_has_one_timestep_in_each_stratum(global_batch_size, first_step):
    for timesteps in sobol_of(
        range(first_step, first_step + 8), global_batch_size, num_train_timesteps=1024
    ):
        assert (counts_per_stratum(timesteps, global_batch_size, of=1024) == 1).all()


@pytest.mark.parametrize("global_batch_size", [8, 64])
@pytest.mark.parametrize("first_step", [0, 16, 4096])
def test_a_block_of_steps_is_stratified_more_finely_than_its_batches(global_batch_size, first_step):
    block = sobol_of(
        range(first_step, first_step + 16), global_batch_size, num_train_timesteps=2**16
    )
    num_strata = 16 * global_batch_size
    assert (counts_per_stratum(block, num_strata, of=2**16) == 1).all()


@pytest.mark.parametrize("global_batch_size", [1, 24, 37, 100])
def test_batches_that_are_no_power_of_two_and_any_stretch_of_steps_are_even_too(global_batch_size):
    timesteps = sobol_of(range(5, 19), global_batch_size, num_train_timesteps=1024)
    for stretch in (timesteps[:1], timesteps[3:4], timesteps[2:9], timesteps):
        for num_strata in (2, 8, 16):
            counts = counts_per_stratum(stretch, num_strata, of=1024)
            assert counts.max() - counts.min() <= 1


def test_sobols_timesteps_cover_the_whole_schedule_evenly():
    counts = torch.bincount(sobol_of(range(125), 128).flatten(), minlength=1000)
    assert len(counts) == 1000
    assert counts.sum() == 16_000
    assert counts.min() >= 14
    assert counts.max() <= 18


def test_no_position_is_bound_to_a_stratum():
    num_rows, num_steps = 16, 512
    strata = sobol_of(range(num_steps), num_rows, num_train_timesteps=1024) * num_rows // 1024
    expected = num_steps / num_rows
    for position in range(num_rows):
        counts = torch.bincount(strata[:, position], minlength=num_rows).double()
        assert ((counts - expected) ** 2 / expected).sum() < 45  # chi² of 15: p = 0.0001
    neighbours = torch.corrcoef(strata[:, :2].T.double())[0, 1]
    assert abs(neighbours + 1 / (num_rows - 1)) < 0.15  # as of any two cards of a deck


def test_another_seed_has_other_points_and_another_order():
    one, other = (sobol_of(range(2), 16, seed=seed, num_train_timesteps=2**20) for seed in (0, 1))
    assert set(one.flatten().tolist()).isdisjoint(other.flatten().tolist())
    strata = [timesteps * 16 >> 20 for timesteps in (one, other)]
    assert not torch.equal(*strata)


# Logit-normal ------------------------------------------------------------------------------------


def test_logit_normal_timesteps_have_the_papers_distribution():
    num_rows = 50_000
    timesteps = draws_of(
        positions=range(num_rows),
        global_batch_size=num_rows,
        latent_shape=(1, 1, 1),
        timestep_sampling="logit-normal",
    ).timesteps
    assert timesteps.dtype == torch.int64
    assert 0 <= timesteps.min() < timesteps.max() < 1000
    edges = torch.arange(1, 1000, dtype=torch.float64) / 1000
    exact = torch.special.ndtr(torch.logit(edges))  # arXiv:2403.03206, eq. 19, with m=0 and s=1
    found = torch.bincount(timesteps, minlength=1000).cumsum(0)[:-1] / num_rows
    assert (found - exact).abs().max() < 1.63 / num_rows**0.5  # Kolmogorov-Smirnov: p = 0.01
