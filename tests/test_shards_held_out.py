"""Held-out samples: chosen by the hashes of names and keys, and never served to training."""

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shards.row_index
from shards.arrays import map_arrays
from shards.dataset import Dataset
from shards.errors import CorruptFileError, UserError
from shards.held_out import HeldOut, choose_held_out
from shards.layout import column_path, ledger_path
from shards.ledger import LedgerRow, read_ledger, save_ledger
from shards.manifest import write_manifest
from shards.order import SampleOrder, choose_partitions, positions_of_rank
from shards.reader import LatentReader
from shards.receipt import Receipt, commit, read_receipt

LENGTHS = [130, 0, 301, 90, 57, 1]
SMALL = {"num_tokens": 5, "dim": 8, "captions_per_shard": 3, "dropped": 4, "too_small": 5}
BATCH = 16


@pytest.fixture(scope="module")
def dataset(
    tmp_path_factory: pytest.TempPathFactory, make_latent_dataset: Callable[..., Dataset]
) -> Dataset:
    """579 samples; 30 more that are good and in no image column; 24 that were dropped."""
    path = tmp_path_factory.mktemp("held-out") / "latents"
    return make_latent_dataset(path, LENGTHS, resolutions=(32, 64), **SMALL)


def reader_of(
    dataset: Dataset, held_out: HeldOut | None, *, resolution: int = 64, **options: Any
) -> LatentReader:
    defaults = {"seed": 3, "global_batch_size": BATCH, "window": 20}
    return LatentReader(
        dataset,
        dataset.image_column(resolution),
        dataset.text_column(),
        num_partitions=choose_partitions(BATCH),
        held_out=held_out,
        **{**defaults, **options},
    )


def keys_held_out(dataset: Dataset, num_samples: int, resolution: int = 64) -> set[str]:
    """Read independently of the code under test."""
    image = dataset.image_column(resolution)
    keys = set()
    for shard, rows in choose_held_out(dataset, image, num_samples).rows.items():
        ledger = read_ledger(ledger_path(dataset.path, shard))
        row = map_arrays(column_path(dataset.path, image.column_id, shard))["row"]
        keys |= {f"{shard}/{ledger[row[number]]['key']}" for number in rows}
    return keys


def all_keys(dataset: Dataset, resolution: int = 64) -> list[str]:
    """`<shard>/<key>` of every sample of an image column, by its number."""
    image = dataset.image_column(resolution)
    keys = []
    for shard in sorted(image.shards):
        ledger = read_ledger(ledger_path(dataset.path, shard))
        row = map_arrays(column_path(dataset.path, image.column_id, shard))["row"]
        keys += [f"{shard}/{ledger[number]['key']}" for number in row]
    return keys


def rewrite_keys(dataset: Dataset, shard: str, keys: list[str]) -> None:
    """Write a shard's ledger again with other keys."""
    path = ledger_path(dataset.path, shard)
    receipt = read_receipt(path.with_suffix(".json"))
    rows = [
        LedgerRow(key=key, status=row["status"])
        for key, row in zip(keys, read_ledger(path), strict=True)
    ]
    path.unlink()
    path.with_suffix(".json").unlink()
    facts = {k: v for k, v in vars(receipt).items() if not k.startswith("data_")}
    commit(path, partial(save_ledger, rows=rows), lambda written: Receipt(**facts, **written))


