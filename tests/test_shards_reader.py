"""The reader gathers exactly the rows that the order names, and refuses what does not fit."""

import re
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import rewrite_receipt, run_python
from safetensors.numpy import load_file

from shards.arrays import map_arrays, save_arrays
from shards.batch import LatentBatch
from shards.dataset import Dataset
from shards.errors import DatasetError
from shards.ledger import read_ledger
from shards.manifest import write_manifest
from shards.order import choose_partitions, positions_of_rank
from shards.reader import LatentReader
from shards.receipt import Receipt, file_facts, read_receipt

LENGTHS = [13, 0, 30, 9]
SMALL = {"num_tokens": 5, "dim": 8, "captions_per_shard": 3, "dropped": 4, "too_small": 2}


@pytest.fixture
def dataset(tmp_path: Path, make_latent_dataset: Callable[..., Dataset]) -> Dataset:
    return make_latent_dataset(tmp_path / "latents", LENGTHS, resolutions=(32, 64), **SMALL)


def reader_of(
    dataset: Dataset, *, batch: int = 8, resolution: int = 64, **options: Any
) -> LatentReader:
    return LatentReader(
        dataset,
        dataset.image_column(resolution),
        dataset.text_column(),
        **{"seed": 0, "window": 7, **options},
        global_batch_size=batch,
        num_partitions=choose_partitions(batch),
    )


def expected_rows(dataset: Dataset, resolution: int = 64) -> list[tuple[np.ndarray, np.ndarray]]:
    """Moments and states of every sample, by its number, read with the safetensors library."""
    rows = []
    image_id = dataset.image_column(resolution).column_id
    for shard in sorted(dataset.ledger):
        image = load_file(dataset.path / image_id / f"{shard}.safetensors")
        text = load_file(dataset.path / dataset.text_column().column_id / f"{shard}.safetensors")
        for moments, row in zip(image["moments"], image["row"], strict=True):
            rows.append((moments, text["states"][text["caption"][row]]))
    return rows


def rewrite(path: Path, **changed: np.ndarray) -> None:
    """Write other arrays with a receipt that fits: what a faulty writer would leave."""
    arrays = {name: np.array(array) for name, array in map_arrays(path).items()}
    fields = vars(read_receipt(path.with_suffix(".json")))
    save_arrays(path, {**arrays, **changed})
    rewrite_receipt(path, Receipt(**{**fields, **file_facts(path)}))
    write_manifest(path.parent.parent)


def read_everything(path: Path) -> None:
    reader = reader_of(Dataset(path))
    for step in range(7):
        reader.gather(step, range(8))


def test_a_batch_holds_exactly_the_rows_that_the_order_names(dataset):
    expected = expected_rows(dataset)
    reader = reader_of(dataset)
    first = np.concatenate([[0], np.cumsum(LENGTHS)[:-1]])
    for step in range(20):  # three epochs
        batch = reader.gather(step, range(8))
        shards, rows = reader.order.locate(step, range(8))
        assert batch.step == step
        assert batch.samples.tolist() == (first[shards] + rows).tolist()
        for sample, moments, states in zip(batch.samples, batch.moments, batch.states, strict=True):
            assert moments.tobytes() == expected[sample][0].tobytes()
            assert states.tobytes() == expected[sample][1].tobytes()


def test_an_image_comes_with_its_own_caption(latent_dataset):
    """Through a real job with absent rows: decode which picture it is from the ledger."""
    dataset = Dataset(latent_dataset)
    column, text = dataset.image_column(64), dataset.text_column()
    captions = []
    for shard in column.shards:
        ledger = read_ledger(latent_dataset / "ledger" / f"{shard}.parquet")
        captions += [ledger[row]["caption"] for row in column.map_shard(shard)["row"]]
    ids = {}
    for shard in text.shards:
        arrays = text.map_shard(shard)
        for row, entry in enumerate(
            read_ledger(latent_dataset / "ledger" / f"{shard}.parquet", ["caption"])
        ):
            ids[entry["caption"]] = arrays["states"][arrays["caption"][row]]
    batch = reader_of(dataset, batch=16).gather(2, range(16))
    for sample, states in zip(batch.samples, batch.states, strict=True):
        assert states.tobytes() == ids[captions[sample]].tobytes()


def test_batches_have_the_declared_shapes_and_types(dataset):
    reader = reader_of(dataset, resolution=32)
    batch = reader.gather(0, range(8))
    assert reader.latent_shape == (4, 4, 4)
    assert (batch.moments.shape, batch.moments.dtype) == ((8, 8, 4, 4), np.float16)
    assert (batch.states.shape, batch.states.dtype) == ((8, 5, 8), np.float16)
    assert (batch.samples.shape, batch.samples.dtype) == ((8,), np.int64)
    assert reader.scaling_factor == 0.2
    assert (reader.null_states.shape, reader.null_states.dtype) == ((5, 8), np.float16)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_ranks_together_read_what_one_process_reads(dataset, world_size):
    alone = reader_of(dataset).gather(3, range(8))
    shares = [positions_of_rank(8, 8, rank, world_size) for rank in range(world_size)]
    parts = [reader_of(dataset).gather(3, share) for share in shares]
    for name in ("samples", "moments", "states"):
        together = np.concatenate([getattr(part, name) for part in parts])
        assert together.tobytes() == getattr(alone, name).tobytes()


