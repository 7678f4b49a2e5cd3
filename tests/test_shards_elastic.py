"""The sample log is one and the same for any number of processes, and after any resumption."""

import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from helpers_kill import PROCESSES, start_server

from shards.dataset import Dataset
from shards.order import SampleOrder, choose_partitions, positions_of_rank
from shards.reader import LatentReader

BATCH = 16
LENGTHS = [13, 0, 30, 9, 1, 25]  # 78 samples: 64 an epoch, four steps
SMALL = {"num_tokens": 5, "dim": 8, "captions_per_shard": 3, "dropped": 2, "too_small": 1}
LAYOUTS = {
    "unequal": LENGTHS,
    "few shards": [50, 14],
    "one shard": [64],
    "empty shards": [0, 0, 40, 0, 33, 0],
    "shards of one": [1] * 70,
    "one large": [1, 1, 200, 1],
}

Entry = tuple[int, int, int, str]  # step, position, sample, hash of its rows


def read_log(path: str, rank: int, world_size: int, steps: range, answer: Connection) -> None:
    """What a process of a run logs: the rows that it read, by step and position."""
    assert "torch" not in sys.modules
    reader = reader_of(Dataset(path))
    positions = positions_of_rank(BATCH, BATCH, rank, world_size)
    batches = reader.iter_batches(steps.start, positions)
    log: list[Entry] = []
    for step, batch in zip(steps, batches, strict=False):
        assert batch.step == step
        for at, position in enumerate(positions):
            rows = batch.moments[at].tobytes() + batch.states[at].tobytes()
            sha = hashlib.sha256(rows).hexdigest()
            log.append((step, position, int(batch.samples[at]), sha))
    batches.close()  # type: ignore[attr-defined]
    answer.send((os.getpid(), log))


def reader_of(dataset: Dataset) -> LatentReader:
    image, text = dataset.image_column(64), dataset.text_column()
    return LatentReader(
        dataset,
        image,
        text,
        seed=7,
        global_batch_size=BATCH,
        num_partitions=choose_partitions(BATCH),
        window=3,
    )


def run(path: Path, world_size: int, steps: range) -> list[Entry]:
    """The merged log of as many processes; each of them is its own."""
    start_server()
    ranks = []
    for rank in range(world_size):
        ours, theirs = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(
            target=read_log, args=(str(path), rank, world_size, steps, theirs)
        )
        process.start()
        theirs.close()
        ranks.append((process, ours))
    log: list[Entry] = []
    pids = {os.getpid()}
    for process, connection in ranks:
        assert connection.poll(60)
        pid, entries = connection.recv()
        process.join()
        assert process.exitcode == 0
        assert {step for step, *_ in entries} == set(steps)
        pids.add(pid)
        log += entries
    assert len(pids) == world_size + 1
    return sorted(log)


@pytest.fixture(scope="module")
def dataset(
    tmp_path_factory: pytest.TempPathFactory, make_latent_dataset: Callable[..., Dataset]
) -> Dataset:
    """Shards of all lengths, one of them empty."""
    path = tmp_path_factory.mktemp("elastic") / "latents"
    return make_latent_dataset(path, LENGTHS, resolutions=(64,), **SMALL)


@pytest.fixture(scope="module")
def alone(dataset: Dataset) -> list[Entry]:
    """The log of one process over three epochs."""
    return run(dataset.path, 1, range(12))


def test_elastic_the_log_of_one_process_has_every_position_of_every_step(alone):
    assert [(step, position) for step, position, *_ in alone] == list(
        itertools.product(range(12), range(BATCH))
    )
    shas = {sample: sha for _, _, sample, sha in alone}
    assert all(shas[sample] == sha for _, _, sample, sha in alone)  # a sample is what it was
    assert len(set(shas.values())) == len(shas)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_elastic_the_log_of_many_processes_is_that_of_one(dataset, alone, world_size):
    assert run(dataset.path, world_size, range(12)) == alone


@pytest.mark.parametrize(
    "changes",
    [
        [(8, 2), (4, 3), (8, 12)],
        [(8, 5), (4, 6), (8, 12)],
        [(1, 1), (16, 2), (2, 12)],
    ],
    ids=["within an epoch", "within a later epoch", "1 to 16 to 2"],
)
def test_elastic_a_run_that_changes_its_size_in_mid_epoch_logs_what_one_process_does(
    dataset, alone, changes
):
    log, first = [], 0
    for world_size, last in changes:
        assert last % 4 or last == 12  # 4 steps an epoch
        log += run(dataset.path, world_size, range(first, last))
        first = last
    assert log == alone


@pytest.mark.parametrize("first", [1, 3, 4, 7, 11])
def test_elastic_a_step_number_is_all_that_a_resumption_needs(dataset, alone, first):
    assert run(dataset.path, 2, range(first, 12)) == [e for e in alone if e[0] >= first]


