"""Faults of a network are ridden out, bounded in number and time, and never end in wrong bytes."""

import itertools
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_kill import Job, contents, write_dataset
from helpers_s3 import BUCKET, S3, running_s3

from precompute.config import PrecomputeConfig
from precompute.job import precompute
from shards import storage
from shards.cache import ShardCache
from shards.dataset import Dataset
from shards.errors import CorruptFileError, StorageError, UserError
from shards.order import SampleOrder, choose_partitions
from shards.reader import LatentReader
from shards.receipt import Receipt, commit, read_receipt_of
from shards.retry import RetryPolicy
from shards.storage import (
    Location,
    download,
    list_files,
    list_folders,
    location,
    move,
    read_bytes,
    read_many,
    remove,
    size_of,
    write_text_whole,
    write_whole,
)
from shards.verify import iter_problems

ATTEMPTS = 4
FAULTS = ("500", "503", "reset", "stall", "short", "lost")
FAST = RetryPolicy(attempts=ATTEMPTS, first_delay_sec=0.01, factor=1.5)
SMALL = {"num_tokens": 5, "dim": 8, "captions_per_shard": 3}


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with running_s3(BUCKET) as running:
        running.faults.stall_sec = 1.2
        yield running


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[S3]:
    # Only where a stall is injected is a short silence one: a busy machine is silent at times.
    stalls = request.node.callspec.params.get("kind") if hasattr(request.node, "callspec") else ""
    config: dict[str, Any] = {
        "connect_timeout": 5,
        "read_timeout": 0.8 if stalls == "stall" else 30,
    }
    config["retries"] = {"mode": "standard", "total_max_attempts": 1}
    monkeypatch.setitem(storage._S3_OPTIONS, "config_kwargs", config)
    monkeypatch.setattr("shards.storage.REMOTE", FAST)
    monkeypatch.setattr("shards.cache.REMOTE", FAST)
    server.faults.clear()
    yield server
    server.faults.clear()


@pytest.fixture
def folder(s3: S3, request: pytest.FixtureRequest) -> Location:
    """An empty place for one test."""
    return location(f"s3://{BUCKET}/{re.sub(r'[^a-z0-9]+', '-', request.node.name.lower())}")


