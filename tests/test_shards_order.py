"""The order of samples: complete, shuffled, resumable, and the same for every world size."""

import time
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest

from shards.errors import UserError
from shards.order import SampleOrder, choose_partitions, positions_of_rank

LAYOUTS = {
    "one shard": [1000],
    "few shards": [400, 311, 5],
    "many shards": [10] * 100,
    "shards of one": [1] * 257,
    "unequal": [1, 500, 2, 0, 99, 3, 250, 0],
    "empty ones first and last": [0, 0, 120, 0, 121, 0],
    "barely enough": [7, 9],
}


def order_of(
    lengths: Sequence[int], *, seed: int = 0, batch: int = 16, partitions: int = 0, window: int = 64
) -> SampleOrder:
    return SampleOrder(
        np.array(lengths),
        seed=seed,
        global_batch_size=batch,
        num_partitions=choose_partitions(batch, partitions),
        window=window,
    )


def samples_at(order: SampleOrder, lengths: Sequence[int], step: int, ranks: int = 1) -> np.ndarray:
    """Numbers of the samples of one global batch, as `ranks` processes would gather them."""
    first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    parts = []
    for rank in range(ranks):
        positions = positions_of_rank(order.global_batch_size, order.num_partitions, rank, ranks)
        shards, rows = order.locate(step, positions)
        assert (rows >= 0).all()
        assert (rows < np.array(lengths)[shards]).all()
        parts.append(first[shards] + rows)
    return np.concatenate(parts)