def take(reader: LatentReader, first_step: int, count: int) -> list[LatentBatch]:
    batches = reader.iter_batches(first_step, range(8))
    taken = list(islice(batches, count))
    batches.close()  # type: ignore[attr-defined]
    return taken


def test_batches_come_without_end_over_many_epochs(dataset):
    reader = reader_of(dataset)
    steps = 4 * reader.order.samples_per_epoch // 8
    batches = take(reader, 0, steps)
    assert [batch.step for batch in batches] == list(range(steps))
    samples = np.concatenate([batch.samples for batch in batches])
    times = np.bincount(samples, minlength=52)  # 48 of 52 in each of four epochs
    assert (times.min(), times.max()) == (2, 4)
    assert reader.epoch_at(steps) == 4


def test_a_resumed_reader_goes_on_where_it_stopped(dataset):
    continuous = take(reader_of(dataset), 0, 12)
    resumed = take(reader_of(dataset), 5, 7)
    for batch, wanted in zip(resumed, continuous[5:], strict=True):
        assert batch.step == wanted.step
        assert batch.samples.tolist() == wanted.samples.tolist()
        assert batch.moments.tobytes() == wanted.moments.tobytes()


def test_batches_do_not_share_memory(dataset):
    first, second = take(reader_of(dataset), 0, 2)
    kept = first.moments.copy()
    second.moments[:] = 0
    assert np.array_equal(first.moments, kept)


def test_buffers_come_from_the_caller(dataset):
    made = []

    def allocate(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        made.append(np.empty(shape, dtype))
        return made[-1]

    batch = reader_of(dataset, allocate=allocate).gather(0, range(8))
    assert any(batch.moments is buffer for buffer in made)
    assert any(batch.states is buffer for buffer in made)


def test_closing_the_iterator_stops_its_thread(dataset):
    take(reader_of(dataset), 0, 3)
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}


def test_the_identity_says_whether_two_runs_see_the_same_samples(
    dataset, tmp_path, make_latent_dataset
):
    same = [reader_of(dataset).identity, reader_of(Dataset(dataset.path)).identity]
    shorter = make_latent_dataset(tmp_path / "b", [13, 0, 30, 8], resolutions=(32, 64), **SMALL)
    other = make_latent_dataset(tmp_path / "c", LENGTHS, resolutions=(32, 64), seed=1, **SMALL)
    others = [
        reader_of(dataset, seed=1).identity,
        reader_of(dataset, batch=16).identity,
        reader_of(dataset, window=8).identity,
        reader_of(dataset, resolution=32).identity,
        reader_of(shorter).identity,
        reader_of(other).identity,
    ]
    assert len(set(same)) == 1
    assert len({*same, *others}) == 1 + len(others)


def test_a_dataset_with_a_missing_shard_is_refused_before_the_first_batch(dataset):
    for file in (dataset.path / dataset.image_column(64).column_id).glob("00002.*"):
        file.unlink()
    write_manifest(dataset.path)
    with pytest.raises(DatasetError, match="1 of 4 shards missing"):
        reader_of(Dataset(dataset.path))


def test_latents_of_the_wrong_scale_are_refused_before_the_first_batch(tmp_path, dataset):
    folder = dataset.path / dataset.image_column(64).column_id
    for path in folder.glob("*.json"):
        fields = vars(read_receipt(path))
        stats = {"latent_mean": 0.0, "latent_std": 5.5} if fields["rows"] else {}
        rewrite_receipt(path.with_suffix(".safetensors"), Receipt(**{**fields, "stats": stats}))
    write_manifest(dataset.path)
    with pytest.raises(DatasetError, match=r"deviation 5\.500; wanted near 1"):
        reader_of(Dataset(dataset.path))


@pytest.mark.parametrize("column", ["image", "text"])
def test_a_file_that_went_missing_or_changed_its_length_is_refused_by_name(dataset, column):
    column_id = (dataset.image_column(64) if column == "image" else dataset.text_column()).column_id
    path = dataset.path / column_id / "00002.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DatasetError, match=re.escape(str(path)) + r": \d+ bytes; wanted"):
        read_everything(dataset.path)
    path.unlink()
    with pytest.raises(DatasetError, match=re.escape(str(path)) + ": is missing"):
        read_everything(dataset.path)