def bytes_of(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


# Each operation: what it needs to be there, what it does, and what it then gives.
def do_write(folder: Location, local: Path) -> Any:
    write_whole(folder / "new", bytes_of(b"new" * 1000))
    return read_bytes(folder / "new")


def do_overwrite(folder: Location, local: Path) -> Any:
    write_whole(folder / "a", bytes_of(b"other"))
    return read_bytes(folder / "a")


def do_create(folder: Location, local: Path) -> Any:
    write_whole(folder / "new", bytes_of(b"new"), replace=False)
    return read_bytes(folder / "new")


def do_not_create(folder: Location, local: Path) -> Any:
    written = write_whole(folder / "a", bytes_of(b"other"), replace=False)
    return written, read_bytes(folder / "a")


def do_download(folder: Location, local: Path) -> Any:
    download(folder / "a", local / "copy")
    return (local / "copy").read_bytes()


def do_remove(folder: Location, local: Path) -> Any:
    remove(folder / "a")
    return list_files(folder)


def do_move(folder: Location, local: Path) -> Any:
    move(folder / "a", folder / "aside" / "a")
    return list_files(folder), read_bytes(folder / "aside" / "a")


A, B = b"content of a" * 500, b"content of b"
OPERATIONS: dict[str, tuple[Callable[[Location, Path], Any], Any]] = {
    "write": (do_write, b"new" * 1000),
    "overwrite": (do_overwrite, b"other"),
    "create": (do_create, b"new"),
    "not create": (do_not_create, (False, A)),
    "read": (lambda folder, _: read_bytes(folder / "a"), A),
    "read many": (lambda folder, _: list(read_many(folder, ["b", "a"])), [("b", B), ("a", A)]),
    "list files": (lambda folder, _: list_files(folder), {"a": len(A), "b": len(B)}),
    "list folders": (lambda folder, _: list_folders(folder), ["sub"]),
    "size": (lambda folder, _: size_of(folder / "a"), len(A)),
    "size of nothing": (lambda folder, _: size_of(folder / "nothing"), None),
    "download": (do_download, A),
    "remove": (do_remove, {"b": len(B)}),
    "move": (do_move, ({"b": len(B)}, A)),
}


def fill(folder: Location) -> None:
    """Bring a folder to the state that each operation begins with."""
    files = {"a": A, "b": B, "sub/c": b"c"}
    for name, data in files.items():
        write_whole(folder / name, bytes_of(data))
    for name in ("new", "aside/a"):
        remove(folder / name)


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize(("operation", "wanted"), OPERATIONS.values(), ids=OPERATIONS)
def test_every_operation_rides_out_a_fault_of_any_of_its_requests(
    s3, folder, tmp_path, operation, wanted, kind
):
    fill(folder)
    s3.faults.clear()
    assert operation(folder, tmp_path) == wanted
    methods = sorted({method for method, _ in s3.faults.requests})
    assert methods
    times = {"stall": [1], "reset": [1, ATTEMPTS - 1]}.get(kind, [ATTEMPTS - 1])
    for method, count in itertools.product(methods, times):
        fill(folder)
        s3.faults.clear()
        s3.faults.plan(kind, count, lambda m, path, wanted=method: m == wanted)
        assert operation(folder, tmp_path) == wanted, method
        assert s3.faults.hits


REQUESTS_AT_MOST = 3  # of one attempt: s3fs looks up what it does not know


@pytest.mark.parametrize("kind", ["500", "503", "reset", "stall"])
@pytest.mark.parametrize(
    "operation",
    [
        lambda folder, local: write_text_whole(folder / "new", "text"),
        lambda folder, local: write_text_whole(folder / "new", "text", replace=False),
        lambda folder, local: read_bytes(folder / "a"),
        lambda folder, local: list(read_many(folder, ["a"])),
        lambda folder, local: list_files(folder),
        lambda folder, local: size_of(folder / "a"),
        lambda folder, local: download(folder / "a", local / "copy"),
        lambda folder, local: remove(folder / "a"),
        lambda folder, local: move(folder / "a", folder / "aside"),
    ],
    ids=["write", "create", "read", "many", "list", "size", "download", "remove", "move"],
)
def test_a_fault_without_end_is_an_error_after_a_bounded_number_of_requests(
    s3, folder, tmp_path, monkeypatch, operation, kind
):
    fill(folder)
    if kind == "stall":  # it takes its time
        monkeypatch.setattr("shards.storage.REMOTE", RetryPolicy(2, 0.01, 1.0))
        attempts = 2
    else:
        attempts = ATTEMPTS
    s3.faults.clear()
    s3.faults.plan(kind, 10_000)
    begin = time.monotonic()
    with pytest.raises(StorageError) as error:
        operation(folder, tmp_path)
    assert time.monotonic() - begin < 20
    assert attempts <= len(s3.faults.requests) <= attempts * REQUESTS_AT_MOST
    text = str(error.value)
    assert f"{folder}" in text
    assert f"failed {attempts} times" in text
    assert "Remedy: check the disk or the endpoint, credentials and network" in text
    assert "\n" not in text


def test_waits_between_attempts_are_bounded_under_faults(s3, folder, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("shards.retry.time.sleep", waits.append)
    monkeypatch.setattr("shards.storage.REMOTE", RetryPolicy())
    s3.faults.plan("500", 10_000)
    with pytest.raises(StorageError, match="failed 5 times"):
        read_bytes(folder / "a")
    assert len(waits) == 4
    assert waits == sorted(waits)
    assert sum(waits) < 30


@pytest.mark.parametrize(
    "operation",
    [read_bytes, size_of, list_files, lambda where: write_text_whole(where, "text")],
    ids=["read", "size", "list", "write"],
)
def test_a_bucket_that_is_not_there_is_no_fault_that_passes(s3, monkeypatch, operation):
    def refuse(_: float) -> None:
        raise AssertionError("waiting does not help")

    monkeypatch.setattr("shards.retry.time.sleep", refuse)
    where = location("s3://no-such-bucket/latents/file")
    if operation in (size_of, list_files):
        assert not operation(where)
    else:
        with pytest.raises((StorageError, FileNotFoundError), match=r"(?i)bucket"):
            operation(where)
    assert len(s3.faults.requests) <= REQUESTS_AT_MOST


@pytest.mark.parametrize(
    "operation",
    [read_bytes, size_of, list_files, remove, lambda where: write_text_whole(where, "text")],
    ids=["read", "size", "list", "remove", "write"],
)
def test_a_refusal_of_access_is_no_fault_that_passes(s3, folder, monkeypatch, operation):
    fill(folder)

    def refuse(_: float) -> None:
        raise AssertionError("waiting does not help")

    monkeypatch.setattr("shards.retry.time.sleep", refuse)
    deny(s3, monkeypatch)
    s3.faults.requests.clear()
    with pytest.raises(StorageError) as error:
        operation(folder / "a")
    assert re.search("forbidden|denied", str(error.value).lower())
    assert f"{folder}" in str(error.value)
    assert len(s3.faults.requests) <= REQUESTS_AT_MOST


def deny(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the proxy answer 403, in the place of 500."""
    handler = s3._proxy.RequestHandlerClass
    answer = handler._answer  # type: ignore[attr-defined]

    def denying(self: Any, status: int, headers: Any, data: bytes, cut: bool = False) -> None:
        if status == 500:
            status = 403
            data = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        answer(self, status, headers, data, cut)

    monkeypatch.setattr(handler, "_answer", denying)
    s3.faults.plan("500", 10_000)


# Committing.


def commit_one(where: Location, data: bytes = b"data") -> Receipt:
    facts: dict[str, Any] = {"shard": where.stem, "column": None, "source": {}}
    facts |= {"rows_in": 0, "rows": 0, "absent": {}}
    return commit(where, bytes_of(data), lambda written: Receipt(**facts, **written))


@pytest.mark.parametrize("times", [1, ATTEMPTS - 1])
@pytest.mark.parametrize("ending", [".parquet", ".json"])
def test_a_put_whose_answer_is_lost_by_a_fault_still_commits(s3, folder, ending, times):
    where = folder / "00000.parquet"
    s3.faults.plan("lost", times, lambda method, path: method == "PUT" and ending in path)
    receipt = commit_one(where)
    assert len(s3.faults.hits) == times
    assert read_receipt_of(where) == receipt
    assert sorted(list_files(folder)) == ["00000.json", "00000.parquet"]


def test_a_lost_put_does_not_hide_by_a_fault_that_another_worker_wrote_other_bytes(s3, folder):
    where = folder / "00000.parquet"
    theirs = commit_one(where, b"their bytes")

    def fill_late(path: Path) -> None:
        path.write_bytes(b"our bytes!!")

    put = (folder / "00000.json").fs
    saved = read_bytes(folder / "00000.json")
    remove(folder / "00000.json")

    def receipt_of(written: dict[str, Any]) -> Receipt:
        put.pipe_file((folder / "00000.json").path, saved)  # the other worker is quicker
        return Receipt(**{**vars(theirs), **written})

    s3.faults.plan("lost", 1, lambda method, path: method == "PUT" and ".json" in path)
    with pytest.raises(UserError, match="their bytes differ"):
        commit(where, fill_late, receipt_of)


# Downloads.


@pytest.mark.parametrize("kind", ["short", "stall", "reset"])
def test_a_download_cut_by_a_fault_never_ends_up_in_the_cache(
    s3, folder, tmp_path, kind, monkeypatch
):
    if kind == "stall":
        monkeypatch.setattr("shards.storage.REMOTE", RetryPolicy(2, 0.01, 1.0))
        monkeypatch.setattr("shards.cache.REMOTE", RetryPolicy(2, 0.01, 1.0))
    data = np.random.default_rng(0).bytes(300_000)
    receipt = commit_one(folder / "00000.parquet", data)
    cache = ShardCache(tmp_path / "cache", 10**6)
    fetch = (folder / "00000.parquet", receipt.data_bytes, receipt.data_sha256)
    s3.faults.plan(kind, 10_000, lambda method, path: method == "GET")
    with pytest.raises((StorageError, CorruptFileError), match=r"00000\.parquet"):
        cache.fetch(*fetch)
    assert list((tmp_path / "cache").iterdir()) == []
    s3.faults.clear()
    s3.faults.plan(kind, 1, lambda method, path: method == "GET")
    assert cache.fetch(*fetch).read_bytes() == data
    assert s3.faults.hits
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_other_bytes_of_the_right_length_are_no_fault_that_the_cache_takes(s3, folder, tmp_path):
    receipt = commit_one(folder / "00000.parquet", b"right")
    write_whole(folder / "00000.parquet", bytes_of(b"wrong"))
    cache = ShardCache(tmp_path / "cache", 10**6)
    s3.faults.clear()
    with pytest.raises(CorruptFileError, match=r"00000\.parquet: 5 bytes .*shards repair"):
        cache.fetch(folder / "00000.parquet", receipt.data_bytes, receipt.data_sha256)
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(s3.faults.requests) <= ATTEMPTS * REQUESTS_AT_MOST


# Whole datasets.


def sprinkle(s3: S3, seed: int, share: float = 0.1) -> None:
    """Let one request in ten fail, at random, in all ways but stalls; never thrice in a row."""
    rng = random.Random(seed)
    in_a_row: dict[tuple[str, str], int] = {}

    def hit(method: str, path: str) -> bool:
        key = method, path
        if rng.random() < share and in_a_row.get(key, 0) < ATTEMPTS - 2:
            in_a_row[key] = in_a_row.get(key, 0) + 1
            return True
        in_a_row[key] = 0
        return False

    s3.faults._planned = _FirstOnly()
    for _ in range(1000):
        s3.faults.plan(rng.choice(["500", "503", "reset", "short", "lost"]), 1, hit)


class _FirstOnly(list):
    """A plan of which only the first entry is asked: it hits a request or none does."""

    def __iter__(self) -> Iterator[Any]:
        return islice(super().__iter__(), 1)


LENGTHS = (20, 0, 30, 7)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a local disk holds."""
    path = tmp_path_factory.mktemp("local") / "latents"
    write_dataset(Job(url=str(path), lengths=LENGTHS))
    return path


@pytest.mark.parametrize("seed", [0, 1])
def test_a_dataset_written_under_faults_is_that_of_a_local_disk(s3, folder, local, seed):
    sprinkle(s3, seed)
    write_dataset(Job(url=str(folder), lengths=LENGTHS))
    assert len(s3.faults.hits) >= 5
    s3.faults.clear()
    assert contents(folder) == contents(local)
    sprinkle(s3, seed + 100)
    assert list(iter_problems(folder, full=True)) == []
    assert s3.faults.hits


def reader_of(dataset: Dataset, **options: Any) -> LatentReader:
    defaults = {"seed": 0, "window": 8, "global_batch_size": 8}
    defaults["num_partitions"] = choose_partitions(8, 2)
    image, text = dataset.image_column(64), dataset.text_column()
    return LatentReader(dataset, image, text, **{**defaults, **options})


def take(reader: LatentReader, count: int) -> list[tuple[bytes, bytes, bytes]]:
    batches = reader.iter_batches(0, range(8))
    found = [
        (batch.samples.tobytes(), np.asarray(batch.moments).tobytes(), batch.states.tobytes())
        for batch in islice(batches, count)
    ]
    batches.close()  # type: ignore[attr-defined]
    return found


@pytest.fixture
def many(s3: S3, folder: Location, tmp_path: Path, make_latent_dataset: Any) -> Dataset:
    """A local dataset of many shards; its copy is in `folder`."""
    dataset = make_latent_dataset(tmp_path / "many", [6] * 16, resolutions=(64,), **SMALL)
    folder.fs.put(str(dataset.path), folder.path, recursive=True)
    s3.faults.clear()
    return dataset


def test_batches_read_under_faults_are_those_of_a_local_disk(s3, folder, many, tmp_path):
    wanted = take(reader_of(many), 40)  # three epochs
    size = max(sum(c.shards[s]["bytes"] for c in many.columns.values()) for s in many.ledger)
    cache = ShardCache(tmp_path / "cache", 8 * size)
    sprinkle(s3, seed=3)
    assert take(reader_of(Dataset(folder, cache)), 40) == wanted
    assert s3.faults.hits
    fetched = [path for method, path in s3.faults.requests if method == "GET" and "moments" in path]
    assert len(fetched) > 16  # the cache is smaller than the dataset: some came twice


def cache_bytes(folder: Path) -> int:
    """Bytes of a folder whose files come and go."""
    total = 0
    for path in folder.iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def test_the_cache_never_holds_more_than_its_bound_elastic(s3, folder, many, tmp_path):
    size = max(sum(c.shards[s]["bytes"] for c in many.columns.values()) for s in many.ledger)
    cache = ShardCache(tmp_path / "cache", 8 * size)
    dataset = Dataset(folder, cache)
    readers = [reader_of(dataset, seed=seed, processes_sharing_cache=2) for seed in (0, 1)]
    wanted = [take(reader_of(many, seed=seed), 40) for seed in (0, 1)]
    streams = [reader.iter_batches(0, range(8)) for reader in readers]
    largest = 0
    for step in range(40):
        for stream, batches in zip(streams, wanted, strict=True):
            batch = next(stream)
            found = (batch.samples, np.asarray(batch.moments), batch.states)
            assert tuple(each.tobytes() for each in found) == batches[step]
            largest = max(largest, cache_bytes(cache.folder))
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]
    assert 0 < largest <= cache.max_bytes
    assert {path.suffix for path in cache.folder.iterdir()} == {".safetensors"}


def test_a_cache_too_small_for_one_window_is_refused_and_no_fault_later(s3, folder, many, tmp_path):
    entries = [c.shards["00000"]["bytes"] for c in many.columns.values()]
    dataset = Dataset(folder, ShardCache(tmp_path / "cache", sum(entries)))
    s3.faults.clear()
    with pytest.raises(UserError, match=r"of cache for this process; wanted .*--cache-gib"):
        next(reader_of(dataset).iter_batches(0, range(8)))
    assert not [path for _, path in s3.faults.requests if "moments" in path]
    tiny = ShardCache(tmp_path / "tiny", min(entries) - 1)
    with pytest.raises(UserError, match="--cache-gib"):
        Dataset(folder, tiny).image_column(64).fetch_shard("00000")


def test_a_second_reader_takes_from_the_cache_what_the_first_fetched_whatever_the_fault(
    s3, folder, many, tmp_path
):
    cache = ShardCache(tmp_path / "cache", 10**9)
    wanted = take(reader_of(Dataset(folder, cache)), 12)
    dataset = Dataset(folder, ShardCache(tmp_path / "cache", 10**9))
    reader = reader_of(dataset)
    s3.faults.plan("500", 10_000, lambda method, path: "moments" in path or "/text" in path)
    assert take(reader, 12) == wanted


def test_fetching_ahead_comes_to_rest_without_a_fault_where_all_fits_into_the_cache(
    s3, folder, many, tmp_path, monkeypatch
):
    """It runs as far ahead as there is room: not for ever, where there is room for all."""
    drawn = []
    shards_ahead = SampleOrder.shards_ahead

    def counting(
        self: SampleOrder, step: int, positions: range
    ) -> Iterator[tuple[int, np.ndarray]]:
        for window in shards_ahead(self, step, positions):
            drawn.append(step)
            yield window

    monkeypatch.setattr(SampleOrder, "shards_ahead", counting)
    reader = reader_of(Dataset(folder, ShardCache(tmp_path / "cache", 10**9)))
    batches = reader.iter_batches(0, range(8))
    next(batches)
    deadline, before = time.monotonic() + 3, -1
    while before != len(drawn) and time.monotonic() < deadline:
        before = len(drawn)
        time.sleep(0.3)  # nobody reads; so nothing has to be fetched after a while
    batches.close()  # type: ignore[attr-defined]
    assert before == len(drawn)
    assert len(drawn) < 1000


def test_shards_that_cannot_be_fetched_by_a_fault_are_an_error_that_names_them(
    s3, folder, many, tmp_path
):
    reader = reader_of(Dataset(folder, ShardCache(tmp_path / "cache", 10**9)))
    s3.faults.plan("500", 100_000, lambda method, path: "moments" in path)
    with pytest.raises(StorageError, match=rf"{folder}/moments-64-\w+/\d+\.safetensors: down"):
        take(reader, 1)


# Stage 1.


def test_a_job_under_faults_writes_what_a_local_job_does_and_then_nothing(
    s3, folder, tmp_path, model_folder, image_shards, capsys
):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("00000.tar", "00001.tar"):
        shutil.copy(image_shards / name, images)
    options: dict[str, Any] = {"shards": f"{images}/*.tar", "model": str(model_folder)}
    options |= {"resolutions": "32", "batch_size": 8, "device": "cpu"}
    precompute(PrecomputeConfig(out=str(tmp_path / "local"), **options))
    sprinkle(s3, seed=5)
    precompute(PrecomputeConfig(out=str(folder), **options))
    assert len(s3.faults.hits) >= 3
    s3.faults.clear()
    assert contents(folder) == contents(tmp_path / "local")
    before = s3_ages(folder)
    capsys.readouterr()
    s3.faults.clear()
    precompute(PrecomputeConfig(out=str(folder), **options))
    assert "nothing to do" in capsys.readouterr().out
    assert not [path for method, path in s3.faults.requests if method in ("PUT", "DELETE")]
    assert s3_ages(folder) == before


def s3_ages(folder: Location) -> dict[str, Any]:
    found = folder.fs.find(folder.path, detail=True)
    return {name: (info["LastModified"], info["ETag"]) for name, info in found.items()}