def test_elastic_no_sample_comes_twice_in_an_epoch_and_the_remainder_is_left_out(alone):
    for epoch in range(3):
        samples = [sample for step, _, sample, _ in alone if step // 4 == epoch]
        assert len(samples) == len(set(samples)) == 64
        assert set(samples) <= set(range(78))


def order_of(lengths: Sequence[int], *, batch: int = BATCH, window: int = 3) -> SampleOrder:
    return SampleOrder(
        np.array(lengths),
        seed=3,
        global_batch_size=batch,
        num_partitions=choose_partitions(batch),
        window=window,
    )


def epoch_of(order: SampleOrder, epoch: int) -> list[tuple[int, int]]:
    """Shard and row of every sample of an epoch, from whole turns of the partitions."""
    per_partition = order.global_batch_size // order.num_partitions
    found = []
    first, last = (order.partition_length * (epoch + more) for more in (0, 1))
    for step in range(first // per_partition, -(-last // per_partition)):
        shards, rows = order.locate(step, range(order.global_batch_size))
        for position, sample in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
            if first <= step * per_partition + position % per_partition < last:
                found.append(sample)
    return found


@pytest.mark.parametrize("batch", [16, 24, 128])
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
def test_elastic_over_epochs_every_sample_appears_and_exactly_the_remainder_is_missing(
    lengths, batch
):
    order = order_of(lengths, batch=batch)
    every = {(shard, row) for shard, length in enumerate(lengths) for row in range(length)}
    remainder = len(every) % order.num_partitions
    seen: set[tuple[int, int]] = set()
    missing = []
    for epoch in range(30):
        samples = epoch_of(order, epoch)
        assert len(samples) == len(set(samples)) == len(every) - remainder
        assert set(samples) <= every
        missing.append(frozenset(every - set(samples)))
        assert len(missing[-1]) == remainder
        seen |= set(samples)
    assert seen == every
    assert len(set(missing)) > 1 or not remainder


@pytest.mark.parametrize("world_size", [2, 4, 8, 16])
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
def test_elastic_ranks_locate_what_one_process_locates_over_an_epochs_end(lengths, world_size):
    order = order_of(lengths)
    for step in range(3 * order.partition_length):
        wanted = order.locate(step, range(BATCH))
        parts = [
            # Each rank has an order of its own, and has not seen the steps before.
            order_of(lengths).locate(step, positions_of_rank(BATCH, BATCH, rank, world_size))
            for rank in range(world_size)
        ]
        for found, whole in zip(zip(*parts, strict=True), wanted, strict=True):
            assert np.concatenate(found).tolist() == whole.tolist()


@pytest.mark.parametrize("window", [1, 3, 1000])
@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("batch", [16, 256])
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
def test_elastic_the_shards_ahead_are_those_that_are_read_window_by_window(
    lengths, batch, world_size, window
):
    order = order_of(lengths, batch=batch, window=window)
    length, share = order.partition_length, batch // order.num_partitions
    windows_per_epoch = -(-length // window)
    for rank, first in itertools.product({0, world_size - 1}, (0, 1, length, 9)):
        positions = positions_of_rank(batch, order.num_partitions, rank, world_size)
        ahead = order.shards_ahead(first, positions)
        announced: dict[int, set[int]] = {}
        read: dict[int, set[int]] = {}
        for step in range(first, first + 2 * length):
            shards, _ = order.locate(step, positions)
            for turn in range(share):
                epoch, offset = divmod(step * share + turn, length)
                number = epoch * windows_per_epoch + offset // window
                if number not in announced:
                    announced[number] = set(next(ahead)[1].tolist())
                read.setdefault(number, set()).update(shards[turn::share].tolist())
        assert all(read[number] <= announced[number] for number in read)
        assert list(announced) == sorted(announced)
        whole = list(announced)[1:-1]  # the first and the last may be read in part
        assert all(read[number] == announced[number] for number in whole)


def test_elastic_a_dataset_listed_in_another_order_and_with_gaps_has_the_same_log(dataset, alone):
    """The index is a mapping: what stands first in it must not matter, nor how shards are named."""
    backwards = Dataset(dataset.path)
    for column in backwards.columns.values():
        entries = dict(reversed(column.shards.items()))
        column.shards.clear()
        column.shards.update(entries)
    backwards.ledger = dict(reversed(backwards.ledger.items()))
    found = reader_of(backwards)
    wanted = reader_of(dataset)
    assert found.identity == wanted.identity
    for step in range(8):
        logged = [sample for at, _, sample, _ in alone if at == step]
        assert found.gather(step, range(BATCH)).samples.tolist() == logged


def test_elastic_gaps_in_the_numbering_change_no_position(dataset, alone):
    """`00000, 00001, …` and `00000, 00010, …`: equal lengths in equal order, equal samples."""
    spread = Dataset(dataset.path)
    numbers = {name: f"{int(name) * 10:05d}" for name in spread.ledger}
    for column in spread.columns.values():
        entries = {numbers[name]: entry for name, entry in column.shards.items()}
        column.shards.clear()
        column.shards.update(entries)
    spread.ledger = {numbers[name]: entry for name, entry in spread.ledger.items()}
    reader = reader_of(spread)
    for step in range(8):
        shards, rows = reader.order.locate(step, range(BATCH))
        logged = [sample for at, _, sample, _ in alone if at == step]
        assert reader.sample_numbers(shards, rows).tolist() == logged
    assert reader.identity != reader_of(dataset).identity  # other files, another run