def epochs_of(order: SampleOrder, lengths: Sequence[int], count: int) -> list[np.ndarray]:
    """The samples of the first epochs, in the order in which partitions hand them out."""
    per_partition = order.global_batch_size // order.num_partitions
    steps = -(-order.samples_per_epoch * count // order.global_batch_size)
    batches = np.stack([samples_at(order, lengths, step) for step in range(steps)])
    turns = batches.reshape(steps, order.num_partitions, per_partition).transpose(0, 2, 1)
    lines = turns.reshape(-1, order.num_partitions)  # each partition's samples, one after another
    length = order.partition_length
    return [lines[epoch * length : (epoch + 1) * length].ravel() for epoch in range(count)]


@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("window", [1, 7, 100_000])
def test_an_epoch_has_every_sample_at_most_once_and_leaves_out_the_remainder(lengths, window):
    order = order_of(lengths, window=window)
    total = sum(lengths)
    assert order.samples_per_epoch == total - total % order.num_partitions
    for samples in epochs_of(order, lengths, 3):
        assert len(samples) == order.samples_per_epoch
        assert len(np.unique(samples)) == len(samples)
        assert samples.min() >= 0
        assert samples.max() < total


def test_what_one_epoch_leaves_out_another_has():
    lengths = [11, 8, 7, 5]  # 31 samples, 15 of them left out every epoch
    order = order_of(lengths, batch=16)
    seen = [set(samples.tolist()) for samples in epochs_of(order, lengths, 20)]
    assert all(len(samples) == 16 for samples in seen)
    assert set.union(*seen) == set(range(31))


@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("batch", [8, 24, 64])
def test_all_world_sizes_see_the_same_batches(lengths, batch):
    order = order_of(lengths, batch=batch, partitions=8)
    for step in range(0, 40, 3):
        alone = samples_at(order, lengths, step)
        for ranks in (2, 4, 8):
            assert samples_at(order, lengths, step, ranks).tolist() == alone.tolist()


def test_a_run_that_changes_its_world_size_sees_what_an_unbroken_one_sees():
    lengths = LAYOUTS["unequal"]
    unbroken = order_of(lengths, batch=32)
    alone = [samples_at(unbroken, lengths, step) for step in range(60)]
    broken = []
    for ranks, steps in ((8, range(0, 20)), (4, range(20, 41)), (8, range(41, 60))):
        order = order_of(lengths, batch=32)  # another process, with nothing but the step number
        broken += [samples_at(order, lengths, step, ranks) for step in steps]
    assert np.array_equal(np.stack(broken), np.stack(alone))


def test_every_step_can_be_resumed_at():
    lengths = LAYOUTS["few shards"]
    order = order_of(lengths, batch=48)
    steps = range(2 * order.samples_per_epoch // 48 + 2)
    continuous = [samples_at(order, lengths, step).tolist() for step in steps]
    for step in reversed(steps):
        assert samples_at(order_of(lengths, batch=48), lengths, step).tolist() == continuous[step]


def test_a_step_far_away_is_at_hand():
    lengths = LAYOUTS["few shards"]
    samples = samples_at(order_of(lengths), lengths, 10**12)
    assert len(set(samples.tolist())) == 16


def test_epochs_differ_and_so_do_seeds():
    lengths = LAYOUTS["many shards"]
    first, second = epochs_of(order_of(lengths, seed=0), lengths, 2)
    (other,) = epochs_of(order_of(lengths, seed=1), lengths, 1)
    (again,) = epochs_of(order_of(lengths, seed=0), lengths, 1)
    assert first.tolist() == again.tolist()
    assert (first == second).mean() < 0.05
    assert (first == other).mean() < 0.05


def test_the_order_is_the_same_tomorrow():
    """A change of these numbers changes every run that is resumed: that takes a new version."""
    assert samples_at(order_of([40, 60]), [40, 60], 3).tolist() == [
        *(39, 32, 64, 8, 58, 21, 92, 62),
        *(41, 81, 77, 84, 37, 36, 47, 15),
    ]


@pytest.mark.parametrize("lengths", [LAYOUTS["unequal"], LAYOUTS["many shards"]])
def test_batches_run_on_across_the_end_of_an_epoch(lengths):
    order = order_of(lengths, batch=48, partitions=16)
    steps, rest = divmod(order.samples_per_epoch, 48)
    assert rest, "the last batch of the first epoch must be a mixed one"
    assert order.epoch_at(steps) < 1 < order.epoch_at(steps + 1)
    mixed = samples_at(order, lengths, steps).reshape(16, 3)[:, : rest // 16].ravel()
    before = np.concatenate([samples_at(order, lengths, step) for step in range(steps)])
    assert len(np.unique([*before, *mixed])) == order.samples_per_epoch


def test_epochs_are_counted_in_samples():
    order = order_of([1000], batch=40)
    assert order.samples_per_epoch == 1000
    assert order.epoch_at(0) == 0
    assert order.epoch_at(25) == 1.0
    assert order.epoch_at(60) == 2.4


def ranks_of(samples: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(samples)).astype(float)


@pytest.mark.parametrize("lengths", [[500] * 128, [64_000], [8_000] * 8], ids=["128", "1", "8"])
def test_samples_of_a_batch_come_from_all_over_the_dataset(lengths):
    order = order_of(lengths, batch=64, window=4096)
    total = sum(lengths)
    spreads, neighbours = [], []
    for step in range(0, 900, 9):
        samples = samples_at(order, lengths, step)
        regions = np.unique(samples * 64 // total)
        spreads.append(len(regions))
        neighbours.append(np.abs(np.diff(np.sort(samples))).min())
    # 64 independent draws would hit 64 * (1 - 1/e) = 40 of 64 regions.
    assert np.mean(spreads) > 36
    assert np.min(spreads) > 20
    assert np.median(neighbours) < 2 * total / 64**2 * 8


@pytest.mark.parametrize("lengths", [[500] * 128, [64_000]], ids=["many shards", "one shard"])
def test_an_epoch_is_uncorrelated_with_the_order_on_disk(lengths):
    samples, following = epochs_of(order_of(lengths, batch=64, window=4096), lengths, 2)
    places = np.arange(len(samples))
    assert abs(np.corrcoef(samples, places)[0, 1]) < 0.05
    assert abs(np.corrcoef(samples[:-1], samples[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(ranks_of(samples[:63_000]), ranks_of(following[:63_000]))[0, 1]) < 0.05


def test_samples_that_are_neighbours_on_disk_part_in_the_order():
    lengths = [500] * 128
    (samples,) = epochs_of(order_of(lengths, batch=64, window=4096), lengths, 1)
    place = np.empty(len(samples), np.int64)
    place[samples] = np.arange(len(samples))
    distance = np.abs(np.diff(place))  # in samples handed out between the two
    assert np.median(distance) > 64 * 100
    assert (distance < 64).mean() < 0.01


def test_a_rank_reads_few_shards_at_a_time():
    """What memory maps and remote caches live on: the shuffle must not touch everything."""
    lengths = [1000] * 512
    order = order_of(lengths, batch=64, window=4000)
    positions = positions_of_rank(64, 64, 0, 8)
    touched: set[int] = set()
    for step in range(500):
        touched |= set(order.locate(step, positions)[0].tolist())
    assert len(touched) <= 8 * 5  # each of 8 partitions: a window of four shards, cut at both ends


def test_a_dataset_of_web_size_opens_at_once_in_little_memory():
    lengths = np.full(40_000, 10_000)
    lengths[::7] -= 123
    tracemalloc.start()
    start = time.process_time()
    order = order_of(lengths.tolist(), batch=2048, window=16_384)
    shards, _ = order.locate(123_456, range(2048))
    assert time.process_time() - start < 2
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(np.unique(shards)) > 60
    assert peak < 100e6  # 400 million samples; an index of them would take 3.2 GB


@pytest.mark.parametrize("count", [0, 1, 15])
def test_fewer_samples_than_partitions_are_refused_with_a_batch_that_works(count):
    with pytest.raises(UserError, match=rf"{count} samples; wanted at least 16"):
        order_of([count])
    if count:
        assert order_of([count], batch=count).samples_per_epoch > 0  # the remedy


def test_no_shards_at_all_are_refused():
    with pytest.raises(UserError, match="0 samples"):
        order_of([])


@pytest.mark.parametrize(
    ("batch", "partitions"),
    [(1, 1), (7, 7), (32, 32), (64, 64), (96, 32), (100, 20), (2048, 64), (2049, 3), (6, 6)],
)
def test_partitions_follow_from_the_batch_alone(batch, partitions):
    assert choose_partitions(batch) == partitions
    assert batch % partitions == 0


def test_partitions_on_request_must_divide_the_batch():
    assert choose_partitions(2048, 128) == 128
    for wrong in (48, -4, 4096):
        with pytest.raises(UserError, match=rf"{wrong}; wanted a divisor of the global batch 2048"):
            choose_partitions(2048, wrong)


def follow_remedies(batch: int, world_size: int) -> tuple[int, int]:
    """Do what the errors say until every rank has its positions; at most twice."""
    partitions = 0
    for _ in range(3):
        try:
            chosen = choose_partitions(batch, partitions)
            shares = [positions_of_rank(batch, chosen, r, world_size) for r in range(world_size)]
        except UserError as error:
            option, value = str(error).split("Remedy: ")[1].split(" with ")[-1].split()[:2]
            if option == "--global-batch-size":
                batch = int(value)
            else:
                assert option == "--num-partitions"
                partitions = int(value)
        else:
            assert [p for share in shares for p in share] == list(range(batch))
            return batch, chosen
    raise AssertionError(f"{batch} among {world_size}: the remedies do not help")


@pytest.mark.parametrize("world_size", [*range(1, 18), 24, 48, 64, 72, 96, 128, 1000])
def test_errors_name_settings_that_work(world_size):
    for batch in (1, 2, 15, 32, 100, 102, 2048, 2050):
        found, _ = follow_remedies(batch, world_size)
        assert abs(found - batch) < world_size


def test_a_batch_that_does_not_divide_is_refused_with_both_neighbours():
    with pytest.raises(UserError, match=r"100 does not divide among 8.*--global-batch-size 96 or "):
        positions_of_rank(100, 20, 0, 8)
    with pytest.raises(UserError, match=r"20 partitions do not divide among 8 processes"):
        positions_of_rank(104, 20, 0, 8)
