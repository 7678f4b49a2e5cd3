"""Training on a dataset that grows: every epoch recorded before it starts, and replayed exactly."""

import itertools
import json
import pickle
import queue
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_precompute import (
    arguments,
    build_small_shards,
    start_job,
    wait_until,
)

import shards.follow
from shards.batch import LatentBatch
from shards.dataset import Dataset
from shards.errors import CorruptFileError, DatasetError, UserError
from shards.flip import mirror_spec
from shards.follow import FollowingReader
from shards.layout import LEDGER, ledger_path
from shards.ledger import read_ledger
from shards.manifest import write_manifest
from shards.order import positions_of_rank
from shards.repair import repair

LENGTHS = [37, 20, 0, 45, 30, 52, 24]
NAMES = [f"{number:05d}" for number in range(len(LENGTHS))]
SMALL = {"num_tokens": 5, "dim": 8, "captions_per_shard": 3, "dropped": 2, "too_small": 3}
BATCH = 16

Entry = tuple[int, str, bytes, bytes]  # step, key, moments, states


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, make_latent_dataset: Callable[..., Dataset]
) -> Dataset:
    """The dataset that stage 1 will have written in the end."""
    path = tmp_path_factory.mktemp("finished") / "latents"
    return make_latent_dataset(path, LENGTHS, **SMALL)


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.follow, "_POLL_SEC", 0.005)


class Growing:
    """A copy of a dataset that gets its shards one by one, as stage 1 writes them: ledger last."""

    def __init__(self, finished: Dataset, path: Path, names: Sequence[str] = ()) -> None:
        self._from, self.path = finished.path, path
        for null in finished.path.glob("*/null.*"):
            (path / null.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(null, path / null.parent.name)
        self.add(*names)

    def add(self, *names: str, folders: str = "*") -> None:
        for name in names:
            files = [f for f in self._from.glob(f"{folders}/{name}.*") if f.is_file()]
            for file in sorted(files, key=lambda f: (f.parent.name == LEDGER, f.suffix == ".json")):
                (self.path / file.parent.name).mkdir(parents=True, exist_ok=True)
                shutil.copy(file, self.path / file.parent.name)
        write_manifest(self.path)

    def remove(self, name: str) -> None:
        for file in self.path.glob(f"*/{name}.*"):
            file.unlink()
        write_manifest(self.path)


@pytest.fixture
def growing(finished: Dataset, tmp_path: Path) -> Growing:
    return Growing(finished, tmp_path / "latents", NAMES[:2])


def follow(path: Path, **options: Any) -> FollowingReader:
    dataset = Dataset(path)
    defaults: dict[str, Any] = {"seed": 3, "global_batch_size": BATCH, "num_partitions": BATCH}
    defaults |= {"window": 7, "say": lambda text: None}
    return FollowingReader(
        dataset,
        dataset.image_column(64),
        dataset.text_column(),
        path.parent / "run" / "epochs.jsonl",
        **{**defaults, **options},
    )


def log_of(reader: FollowingReader, batches: Sequence[LatentBatch]) -> list[Entry]:
    """What was trained on, by who it is and by its bytes."""
    keys = iter(reader.keys_of(np.concatenate([batch.samples for batch in batches])))
    return [
        (batch.step, next(keys), moments.tobytes(), states.tobytes())
        for batch in batches
        for moments, states in zip(batch.moments, batch.states, strict=True)
    ]


def run(
    reader: FollowingReader, steps: range, before: Callable[[int], None] = lambda step: None
) -> list[Entry]:
    """Train on some steps; `before` is called ahead of each batch."""
    taken = []
    batches = reader.iter_batches(steps.start, range(BATCH))
    for step in steps:
        before(step)
        taken.append(next(batches))
    batches.close()  # type: ignore[attr-defined]
    assert [batch.step for batch in taken] == list(steps)
    return log_of(reader, taken)


def record_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path.parent / "run" / "epochs.jsonl").open()]


def grow_at(growing: Growing, **when: Sequence[str]) -> Callable[[int], None]:
    """`step_4=["00002"]`: that shard is finished before step 4."""

    def before(step: int) -> None:
        if names := when.get(f"step_{step}"):
            growing.add(*names)

    return before