def test_a_missing_null_file_is_refused_by_name(dataset):
    (dataset.path / dataset.text_column().column_id / "null.safetensors").unlink()
    with pytest.raises(DatasetError, match=r"null\.safetensors: is missing"):
        reader_of(dataset)


@pytest.mark.parametrize("value", [-1, 36, 10_000])
def test_image_rows_outside_the_ledger_are_refused_by_name(dataset, value):
    path = dataset.path / dataset.image_column(64).column_id / "00002.safetensors"
    row = np.array(map_arrays(path)["row"])
    row[3] = value
    rewrite(path, row=row)
    with pytest.raises(
        DatasetError,
        match=rf"moments-64-\w+/00002\.safetensors: row: {value} at row 3; .*shards repair",
    ):
        read_everything(dataset.path)


def test_an_image_row_of_a_dropped_sample_is_refused_by_name(dataset):
    path = dataset.path / dataset.image_column(64).column_id / "00002.safetensors"
    text = map_arrays(dataset.path / dataset.text_column().column_id / "00002.safetensors")
    row = np.array(map_arrays(path)["row"])
    row[0] = np.flatnonzero(text["caption"] == -1)[0]
    rewrite(path, row=row)
    with pytest.raises(
        DatasetError, match=r"text-\w+/00002\.safetensors: caption of an image row: -1 at row 0"
    ):
        read_everything(dataset.path)


@pytest.mark.parametrize(
    "change",
    [
        {"caption": np.full(36, 3, np.int32)},
        {"caption": np.full(30, 0, np.int32)},
        {"states": np.zeros((3, 5, 9), np.float16)},
        {"states": np.zeros((3, 4, 8), np.float16)},
        {"states": np.zeros((3, 5, 1), np.float16)},
        {"states": np.zeros((1, 5, 8), np.float16)},
    ],
    ids=["caption beyond", "too few captions", "wide", "few tokens", "width one", "few states"],
)
def test_texts_that_do_not_fit_are_refused_by_name(dataset, change):
    rewrite(dataset.path / dataset.text_column().column_id / "00002.safetensors", **change)
    with pytest.raises(DatasetError, match="00002"):
        read_everything(dataset.path)


@pytest.mark.parametrize(
    "change",
    [
        {"moments": np.zeros((30, 8, 4, 4), np.float16)},
        {"moments": np.zeros((29, 8, 8, 8), np.float16)},
        {"moments": np.zeros((30, 8, 8, 8), np.float32)},
        {"row": np.zeros(29, np.int32)},
    ],
    ids=["size", "too few", "type", "too few rows"],
)
def test_moments_that_do_not_fit_are_refused_by_name(dataset, change):
    rewrite(dataset.path / dataset.image_column(64).column_id / "00002.safetensors", **change)
    with pytest.raises(DatasetError, match="00002"):
        read_everything(dataset.path)


def test_a_file_with_other_arrays_is_refused_by_name(dataset):
    path = dataset.path / dataset.image_column(64).column_id / "00002.safetensors"
    fields = vars(read_receipt(path.with_suffix(".json")))
    save_arrays(path, {"latents": np.zeros((30, 4, 8, 8), np.float16)})
    rewrite_receipt(path, Receipt(**{**fields, **file_facts(path)}))
    write_manifest(dataset.path)
    with pytest.raises(DatasetError, match="00002"):
        read_everything(dataset.path)


def test_an_error_while_reading_ahead_reaches_the_consumer(dataset):
    reader = reader_of(dataset)
    for path in dataset.path.glob("moments-64-*/*.safetensors"):
        path.unlink()
    with pytest.raises(DatasetError, match="is missing"):
        next(reader.iter_batches(0, range(8)))


_READ_WITH_FEW_HANDLES = """
import resource, sys
from shards.dataset import Dataset
from shards.reader import LatentReader

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
dataset = Dataset(sys.argv[1])
reader = LatentReader(
    dataset, dataset.image_column(64), dataset.text_column(),
    seed=0, window=4, global_batch_size=8, num_partitions=4,
)
seen = {number for step in range(60) for number in reader.gather(step, range(8)).samples.tolist()}
print(len(seen))
"""


def test_a_dataset_of_more_shards_than_a_process_may_open_files_is_read(
    tmp_path, make_latent_dataset
):
    make_latent_dataset(tmp_path / "latents", [4] * 90, resolutions=(64,), **SMALL)
    done = run_python("-c", _READ_WITH_FEW_HANDLES, tmp_path / "latents")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 90 * 4


def test_a_mapped_shard_takes_one_file_handle(dataset):
    num_handles = len(list(Path("/proc/self/fd").iterdir()))
    reader = reader_of(dataset)
    held = reader.gather(0, range(8)), reader.gather(1, range(8)), reader.gather(2, range(8))
    opened = len(list(Path("/proc/self/fd").iterdir())) - num_handles
    num_shards = sum(length > 0 for length in LENGTHS)
    assert held
    assert 0 < opened <= 2 * num_shards
