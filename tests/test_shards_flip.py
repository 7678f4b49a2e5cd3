"""Mirrored samples: which ones is a function of (seed, step, position), and the rest stays."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import rewrite_receipt

from shards.arrays import map_arrays, save_arrays
from shards.cache import ShardCache
from shards.checksum import with_checksums
from shards.column import ImageColumn
from shards.dataset import Column, Dataset
from shards.errors import DatasetError, UserError
from shards.flip import draw_flips, expect_mirror, mirror_spec
from shards.held_out import choose_held_out
from shards.layout import column_path
from shards.manifest import write_manifest
from shards.order import choose_partitions, positions_of_rank
from shards.reader import LatentReader
from shards.receipt import Receipt, commit, file_facts, read_receipt
from shards.storage import Location, location

LENGTHS = [40, 0, 70, 21]
SMALL = {"num_tokens": 5, "dim": 8, "captions_per_shard": 3, "dropped": 3, "too_small": 2}
BATCH = 16


def add_mirror(dataset: Dataset, spec: ImageColumn | None = None) -> Dataset:
    """What `--flip` adds: the same rows, their latents mirrored."""
    image = dataset.image_column(64)
    spec = spec or mirror_spec(image.spec)
    for shard in image.shards:
        arrays = {name: np.array(a) for name, a in image.map_shard(shard).items()}
        moments = {"moments": np.ascontiguousarray(arrays["moments"][..., ::-1])}
        row = arrays["row"]
        receipt = read_receipt(image.path_of(shard).with_suffix(".json"))
        facts = {n: v for n, v in vars(receipt).items() if not n.startswith("data_")}
        commit(
            column_path(dataset.path, spec.column_id, shard),
            partial(save_arrays, arrays={**with_checksums(spec, moments, row), "row": row}),
            lambda written, facts=facts: Receipt(**facts | {"column": spec.to_json()}, **written),
        )
    write_manifest(dataset.path)
    return Dataset(dataset.path)


@pytest.fixture(scope="module")
def dataset(
    tmp_path_factory: pytest.TempPathFactory, make_latent_dataset: Callable[..., Dataset]
) -> Dataset:
    path = tmp_path_factory.mktemp("flip") / "latents"
    return add_mirror(make_latent_dataset(path, LENGTHS, **SMALL))


def reader_of(dataset: Dataset, flip_prob: float, **options: Any) -> LatentReader:
    image = dataset.image_column(64)
    defaults = {"seed": 5, "global_batch_size": BATCH, "window": 20}
    return LatentReader(
        dataset,
        image,
        dataset.text_column(),
        num_partitions=choose_partitions(BATCH),
        flipped=dataset.flipped_column(image),
        flip_prob=flip_prob,
        **{**defaults, **options},
    )


def read_everything(dataset: Dataset, flip_prob: float) -> None:
    reader = reader_of(dataset, flip_prob)
    for step in range(20):
        reader.gather(step, range(BATCH))


def was_flipped(found: np.ndarray, plain: np.ndarray) -> bool:
    """Which of the two it is, and that it is one of them."""
    assert (found == plain).all() != (found == plain[..., ::-1]).all()
    return bool((found == plain[..., ::-1]).all())


def flips_read(reader: LatentReader, plain: LatentReader, steps: range) -> np.ndarray:
    """What came mirrored, [steps, batch]; everything else must be as it is without flips."""
    rows = []
    for step in steps:
        found, wanted = (each.gather(step, range(BATCH)) for each in (reader, plain))
        assert found.samples.tolist() == wanted.samples.tolist()
        assert found.states.tobytes() == wanted.states.tobytes()
        pairs = zip(found.moments, wanted.moments, strict=True)
        rows.append([was_flipped(one, other) for one, other in pairs])
    return np.array(rows)


@pytest.mark.parametrize("prob", [0.1, 0.5, 0.9])
def test_the_drawn_samples_come_mirrored_with_their_own_captions(dataset, prob):
    steps = range(60)
    found = flips_read(reader_of(dataset, prob), reader_of(dataset, 0.0), steps)
    assert abs(found.mean() - prob) < 4 * np.sqrt(prob * (1 - prob) / found.size)
    assert found.any(axis=0).sum() > 0
    for step in steps:
        assert draw_flips(5, step, range(BATCH), BATCH, prob).tolist() == found[step].tolist()


def test_a_sample_is_mirrored_in_some_epochs_and_not_in_others(dataset):
    reader, plain = reader_of(dataset, 0.5), reader_of(dataset, 0.0)
    seen: dict[int, set[bool]] = {}
    for step in range(8 * 8):
        batch = plain.gather(step, range(BATCH))
        flips = flips_read(reader, plain, range(step, step + 1))[0]
        for sample, flip in zip(batch.samples.tolist(), flips.tolist(), strict=True):
            seen.setdefault(sample, set()).add(flip)
    assert len(seen) == 131
    assert np.mean([len(both) == 2 for both in seen.values()]) > 0.9


@pytest.mark.parametrize("world_size", [2, 4, 16])
def test_any_number_of_processes_flips_the_same_samples(dataset, world_size):
    alone = reader_of(dataset, 0.5)
    shares = [positions_of_rank(BATCH, BATCH, rank, world_size) for rank in range(world_size)]
    readers = [reader_of(dataset, 0.5).iter_batches(3, share) for share in shares]
    for step in range(3, 12):
        together = np.concatenate([next(batches).moments for batches in readers])
        assert together.tobytes() == alone.gather(step, range(BATCH)).moments.tobytes()
    for batches in readers:
        batches.close()


def test_a_coin_depends_on_seed_step_and_position_alone():
    coins = np.stack([draw_flips(0, step, range(64), 64, 0.5) for step in range(200)])
    assert draw_flips(0, 7, range(20, 30), 64, 0.5).tolist() == coins[7, 20:30].tolist()
    assert 0.47 < coins.mean() < 0.53
    assert abs(np.corrcoef(coins[:-1].ravel(), coins[1:].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(coins[:, :-1].ravel(), coins[:, 1:].ravel())[0, 1]) < 0.05
    assert (draw_flips(1, 7, range(64), 64, 0.5) != coins[7]).any()
    assert not np.isin(coins.sum(axis=1), [0, 64]).any()


def test_never_is_never_and_always_is_always():
    steps = range(50)
    assert not np.stack([draw_flips(3, step, range(64), 64, 0.0) for step in steps]).any()
    assert np.stack([draw_flips(3, step, range(64), 64, 1.0) for step in steps]).all()


def test_more_flips_keep_those_that_there_were():
    few, many = (draw_flips(3, 9, range(512), 512, prob) for prob in (0.3, 0.6))
    assert (few <= many).all()


def test_coins_are_the_same_tomorrow():
    """A change of these changes every run with flips that is resumed."""
    assert draw_flips(3, 11, range(16), 16, 0.5).astype(int).tolist() == [
        *(0, 1, 1, 1, 1, 1, 0, 0),
        *(0, 0, 1, 0, 0, 1, 0, 0),
    ]


def test_flips_are_part_of_the_identity_and_none_change_nothing(dataset):
    image, text = dataset.image_column(64), dataset.text_column()
    options = {"seed": 5, "global_batch_size": BATCH, "num_partitions": BATCH, "window": 20}
    plain = LatentReader(dataset, image, text, **options).identity
    assert reader_of(dataset, 0.0).identity == plain
    assert len({reader_of(dataset, prob).identity for prob in (0.0, 0.2, 0.5)}) == 3


def test_held_out_samples_are_never_mirrored(dataset):
    held_out = choose_held_out(dataset, dataset.image_column(64), 6)
    assert len(held_out) > 3
    always, never = (reader_of(dataset, prob, held_out=held_out) for prob in (1.0, 0.0))
    for found, wanted in zip(
        always.iter_held_out(0, len(held_out), 4),
        never.iter_held_out(0, len(held_out), 4),
        strict=True,
    ):
        assert found.moments.tobytes() == wanted.moments.tobytes()
    served = flips_read(always, never, range(20))
    assert served.all()


def test_damage_in_the_mirrored_column_is_refused_by_its_name(tmp_path, dataset):
    copy = Dataset(shutil.copytree(dataset.path, tmp_path / "latents"))
    path = copy.flipped_column(copy.image_column(64)).path_of("00002")
    data = bytearray(path.read_bytes())
    data[-2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"moments-64-flip-\w+/00002\.safetensors: row \d+ does"):
        read_everything(copy, 1.0)


# Behind a URL.


@pytest.fixture
def remote(dataset: Dataset) -> Iterator[Location]:
    folder = location("memory://flip/latents")
    folder.fs.put(str(dataset.path), folder.path, recursive=True)
    yield folder
    folder.fs.rm(folder.path, recursive=True)


def test_a_remote_dataset_serves_the_same_flips_and_fetches_them_ahead(dataset, remote, tmp_path):
    reader = reader_of(Dataset(remote, ShardCache(tmp_path / "cache")), 0.5)
    wanted = reader_of(dataset, 0.5)
    batches = reader.iter_batches(0, range(BATCH))
    for step in range(20):
        assert (
            next(batches).moments.tobytes() == wanted.gather(step, range(BATCH)).moments.tobytes()
        )
    batches.close()
    assert len(list((tmp_path / "cache").iterdir())) == 3 * 3  # columns and shards with rows


def test_mirrored_shards_count_where_the_cache_is_too_small(dataset, remote, tmp_path):
    """All shards are wanted at once here, of three columns."""
    image, text = dataset.image_column(64), dataset.text_column()
    with_rows = [name for name, entry in image.shards.items() if entry["rows"]]
    size = sum(column.shards[name]["bytes"] for name in with_rows for column in (image, text))
    small = Dataset(remote, ShardCache(tmp_path / "cache", size))
    next(reader_of(small, 0.0).iter_batches(0, range(BATCH)))
    with pytest.raises(UserError, match=r"of cache for this process.*--cache-gib"):
        next(reader_of(small, 0.5).iter_batches(0, range(BATCH)))


# Columns that are no mirror.


def without(column: Column[ImageColumn], shard: str) -> Column[ImageColumn]:
    return replace(column, shards={n: e for n, e in column.shards.items() if n != shard})


def test_a_dataset_without_mirrored_images_names_the_command_that_makes_them(
    tmp_path, make_latent_dataset
):
    dataset = make_latent_dataset(tmp_path / "latents", [10], **SMALL)
    with pytest.raises(DatasetError, match=r'mirrored images of moments-64-.*ARGS="--flip"'):
        dataset.flipped_column(dataset.image_column(64))


def test_the_mirrored_column_has_no_mirror_itself(dataset):
    flipped = dataset.flipped_column(dataset.image_column(64))
    assert flipped.spec.is_flipped
    with pytest.raises(DatasetError, match="--flip"):
        dataset.flipped_column(flipped)
    with pytest.raises(DatasetError, match="other settings"):
        expect_mirror(flipped, flipped)


@pytest.mark.parametrize(
    "change",
    [
        {"weights_sha256": "3" * 64},
        {"scaling_factor": 0.3},
        {"encoder_config": {"random": 8}},
        {"latents": "mean"},
        {"resolution": 128, "latent_size": 16},
        {"storage_dtype": "int8"},
        {"compute_dtype": "bfloat16"},
        {"transform": {"resize": "other", "flip": "horizontal"}},
        {"transform": {"resize": "none"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_column_of_other_settings_is_refused(dataset, change):
    image = dataset.image_column(64)
    flipped = dataset.flipped_column(image)
    other = replace(flipped, spec=replace(flipped.spec, **change))
    with pytest.raises(DatasetError, match=r'was made with other settings.*ARGS="--flip"'):
        expect_mirror(image, other)


def test_a_column_of_other_shards_or_rows_is_refused(dataset):
    image = dataset.image_column(64)
    flipped = dataset.flipped_column(image)
    for one, other in ((image, without(flipped, "00002")), (without(image, "00002"), flipped)):
        with pytest.raises(DatasetError, match=r"1 of [34] shards missing.*00002.*ARGS=\"--flip\""):
            expect_mirror(one, other)
    shards = {**flipped.shards, "00000": {**flipped.shards["00000"], "rows": 39}}
    with pytest.raises(DatasetError, match=r"1 of 4 shards missing or of other rows \(00000"):
        expect_mirror(image, replace(flipped, shards=shards))


def test_as_many_rows_but_others_are_refused_by_name(tmp_path, dataset):
    """Receipts agree; the rows of the ledger that are meant do not."""
    copy = Dataset(shutil.copytree(dataset.path, tmp_path / "latents"))
    flipped = copy.flipped_column(copy.image_column(64))
    path = flipped.path_of("00002")
    arrays = {name: np.array(array) for name, array in map_arrays(path).items()}
    row = arrays["row"].copy()
    row[0] = min(set(range(flipped.shards["00002"]["rows_in"])) - set(row.tolist()))
    made = {**with_checksums(flipped.spec, {"moments": arrays["moments"]}, row), "row": row}
    fields = vars(read_receipt(path.with_suffix(".json")))
    save_arrays(path, made)
    rewrite_receipt(path, Receipt(**{**fields, **file_facts(path)}))
    write_manifest(copy.path)
    copy = Dataset(copy.path)
    with pytest.raises(DatasetError, match=r"moments-64-flip-\w+/00002\.safetensors: other rows"):
        read_everything(copy, 0.5)


def test_a_real_job_with_flip_serves_latents_of_the_mirrored_images(
    tmp_path: Path, model_folder: Path, image_shards: Path
):
    from precompute.config import PrecomputeConfig
    from precompute.job import precompute

    out = tmp_path / "latents"
    places = {"shards": str(image_shards / "00000.tar"), "model": str(model_folder)}
    precompute(PrecomputeConfig(**places, out=str(out), resolutions="64", device="cpu", flip=True))
    dataset = Dataset(out)
    mirrored, plain = (
        LatentReader(
            dataset,
            dataset.image_column(64),
            dataset.text_column(),
            seed=0,
            global_batch_size=4,
            num_partitions=4,
            flipped=dataset.flipped_column(dataset.image_column(64)),
            flip_prob=prob,
        ).gather(0, range(4))
        for prob in (1.0, 0.0)
    )
    assert mirrored.states.tobytes() == plain.states.tobytes()
    for one, other in zip(mirrored.moments.astype(float), plain.moments.astype(float), strict=True):
        # A VAE does not commute with mirroring, but it nearly does.
        turned = np.corrcoef(one[:4].ravel(), other[:4, :, ::-1].ravel())[0, 1]
        unturned = np.corrcoef(one[:4].ravel(), other[:4].ravel())[0, 1]
        assert turned > unturned