def epochs_in(log: list[Entry], path: Path) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """The lines of the record with the keys that were served in their epochs."""
    for line in record_of(path):
        steps = range(line["first_step"], line["first_step"] + line["num_steps"])
        yield line, [key for step, key, *_ in log if step in steps]


GROWTH: dict[str, Sequence[str]] = {"step_1": NAMES[2:4], "step_5": NAMES[4:6], "step_6": NAMES[6:]}


def test_an_epoch_takes_what_is_there_when_it_starts_and_the_next_one_takes_more(growing):
    log = run(follow(growing.path), range(30), grow_at(growing, **GROWTH))
    lines = record_of(growing.path)
    assert [list(line["added"]) for line in lines[:3]] == [NAMES[:2], NAMES[2:4], NAMES[4:]]
    assert [line["num_steps"] for line in lines] == [57 // 16, 102 // 16, 208 // 16, 208 // 16]
    assert [line["first_step"] for line in lines] == [0, 3, 9, 22]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    there: set[str] = set()
    for line, keys in epochs_in(log, growing.path):
        there |= line["added"].keys()
        assert {key.split("/")[0] for key in keys} <= there


def test_no_sample_comes_twice_in_an_epoch_and_the_remainder_is_another_each_time(growing):
    log = run(follow(growing.path), range(3 * 8))
    left_out = []
    everyone = set()
    for line, keys in epochs_in(log, growing.path):
        assert len(keys) == len(set(keys)) == line["num_steps"] * BATCH
        everyone |= set(keys)
        left_out.append(frozenset(keys))
    assert len(left_out) == 8
    assert len(everyone) == 57
    assert len(set(left_out)) > 4


def test_epochs_over_the_same_shards_have_different_orders(growing):
    log = run(follow(growing.path), range(9))
    first, second, third = (keys for _, keys in epochs_in(log, growing.path))
    assert first != second != third


def test_another_seed_is_another_order(growing):
    keys = [key for _, key, *_ in run(follow(growing.path), range(3))]
    (growing.path.parent / "run" / "epochs.jsonl").unlink()
    others = [key for _, key, *_ in run(follow(growing.path, seed=4), range(3))]
    assert keys != others


def test_a_replay_is_exact_although_all_shards_are_there_by_then(growing):
    log = run(follow(growing.path), range(22), grow_at(growing, **GROWTH))
    recorded = (growing.path.parent / "run" / "epochs.jsonl").read_bytes()
    assert run(follow(growing.path), range(22)) == log
    assert (growing.path.parent / "run" / "epochs.jsonl").read_bytes() == recorded


@pytest.mark.parametrize("first", [1, 2, 3, 4, 8, 9, 21])
def test_a_run_goes_on_at_any_step_with_what_an_unbroken_one_sees(growing, first):
    log = run(follow(growing.path), range(22), grow_at(growing, **GROWTH))
    resumed = run(follow(growing.path), range(first, 22))
    assert resumed == [entry for entry in log if entry[0] >= first]


def test_after_a_replay_the_run_goes_on_following(growing):
    run(follow(growing.path), range(3))
    growing.add("00003")
    reader = follow(growing.path)
    run(reader, range(2, 5))
    assert [list(line["added"]) for line in record_of(growing.path)] == [NAMES[:2], ["00003"]]
    assert reader.epoch_at(3) == 1.0


def test_dying_between_record_and_batch_changes_nothing(growing, monkeypatch):
    """The line is there, nobody has trained on it, and more shards come before the restart."""
    reader = follow(growing.path)
    log = run(reader, range(3))

    class KilledError(BaseException):
        pass

    def die(*args: Any, **options: Any) -> None:
        raise KilledError

    batches = reader.iter_batches(2, range(BATCH))
    next(batches)
    with monkeypatch.context() as patched:
        patched.setattr(shards.follow, "LatentReader", die)
        with pytest.raises(KilledError):
            next(batches)
    assert len(record_of(growing.path)) == 2
    growing.add(*NAMES[2:])
    log += run(follow(growing.path), range(3, 6))
    lines = record_of(growing.path)
    assert [list(line["added"]) for line in lines] == [NAMES[:2], []]
    assert {key.split("/")[0] for _, key, *_ in log} == set(NAMES[:2])


def test_dying_before_the_record_is_in_place_leaves_no_trace(growing, monkeypatch):
    run(follow(growing.path), range(3))
    before = record_of(growing.path)

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr("shards.epoch_record.write_text_whole", fail)
        with pytest.raises(OSError, match="disk full"):
            run(follow(growing.path), range(3, 4))
    assert record_of(growing.path) == before
    growing.add("00003")
    run(follow(growing.path), range(3, 4))
    assert list(record_of(growing.path)[1]["added"]) == ["00003"]


class Exchange:
    """A broadcast from rank 0, through pickle as between processes."""

    def __init__(self, world_size: int) -> None:
        self._queues = [queue.SimpleQueue[bytes]() for _ in range(world_size)]
        self.num_said = 0

    def of_rank(self, rank: int) -> Callable[[Any], Any]:
        def agree(document: Any) -> Any:
            if rank == 0:
                self.num_said += 1
                for each in self._queues:
                    each.put(pickle.dumps(document))
            else:
                assert document is None
            return pickle.loads(self._queues[rank].get(timeout=10))

        return agree


def run_together(
    path: Path, world_size: int, steps: range, before: Callable[[int], None] = lambda step: None
) -> list[Entry]:
    """As many processes in turn; the main one first."""
    exchange = Exchange(world_size)
    readers = [
        follow(path, agree=exchange.of_rank(rank), is_main=rank == 0, num_held_out=4)
        for rank in range(world_size)
    ]
    ranks = [
        reader.iter_batches(steps.start, positions_of_rank(BATCH, BATCH, rank, world_size))
        for rank, reader in enumerate(readers)
    ]
    taken = []
    for step in steps:
        before(step)
        taken += [next(batches) for batches in ranks]
    for batches in ranks:
        batches.close()  # type: ignore[attr-defined]
    logs = [log_of(reader, taken) for reader in (readers[0], readers[-1])]
    assert logs[0] == logs[1]  # all ranks number samples alike
    return logs[0]


@pytest.mark.parametrize("world_size", [2, 8])
def test_any_number_of_processes_sees_one_order(growing, world_size):
    """Shards come between the moments at which the ranks ask for their batches, too."""
    alone = run_together(growing.path, 1, range(20), grow_at(growing, **GROWTH))
    assert run_together(growing.path, world_size, range(20)) == alone
    parts = [(1, range(0, 4)), (world_size, range(4, 11)), (2, range(11, 20))]
    assert [e for size, steps in parts for e in run_together(growing.path, size, steps)] == alone


def test_processes_agree_although_the_dataset_grows_between_their_looks(growing, finished):
    """Only the main process looks; a rank that comes later must not see more than it did."""
    exchange = Exchange(2)
    readers = [follow(growing.path, agree=exchange.of_rank(r), is_main=r == 0) for r in range(2)]
    positions = [positions_of_rank(BATCH, BATCH, rank, 2) for rank in range(2)]
    first, second = (r.iter_batches(0, p) for r, p in zip(readers, positions, strict=True))
    taken = [next(first)]
    growing.add(*NAMES[2:])
    taken.append(next(second))
    first.close()  # type: ignore[attr-defined]
    second.close()  # type: ignore[attr-defined]
    assert log_of(readers[0], taken) == run(follow(growing.path), range(1))


def test_agreement_is_asked_for_in_the_thread_that_takes_batches_and_rarely(growing):
    threads = Counter[str]()

    def agree(document: Any) -> Any:
        threads[threading.current_thread().name] += 1
        return document

    reader = follow(growing.path, agree=agree)
    reader.begin()
    run(reader, range(9))
    assert threads == {threading.current_thread().name: 1 + 3}  # the record, three epochs


def test_it_waits_for_a_global_batch_and_says_so(finished, tmp_path):
    growing = Growing(finished, tmp_path / "latents", ["00001"])  # 20 samples
    said: list[str] = []
    asked = itertools.count(1)

    def later() -> bool:
        if next(asked) == 4:
            growing.add("00003")
        return False

    reader = follow(growing.path, global_batch_size=32, say=said.append, should_stop=later)
    batch = next(reader.iter_batches(0, range(32)))
    assert len(batch.samples) == 32
    assert len(said) == 2
    assert "20 samples in 1 complete shards; waiting for 32, a global batch" in said[0]
    assert "epoch 0 has 65 samples in 2 complete shards" in said[1]
    assert next(asked) == 5


def test_a_dataset_with_no_shard_yet_is_waited_for(finished, tmp_path):
    growing = Growing(finished, tmp_path / "latents", NAMES[:1])
    reader_path = growing.path
    said: list[str] = []
    reader = follow(
        reader_path,
        say=said.append,
        should_stop=lambda: bool(growing.add(*NAMES[:1])),
    )
    growing.remove(NAMES[0])
    assert len(next(reader.iter_batches(0, range(BATCH))).samples) == BATCH
    assert "waiting for the first complete shard" in said[0]


def test_a_wait_ends_when_it_is_asked_to_and_records_nothing(finished, tmp_path):
    growing = Growing(finished, tmp_path / "latents", ["00001"])
    exchange = Exchange(2)
    asked = itertools.count(1)
    readers = [
        follow(
            growing.path,
            global_batch_size=32,
            agree=exchange.of_rank(rank),
            is_main=rank == 0,
            should_stop=lambda: next(asked) == 3,
        )
        for rank in range(2)
    ]
    assert [list(reader.iter_batches(0, range(32))) for reader in readers] == [[], []]
    assert exchange.num_said == 1 + 3  # each poll is heard by all, so that none waits for long
    assert not (tmp_path / "run" / "epochs.jsonl").exists()
    stopped = follow(growing.path, global_batch_size=32, num_held_out=3, should_stop=lambda: True)
    assert not stopped.begin()
    assert stopped.num_held_out == 0


def test_a_shard_without_its_ledger_or_a_column_does_not_count(growing):
    reader = follow(growing.path)
    text_id = Dataset(growing.path).text_column().column_id
    growing.add("00003", folders="moments*")
    growing.add("00004", folders="moments*")
    growing.add("00004", folders=text_id)
    growing.add("00005", folders=LEDGER)
    growing.add("00006", folders=LEDGER)
    growing.add("00006", folders="moments*")
    run(reader, range(1))
    assert list(record_of(growing.path)[0]["added"]) == NAMES[:2]


# Held-out samples.


def keys_held_out(reader: FollowingReader) -> list[str]:
    batches = reader.iter_held_out(0, reader.num_held_out, 3)
    return [key for batch in batches for key in reader.keys_of(batch.samples)]


def test_held_out_samples_are_chosen_once_and_never_served(growing):
    reader = follow(growing.path, num_held_out=5)
    assert reader.begin()
    secret = keys_held_out(reader)
    assert 0 < len(secret) == len(set(secret)) == reader.num_held_out <= 3  # of 63 good rows
    log = run(reader, range(60), grow_at(growing, **GROWTH))
    lines = record_of(growing.path)
    assert len(lines) > 5
    assert ["held_out" in line for line in lines] == [True] + [False] * (len(lines) - 1)
    assert keys_held_out(reader) == secret
    served = {key for _, key, *_ in log}
    assert not served & set(secret)
    assert len(served) == sum(LENGTHS) - len(secret)
    resumed = follow(growing.path, num_held_out=5)
    run(resumed, range(40, 42))
    assert keys_held_out(resumed) == secret


def test_steps_are_counted_without_the_held_out_samples_of_the_first_choice(growing):
    """Later shards would allow for more of them; 57 and 208 samples are 7 and 26 batches of 8."""
    options = {"global_batch_size": 8, "num_partitions": 8, "num_held_out": 20}
    reader = follow(growing.path, **options)
    batches = reader.iter_batches(0, range(8))
    taken = [next(batches) for _ in range(6)]
    growing.add(*NAMES[2:])
    taken.append(next(batches))
    batches.close()  # type: ignore[attr-defined]
    assert reader.num_held_out == 3
    lines = record_of(growing.path)
    assert [line["num_steps"] for line in lines] == [(57 - 3) // 8, (208 - 3) // 8] == [6, 25]
    first = np.concatenate([batch.samples for batch in taken[:6]])
    assert len(np.unique(first)) == 48


def test_held_out_rows_are_those_of_their_keys(growing, finished):
    reader = follow(growing.path, num_held_out=5)
    reader.begin()
    (batch,) = reader.iter_held_out(0, reader.num_held_out, 100)
    image = finished.image_column(64)
    for key, moments in zip(reader.keys_of(batch.samples), batch.moments, strict=True):
        shard, name = key.split("/")
        ledger = [row["key"] for row in read_ledger(ledger_path(finished.path, shard))]
        arrays = image.map_shard(shard)
        row = arrays["row"].tolist().index(ledger.index(name))
        assert arrays["moments"][row].tobytes() == moments.tobytes()


# A dataset that changes otherwise.


def test_a_repaired_shard_is_waited_for_and_the_replay_is_exact(growing, finished):
    log = run(follow(growing.path), range(6))
    image = Dataset(growing.path).image_column(64)
    path = image.path_of("00001")
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    assert len(repair(growing.path).moved) == 2
    said: list[str] = []
    waits = itertools.count()

    def make_again() -> bool:
        if next(waits) == 2:
            growing.add("00001")
        return False

    replayed = run(follow(growing.path, say=said.append, should_stop=make_again), range(6))
    assert replayed == log
    assert len(said) == 1
    assert "waiting for shard 00001 (1 in all)" in said[0]


def test_a_shard_that_goes_is_left_out_of_new_epochs_and_keeps_its_numbers(growing):
    growing.add("00003")
    reader = follow(growing.path)
    before = {int(s): k for s, k in zip(*numbers_of(reader, 0, 6), strict=True)}
    growing.remove("00000")
    growing.add("00004")
    after = {int(s): k for s, k in zip(*numbers_of(reader, 6, 20), strict=True)}
    assert record_of(growing.path)[1]["removed"] == ["00000"]
    assert not {k for k in after.values() if k.startswith("00000")}
    assert {k for k in after.values() if k.startswith("00004")}
    shared = before.keys() & after.keys()
    assert shared
    assert all(before[sample] == after[sample] for sample in shared)
    assert len({*before.values(), *after.values()}) == len(before.keys() | after.keys())


def test_samples_of_a_shard_that_went_still_have_their_keys_where_the_ledger_has_them(growing):
    growing.add("00003")
    reader = follow(growing.path)
    samples, keys = numbers_of(reader, 0, 6)
    text_id = Dataset(growing.path).text_column().column_id
    for file in (growing.path / text_id).glob("00000.*"):
        file.unlink()
    write_manifest(growing.path)
    numbers_of(reader, 6, 7)
    assert record_of(growing.path)[1]["removed"] == ["00000"]
    assert reader.keys_of(samples) == keys
    growing.remove("00000")
    with pytest.raises(CorruptFileError, match=r"ledger/00000\.parquet"):
        reader.keys_of(samples)


def numbers_of(reader: FollowingReader, first: int, last: int) -> tuple[np.ndarray, list[str]]:
    batches = reader.iter_batches(first, range(BATCH))
    samples = np.concatenate([next(batches).samples for _ in range(first, last)])
    batches.close()  # type: ignore[attr-defined]
    return samples, reader.keys_of(samples)


def test_a_shard_with_held_out_samples_is_waited_for_by_every_epoch(growing):
    reader = follow(growing.path, num_held_out=5)
    reader.begin()
    shard = keys_held_out(reader)[0].split("/")[0]
    run(reader, range(3))
    growing.add(*NAMES[3:])
    growing.remove(shard)
    stopped = follow(growing.path, num_held_out=5, should_stop=lambda: True)
    assert list(stopped.iter_batches(3, range(BATCH))) == []
    growing.add(shard)
    run(follow(growing.path, num_held_out=5), range(3, 5))


def test_beginning_takes_the_last_recorded_epoch_and_not_shards_that_went_before_it(growing):
    growing.add("00003")
    run(follow(growing.path), range(6))
    growing.remove("00000")
    log = run(follow(growing.path), range(6, 8))
    resumed = follow(growing.path, should_stop=lambda: True)
    assert resumed.begin()
    assert run(resumed, range(6, 8)) == log
    assert not resumed.begin(0)


def test_a_shard_of_other_rows_is_refused_by_name(growing, tmp_path, make_latent_dataset):
    run(follow(growing.path), range(2))
    other = make_latent_dataset(tmp_path / "other", [37, 19], **SMALL)
    for file in other.path.glob("*/00001.*"):
        shutil.copy(file, growing.path / file.parent.name)
    write_manifest(growing.path)
    for first in (2, 3):
        with pytest.raises(DatasetError, match=r"shard 00001: 19 rows; wanted 20, as .*epochs"):
            run(follow(growing.path), range(first, first + 2))


def test_a_damaged_row_is_refused_as_ever(growing):
    path = Dataset(growing.path).image_column(64).path_of("00000")
    data = bytearray(path.read_bytes())
    data[-4000:] = bytes(4000)
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"00000\.safetensors: row \d+ does not match"):
        run(follow(growing.path), range(12))


def test_mirrored_images_are_followed_too(growing, finished, tmp_path):
    """A shard counts once its mirror is there."""
    from test_shards_flip import add_mirror

    whole = add_mirror(Dataset(shutil.copytree(finished.path, tmp_path / "whole")))
    both = Growing(whole, tmp_path / "both" / "latents", NAMES[:2])
    flipped_id = mirror_spec(finished.image_column(64).spec).column_id
    for folder in ("ledger", "text*", finished.image_column(64).column_id):
        both.add("00003", folders=folder)
    assert (both.path / LEDGER / "00003.json").exists()
    options = {"flipped": Dataset(both.path).columns[flipped_id], "flip_prob": 0.5}
    log = run(follow(both.path, **options), range(9))
    assert list(record_of(both.path)[0]["added"]) == NAMES[:2]
    moments: dict[str, set[bytes]] = {}
    for _, key, rows, _ in log:
        moments.setdefault(key, set()).add(rows)
    assert max(map(len, moments.values())) == 2
    assert run(follow(both.path, **options), range(9)) == log
    assert follow(both.path, **options).identity != follow(both.path).identity


# The record.


def test_the_record_grows_with_the_dataset_and_hardly_with_the_epochs(growing):
    growing.add(*NAMES[2:])
    run(follow(growing.path), range(13 * 6))
    lines = (growing.path.parent / "run" / "epochs.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert max(map(len, lines[1:])) < 100


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [lines[0][: len(lines[0]) // 2]],
        lambda lines: lines[1:],
        lambda lines: [lines[0], lines[2]],
        lambda lines: [lines[0], lines[0], *lines[1:]],
        lambda lines: [*lines, "[]"],
        lambda lines: [*lines, '{"epoch": 3}'],
        lambda lines: [lines[0].replace('"num_steps": 3', '"num_steps": 4'), *lines[1:]],
        lambda lines: [lines[0].replace('"num_steps": 3', '"num_steps": 0'), *lines[1:]],
        lambda lines: [*lines[:2], lines[2].replace('"added": {}', '"added": {"00000": 3}')],
        lambda lines: ["\x00\xff"],
    ],
)
def test_a_record_that_is_not_what_was_written_is_refused(growing, change):
    run(follow(growing.path), range(9))
    path = growing.path.parent / "run" / "epochs.jsonl"
    changed = change(path.read_text().splitlines())
    path.write_text("\n".join(changed) + "\n")
    with pytest.raises(UserError, match=r"run/epochs\.jsonl: .*--output-dir"):
        run(follow(growing.path), range(1))


def test_a_record_of_other_settings_is_refused(growing):
    run(follow(growing.path), range(3))
    for other in ({"seed": 4}, {"window": 8}, {"num_held_out": 2}, {"global_batch_size": 32}):
        with pytest.raises(UserError, match="run with other settings"):
            follow(growing.path, **other).begin()
    assert follow(growing.path).begin()


def test_a_run_whose_record_is_gone_does_not_guess(growing):
    run(follow(growing.path), range(5))
    (growing.path.parent / "run" / "epochs.jsonl").unlink()
    with pytest.raises(UserError, match=r"ends at step 0; wanted the epochs up to step 5"):
        next(follow(growing.path).iter_batches(5, range(BATCH)))


def test_the_identity_does_not_depend_on_the_shards(growing):
    before = follow(growing.path).identity
    growing.add(*NAMES[2:])
    assert follow(growing.path).identity == before
    changes = ({"seed": 4}, {"window": 8}, {"global_batch_size": 32}, {"num_held_out": 1})
    assert len({before, *(follow(growing.path, **change).identity for change in changes)}) == 5


def test_epochs_are_counted_as_they_were(growing):
    reader = follow(growing.path)
    assert reader.epoch_at(0) == 0
    run(reader, range(10), grow_at(growing, **GROWTH))  # 3 steps, 6 steps, 13 steps
    found = [reader.epoch_at(step) for step in (0, 1, 3, 6, 9, 22)]
    assert found == pytest.approx([0, 1 / 3, 1, 1.5, 2, 3])


def test_it_has_what_a_batch_source_has(growing):
    reader = follow(growing.path)
    assert reader.latent_shape == (4, 8, 8)
    assert reader.scaling_factor == 0.2
    assert (reader.null_states.shape, reader.null_input_ids.shape) == ((5, 8), (5,))
    batch = next(reader.iter_batches(0, range(4, 8)))
    assert (batch.samples.shape, batch.moments.shape) == ((4,), (4, 8, 8, 8))


def test_no_thread_is_left_behind(growing):
    run(follow(growing.path), range(7), grow_at(growing, **GROWTH))
    left = [thread.name for thread in threading.enumerate()]
    assert not [name for name in left if name in ("prefetch", "fetch-ahead")]


# Stage 1 beside it.


def test_a_real_job_is_followed_while_it_runs(tmp_path, model_folder):
    """Shard by shard, with held-out samples; a replay of all of it, once it is done, is equal."""
    import precompute.job

    images = build_small_shards(tmp_path / "images", 12)

    out, followed = tmp_path / "latents", tmp_path / "followed"

    def patch() -> None:
        precompute.job._MANIFEST_SEC = 0.0
        precompute.job._MANIFEST_SHARE = 1.0
        update = precompute.job._Job._update_manifest

        def update_and_wait(job: Any) -> None:
            update(job)
            if len(Dataset(out).ledger) > 6:  # so that an epoch begins before all shards are there
                wait_until(followed.exists)

        precompute.job._Job._update_manifest = update_and_wait

    job = start_job(arguments(images, model_folder, out), tmp_path / "output", patch)
    wait_until((out / "dataset.json").exists)
    options: dict[str, Any] = {"global_batch_size": 24, "num_partitions": 8, "num_held_out": 6}

    def open_reader() -> FollowingReader:
        dataset = Dataset(out)
        image, text = dataset.image_column(32), dataset.text_column()
        record = tmp_path / "run" / "epochs.jsonl"
        defaults = {"seed": 0, "say": lambda text: None}
        return FollowingReader(dataset, image, text, record, **defaults, **options)

    reader = open_reader()
    batches, taken = reader.iter_batches(0, range(24)), []
    last = None
    while last is None or len(taken) < last:
        if last is None and not job.process.is_alive():
            last = len(taken) + 6  # what is left of the epoch that runs, and two whole ones
        taken.append(next(batches))
        followed.touch()
    batches.close()  # type: ignore[attr-defined]
    assert job.end()[0] == 0
    lines = record_of(out)
    assert 1 <= len(lines[0]["added"]) < 12
    assert sum(len(line["added"]) for line in lines) == 12
    assert lines[-1]["num_steps"] == (12 * 5 - reader.num_held_out) // 24
    assert reader.num_held_out >= 1
    log = log_of(reader, taken)
    assert not set(keys_held_out(reader)) & {key for _, key, *_ in log}
    again = open_reader()
    batches = again.iter_batches(0, range(24))
    assert log_of(again, [next(batches) for _ in taken]) == log
    batches.close()  # type: ignore[attr-defined]