@pytest.mark.parametrize("num_samples", [0, 1, 7, 25, 10_000])
def test_as_many_as_are_wanted_are_held_out_but_never_more_than_one_in_twenty(dataset, num_samples):
    good = sum(entry["rows"] for entry in dataset.ledger.values())
    found = len(choose_held_out(dataset, dataset.image_column(64), num_samples))
    limit = min(num_samples, good // 20)
    assert found <= limit
    assert found >= 0.6 * limit  # 30 of 609 good ones are in no column, and count as well


@pytest.mark.parametrize("limit", [3, 7, 12, 20, 30])
def test_the_rule_is_the_documented_one(dataset, limit):
    """Shards by the hash of their names, keys by the hash of the keys: written down once more."""

    def rank(name: str) -> str:
        return hashlib.sha256(name.encode()).hexdigest()

    pool, num_rows = [], 0
    for shard in sorted(dataset.ledger, key=rank):
        if num_rows >= 20 * limit:
            break
        ledger = read_ledger(ledger_path(dataset.path, shard))
        good = [f"{shard}/{row['key']}" for row in ledger if row["status"] == "ok"]
        num_rows += len(good)
        pool += good
    chosen = sorted(pool, key=lambda name: rank(name.split("/")[1]))[:limit]
    assert len(pool) < 609 or limit == 30, "else this chooses from all shards"
    assert keys_held_out(dataset, limit) == set(chosen) & set(all_keys(dataset))


def test_both_resolutions_hold_out_the_same_keys(tmp_path, make_latent_dataset, latent_dataset):
    """Of a real job whose 64-px column lacks 6 of 60 images; and then with as many as there are."""
    copy = Dataset(shutil.copytree(latent_dataset, tmp_path / "latents"))
    small, large = (keys_held_out(copy, 1000, resolution) for resolution in (32, 64))
    assert len(small) == 3
    assert large == small & set(all_keys(copy, 64))
    dataset = make_latent_dataset(tmp_path / "more", LENGTHS, resolutions=(32, 64), **SMALL)
    assert keys_held_out(dataset, 20, 32) == keys_held_out(dataset, 20, 64) != set()


def test_an_image_too_small_for_the_column_is_held_out_of_the_smaller_one_alone(
    tmp_path, latent_dataset
):
    dataset = Dataset(shutil.copytree(latent_dataset, tmp_path / "latents"))
    only_small = sorted(set(all_keys(dataset, 32)) - set(all_keys(dataset, 64)))
    assert only_small
    shard, key = only_small[0].split("/")
    # The key whose hash is the least of many: it is certain to be held out.
    least = min((f"{n}" for n in range(10_000)), key=lambda n: hashlib.sha256(n.encode()).digest())
    ledger = read_ledger(ledger_path(dataset.path, shard))
    keys = [least if row["key"] == key else row["key"] for row in ledger]
    rewrite_keys(dataset, shard, keys)
    write_manifest(dataset.path)
    dataset = Dataset(dataset.path)
    small, large = (keys_held_out(dataset, 3, resolution) for resolution in (32, 64))
    assert f"{shard}/{least}" in small
    assert large == small - {f"{shard}/{least}"}


def test_seed_batch_and_window_play_no_part(dataset):
    held_out = choose_held_out(dataset, dataset.image_column(64), 25)
    again = choose_held_out(Dataset(dataset.path), dataset.image_column(64), 25)
    assert held_out == again
    for options in ({"seed": 9}, {"window": 3}):
        reader = reader_of(dataset, held_out, **options)
        (batch,) = reader.iter_held_out(0, reader.num_held_out, 1000)
        (same,) = reader_of(dataset, held_out).iter_held_out(0, len(held_out), 1000)
        assert batch.samples.tolist() == same.samples.tolist()


@pytest.mark.parametrize("world_size", [1, 2, 4, 16])
def test_no_held_out_sample_is_ever_served_every_other_is_and_none_twice(dataset, world_size):
    held_out = choose_held_out(dataset, dataset.image_column(64), 25)
    secret = keys_held_out(dataset, 25)
    assert 15 <= len(secret) <= 25
    readers = [reader_of(dataset, held_out) for _ in range(world_size)]
    partitions = readers[0].order.num_partitions
    shares = [positions_of_rank(BATCH, partitions, r, world_size) for r in range(world_size)]
    per_epoch = readers[0].order.samples_per_epoch
    assert per_epoch == (579 - len(held_out)) // BATCH * BATCH
    everyone, served = all_keys(dataset), Counter[str]()
    for epoch in range(4):
        seen: list[int] = []
        for step in range(epoch * per_epoch // BATCH, (epoch + 1) * per_epoch // BATCH):
            for reader, share in zip(readers, shares, strict=True):
                shards, rows = reader.order.locate(step, share)
                seen += reader.sample_numbers(shards, rows).tolist()
        assert len(seen) == len(set(seen)) == per_epoch
        served.update(everyone[sample] for sample in seen)
    assert not served.keys() & secret
    assert served.keys() == set(everyone) - secret


def test_the_batches_themselves_hold_no_held_out_row(dataset):
    """Not numbers but bytes: what is gathered, ahead of need too, against what was held out."""
    held_out = choose_held_out(dataset, dataset.image_column(64), 25)
    reader = reader_of(dataset, held_out)
    secret = {
        moments.tobytes()
        for batch in reader.iter_held_out(0, len(held_out), 4)
        for moments in batch.moments
    }
    assert len(secret) == len(held_out)
    served = set()
    batches = reader.iter_batches(0, range(BATCH))
    for _ in range(3 * reader.order.samples_per_epoch // BATCH):
        served |= {moments.tobytes() for moments in next(batches).moments}
    batches.close()
    assert not served & secret
    assert len(served) == 579 - len(held_out)


def test_sample_numbers_are_those_of_the_whole_column(dataset):
    held_out = choose_held_out(dataset, dataset.image_column(64), 25)
    plain, reader = reader_of(dataset, None), reader_of(dataset, held_out)
    moments = {}
    for step in range(80):
        batch = plain.gather(step, range(BATCH))
        moments |= dict(zip(batch.samples.tolist(), batch.moments, strict=True))
    for step in range(40):
        batch = reader.gather(step, range(BATCH))
        for sample, found in zip(batch.samples.tolist(), batch.moments, strict=True):
            assert found.tobytes() == moments[sample].tobytes()


def test_the_held_out_samples_are_the_same_in_any_slices(dataset):
    held_out = choose_held_out(dataset, dataset.image_column(64), 25)
    reader = reader_of(dataset, held_out)
    total = reader.num_held_out
    (whole,) = reader.iter_held_out(0, total, total)
    assert whole.step == -1
    assert set(reader.keys_of(whole.samples)) == keys_held_out(dataset, 25)
    for cut, size in ((1, 1), (5, 4), (total, 7), (0, 1000)):
        parts = [*reader.iter_held_out(0, cut, size), *reader.iter_held_out(cut, total, size)]
        assert max(len(part.samples) for part in parts) <= size
        for name in ("samples", "moments", "states"):
            together = np.concatenate([getattr(part, name) for part in parts])
            assert together.tobytes() == getattr(whole, name).tobytes()
    assert list(reader.iter_held_out(3, 3, 4)) == []


def test_validating_in_mid_run_changes_no_batch(dataset):
    held_out = choose_held_out(dataset, dataset.image_column(64), 25)
    wanted = reader_of(dataset, held_out)
    reader = reader_of(dataset, held_out)
    batches = reader.iter_batches(0, range(BATCH))
    for step in range(12):
        batch = next(batches)
        list(reader.iter_held_out(0, len(held_out), 6))
        assert batch.moments.tobytes() == wanted.gather(step, range(BATCH)).moments.tobytes()
    batches.close()


def test_keys_name_samples_by_shard_and_ledger(dataset):
    reader, everyone = reader_of(dataset, None), all_keys(dataset)
    assert reader.keys_of(np.arange(579)) == everyone
    some = np.array([578, 0, 130, 129, 131, 0])
    assert reader.keys_of(some) == [everyone[sample] for sample in some]
    assert reader.keys_of(np.array([], np.int64)) == []


def test_without_held_out_samples_order_and_identity_are_what_they_were(dataset):
    plain = reader_of(dataset, None)
    for nothing in (HeldOut({}), choose_held_out(dataset, dataset.image_column(64), 0)):
        reader = reader_of(dataset, nothing)
        assert reader.identity == plain.identity
        assert (reader.num_held_out, list(reader.iter_held_out(0, 0, 8))) == (0, [])
        for step in range(5):
            assert reader.order.locate(step, range(BATCH))[1].tolist() == (
                plain.order.locate(step, range(BATCH))[1].tolist()
            )


def test_what_is_held_out_is_part_of_the_identity(dataset):
    image = dataset.image_column(64)
    found = [reader_of(dataset, choose_held_out(dataset, image, n)).identity for n in (0, 7, 25)]
    assert len(set(found)) == 3


def test_a_key_that_comes_several_times_is_held_out_everywhere_or_nowhere(
    tmp_path, make_latent_dataset
):
    """Datasets whose shards each count from 0: the same names for other pictures, or the same."""
    dataset = make_latent_dataset(tmp_path / "latents", [60] * 5, **(SMALL | {"too_small": 0}))
    for shard in dataset.ledger:
        rewrite_keys(dataset, shard, [f"{number:04d}" for number in range(64)])
    write_manifest(dataset.path)
    dataset = Dataset(dataset.path)
    everyone = [name.split("/") for name in all_keys(dataset)]
    for num_samples, num_shards in ((4, 2), (7, 3), (15, 5)):
        found = [name.split("/") for name in keys_held_out(dataset, num_samples)]
        assert 0 < len(found) <= num_samples
        looked_at = {shard for shard, _ in found}
        assert len(looked_at) == num_shards
        keys = {key for _, key in found}
        assert sorted(found) == sorted([s, k] for s, k in everyone if k in keys and s in looked_at)


def test_one_key_for_all_holds_out_nothing_rather_than_everything(tmp_path, make_latent_dataset):
    dataset = make_latent_dataset(tmp_path / "latents", [60], **(SMALL | {"too_small": 0}))
    rewrite_keys(dataset, "00000", ["same"] * 64)
    write_manifest(dataset.path)
    dataset = Dataset(dataset.path)
    assert len(choose_held_out(dataset, dataset.image_column(64), 3)) == 0


def renamed(dataset: Dataset, to: Path, names: dict[str, str]) -> Dataset:
    """A dataset's index as if its shards had other names; what is read is linked."""
    for folder in dataset.path.iterdir():
        if folder.is_dir():
            (to / folder.name).mkdir(parents=True)
            for file in folder.iterdir():
                name = names.get(file.stem, file.stem)
                (to / folder.name / f"{name}{file.suffix}").symlink_to(file)
    (to / "dataset.json").symlink_to(dataset.path / "dataset.json")
    spread = Dataset(to)
    for column in spread.columns.values():
        entries = {names[name]: entry for name, entry in column.shards.items()}
        column.shards.clear()
        column.shards.update(entries)
    spread.ledger = {names[name]: entry for name, entry in spread.ledger.items()}
    return spread


def test_shards_that_rank_behind_leave_the_choice_as_it_is_and_others_may_change_it(
    tmp_path, make_latent_dataset
):
    """What is honest to promise of a dataset that grows: see the rule."""
    plain = make_latent_dataset(tmp_path / "plain", [400, 30, 30], **SMALL)
    ranked = sorted(
        (f"{n:05d}" for n in range(40)), key=lambda n: hashlib.sha256(n.encode()).digest()
    )
    places = (ranked[5], ranked[20], ranked[30])
    dataset = renamed(plain, tmp_path / "all", dict(zip(sorted(plain.ledger), places, strict=True)))
    image = dataset.image_column(64)
    whole = choose_held_out(dataset, image, 10)
    assert whole.rows.keys() == {ranked[5]}
    without_last = Dataset(dataset.path)
    without_last.ledger = {n: e for n, e in dataset.ledger.items() if n != ranked[30]}
    assert choose_held_out(without_last, image, 10) == whole
    without_first = Dataset(dataset.path)
    without_first.ledger = {n: e for n, e in dataset.ledger.items() if n != ranked[5]}
    assert choose_held_out(without_first, image, 10) != whole


def test_few_ledgers_of_many_are_read(tmp_path, make_latent_dataset, monkeypatch):
    dataset = make_latent_dataset(tmp_path / "latents", [40] * 30, **SMALL)
    read = []
    monkeypatch.setattr(
        shards.row_index,
        "read_ledger",
        lambda path, columns: [read.append(path), read_ledger(path, columns)][1],
    )
    assert len(choose_held_out(dataset, dataset.image_column(64), 5)) > 0
    assert len(read) == 3  # 45 good rows each; 100 are wanted


def test_a_ledger_that_is_missing_or_of_another_length_is_refused_by_name(
    tmp_path, make_latent_dataset
):
    dataset = make_latent_dataset(tmp_path / "latents", [60], **SMALL)
    path = ledger_path(dataset.path, "00000")
    rows = [LedgerRow(key="one", status="ok")]
    path.unlink()
    with pytest.raises(CorruptFileError, match=r"ledger/00000\.parquet: cannot be read"):
        choose_held_out(dataset, dataset.image_column(64), 3)
    save_ledger(path, rows)
    with pytest.raises(CorruptFileError, match=r"ledger/00000\.parquet: 1 rows; wanted 69"):
        choose_held_out(dataset, dataset.image_column(64), 3)
    with pytest.raises(CorruptFileError, match=r"ledger/00000\.parquet: 1 rows; wanted 69"):
        reader_of(dataset, None).keys_of(np.array([3]))


# The order over what is left.


@pytest.mark.parametrize("window", [1, 7, 1000])
def test_an_order_steps_over_any_rows_at_all(window):
    rng = np.random.default_rng(0)
    for _ in range(30):
        lengths = rng.integers(0, 30, rng.integers(1, 8))
        lengths[0] += 20
        held_out = {
            shard: np.flatnonzero(rng.random(length) < rng.choice([0.1, 0.5, 0.9, 1.0]))
            for shard, length in enumerate(lengths.tolist())
            if shard and rng.random() < 0.7
        }
        order = SampleOrder(
            lengths, seed=1, global_batch_size=4, num_partitions=4, window=window, held_out=held_out
        )
        gone = {(shard, row) for shard, rows in held_out.items() for row in rows.tolist()}
        every = {(s, row) for s, length in enumerate(lengths.tolist()) for row in range(length)}
        seen = []
        for step in range(order.samples_per_epoch // 4):
            seen += list(zip(*(a.tolist() for a in order.locate(step, range(4))), strict=True))
        assert len(seen) == len(set(seen)) == len(every - gone) // 4 * 4
        assert set(seen) <= every - gone


def test_holding_out_all_that_a_batch_needs_is_refused():
    with pytest.raises(UserError, match="3 samples; wanted at least 4"):
        SampleOrder(
            np.array([10]),
            seed=0,
            global_batch_size=4,
            num_partitions=4,
            held_out={0: np.arange(7)},
        )
