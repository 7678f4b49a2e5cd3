"""Killed at any moment, or two at once: the same command again ends in the same bytes."""

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_kill import IMAGE, Job, Writer, contents, start, write
from helpers_s3 import BUCKET, S3, running_s3

from shards import receipt as receipt_module
from shards.arrays import map_arrays, save_arrays
from shards.canonical import sha256_of
from shards.errors import DatasetError
from shards.receipt import (
    DATA_SUFFIXES,
    Receipt,
    commit,
    finished_shards,
    read_receipt,
    receipt_path,
)
from shards.storage import Location, list_files, list_folders, local_copy, location
from shards.verify import iter_problems

NUM_KILLS = 50
NUM_REMOTE_KILLS = 10
SMALL = (20, 0, 9)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process writes that nobody disturbs."""
    return written(tmp_path_factory.mktemp("unbroken"), Job(url=""))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same, of few shards."""
    return written(tmp_path_factory.mktemp("small"), Job(url="", lengths=SMALL))


def written(folder: Path, job: Job) -> dict[str, Any]:
    dataset = folder / "latents"
    assert write(job_at(job, str(dataset))) == (0, "")
    assert list(iter_problems(dataset, full=True)) == []
    return contents(dataset)


def job_at(job: Job, url: str, **changed: Any) -> Job:
    return Job(**{**vars(job), "url": url, **changed})


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3(BUCKET) as server:
        yield server


def expect_only_whole_shards(dataset: Location) -> int:
    """Whatever has a receipt is all there; how many have one."""
    count = 0
    for folder in list_folders(dataset):
        finished = finished_shards(dataset / folder)
        names = list_files(dataset / folder)
        assert len(finished) == sum(name.endswith(".json") for name in names)
        for shard, receipt in finished.items():
            (data,) = (n for s in DATA_SUFFIXES if (n := f"{shard}.{s}") in names)
            with local_copy(dataset / folder / data) as copy:
                assert sha256_of(copy) == receipt.data_sha256
        count += len(finished)
    return count


def kill_at_random(
    job: Job, dataset: Location, wanted: dict[str, Any], kills: int, seed: int, **environment: str
) -> list[int]:
    """Kill and go on until it ends, then anew elsewhere: shards that were there after each kill."""
    begin = time.monotonic()
    assert write(job, **environment) == (0, "")
    longest_sec = time.monotonic() - begin
    assert contents(dataset) == wanted
    rng, progress = random.Random(seed), []
    while len(progress) < kills:
        remove_all(dataset)
        for _ in range(3):
            writer = start(job, **environment)
            writer.let_it_work()
            time.sleep(longest_sec * rng.uniform(0.0, 0.9))
            if not writer.kill():
                longest_sec *= 0.95
                break
            progress.append(expect_only_whole_shards(dataset))
        assert write(job, **environment) == (0, "")
        assert contents(dataset) == wanted
    assert list(iter_problems(dataset, full=True)) == []
    return progress


def remove_all(dataset: Location) -> None:
    if isinstance(dataset, Path):
        shutil.rmtree(dataset)
    else:
        dataset.fs.rm(dataset.path, recursive=True)


def test_killed_at_fifty_random_moments_it_ends_in_the_same_bytes(tmp_path, unbroken):
    dataset = tmp_path / "latents"
    progress = kill_at_random(Job(url=str(dataset)), dataset, unbroken, NUM_KILLS, seed=0)
    total = len(contents(dataset)) // 2
    in_mid_work = [count for count in progress if 0 < count < total]
    assert len(in_mid_work) >= NUM_KILLS // 2, progress
    assert len(set(in_mid_work)) >= 8, progress
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


def test_killed_at_random_moments_it_ends_in_the_same_bytes_on_an_object_store(tmp_path, s3, small):
    environment = {**s3.environment, "TMPDIR": str(tmp_path)}
    url = f"s3://{BUCKET}/killed/latents"
    job = Job(url=url, lengths=SMALL)
    progress = kill_at_random(job, location(url), small, NUM_REMOTE_KILLS, seed=1, **environment)
    assert len(set(progress)) >= 3, progress
    assert location(url).fs.ls(f"{BUCKET}/killed", detail=False) == [f"{BUCKET}/killed/latents"]


def test_a_killed_writer_to_an_object_store_leaves_nothing_on_the_local_disk(tmp_path, s3, small):
    url = f"s3://{BUCKET}/temporary/latents"
    job, temporary = Job(url=url, lengths=SMALL), tmp_path / "temporary"
    dying = job_at(job, url, die=("fill", f"{IMAGE.column_id}/00000.safetensors", ""))
    assert write(dying, temporary, **s3.environment)[0] == -signal.SIGKILL
    assert write(job, temporary, **s3.environment) == (0, "")
    assert contents(location(url)) == small
    assert [path for path in temporary.rglob("*") if path.is_file()] == []


def test_arrays_go_into_the_very_file_that_is_held_so_that_a_kill_leaves_no_other(tmp_path):
    """Under another name, a killed process would leave it, and the hold would be on nothing."""
    path = tmp_path / "00000.safetensors.partial"
    with path.open("wb") as held:
        save_arrays(path, {"moments": np.zeros(1000, np.float32)})
        assert os.path.samestat(os.fstat(held.fileno()), path.stat())
    assert map_arrays(path)["moments"].tolist() == [0.0] * 1000


# At the seams.

DATA, LEDGER, NULL = f"{IMAGE.column_id}/00000.safetensors", "ledger/00000.parquet", "null"
SEAMS = {
    "before the first temporary file": ("open", "null.safetensors.partial", ""),
    "when half of the data is written": ("fill", DATA, ""),
    "when half of the ledger is written": ("fill", LEDGER, ""),
    "when half of the null file is written": ("fill", "null.safetensors", ""),
    "before the data is flushed": ("open", f"{DATA}.partial", "r+"),
    "before the data is renamed": ("os.rename", f"{DATA}.partial", ""),
    "before the rename is durable": ("open", f"/{IMAGE.column_id}", ""),
    "after the data, before its receipt": ("open", "00000.json.partial", ""),
    "before the receipt is written": ("open", "00000.json.partial", "w"),
    "before the receipt is flushed": ("open", "00000.json.partial", "r+"),
    "before the receipt is renamed": ("os.rename", "00000.json.partial", ""),
    "before the ledger is renamed": ("os.rename", f"{LEDGER}.partial", ""),
    "before the null file is renamed": ("os.rename", "null.safetensors.partial", ""),
    "after the receipts, before the manifest": ("open", "dataset.json.partial", ""),
    "before the manifest is written": ("open", "dataset.json.partial", "w"),
    "before the manifest is renamed": ("os.rename", "dataset.json.partial", ""),
}


@pytest.mark.parametrize("die", SEAMS.values(), ids=SEAMS)
def test_killed_at_a_seam_it_ends_in_the_same_bytes(tmp_path, small, die):
    dataset = tmp_path / "latents"
    job = Job(url=str(dataset), lengths=SMALL)
    assert write(job_at(job, job.url, die=die))[0] == -signal.SIGKILL
    expect_only_whole_shards(dataset)
    assert not (dataset / "dataset.json").exists()
    assert contents(dataset).keys() != small.keys()
    assert write(job) == (0, "")
    assert contents(dataset) == small
    assert list(iter_problems(dataset, full=True)) == []
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


REMOTE_SEAMS = {
    "before the data is put": ("fill", DATA, ""),
    "after the data, before its receipt": ("open", "-00000.json.partial", "w"),
    "after the receipts, before the manifest": ("open", "-dataset.json.partial", "w"),
}


@pytest.mark.parametrize("die", REMOTE_SEAMS.values(), ids=REMOTE_SEAMS)
def test_killed_at_a_seam_it_ends_in_the_same_bytes_on_an_object_store(tmp_path, s3, small, die):
    url = f"s3://{BUCKET}/seams/{list(REMOTE_SEAMS.values()).index(die)}"
    job = Job(url=url, lengths=SMALL)
    environment = {**s3.environment, "TMPDIR": str(tmp_path)}
    assert write(job_at(job, url, die=die), **environment)[0] == -signal.SIGKILL
    expect_only_whole_shards(location(url))
    assert contents(location(url)).keys() < small.keys()
    assert write(job, **s3.environment) == (0, "")
    assert contents(location(url)) == small


def test_killed_in_every_shard_in_turn_it_ends_in_the_same_bytes(tmp_path, small):
    dataset = tmp_path / "latents"
    job = Job(url=str(dataset), lengths=SMALL)
    renames = 0
    while True:  # each process commits one data file and its receipt, and dies in the next
        status, _ = write(job_at(job, job.url, die=("os.rename", ".partial", ""), die_at=3))
        if status == 0:
            break
        renames += 1
        assert status == -signal.SIGKILL
        expect_only_whole_shards(dataset)
        assert renames <= len(small)
    assert renames >= len(small) // 2 - 2
    assert contents(dataset) == small


def test_a_writer_killed_while_it_repairs_a_cut_file_ends_in_the_same_bytes(tmp_path, small):
    dataset = tmp_path / "latents"
    job = Job(url=str(dataset), lengths=SMALL)
    assert write(job) == (0, "")
    path = dataset / DATA
    path.write_bytes(path.read_bytes()[:-1])
    for die in (
        ("os.remove", f"{IMAGE.column_id}/00000.json", ""),
        ("fill", DATA, ""),
        ("os.rename", f"{DATA}.partial", ""),
        ("os.rename", "00000.json.partial", ""),
    ):
        assert write(job_at(job, job.url, die=die))[0] == -signal.SIGKILL, die
        assert any(DATA in str(p) for p in iter_problems(dataset, full=True)), die
    assert write(job) == (0, "")
    assert contents(dataset) == small


# Two at once.


def run_together(*jobs: Job, **environment: str) -> list[tuple[int, str]]:
    writers: list[Writer] = [start(job, **environment) for job in jobs]
    for writer in writers:
        writer.let_it_work()
    return [writer.end() for writer in writers]


@pytest.mark.parametrize("backwards", [False, True], ids=["in step", "towards each other"])
def test_two_workers_on_one_dataset_write_what_one_does_elastic(tmp_path, unbroken, backwards):
    for number in range(8):
        dataset = tmp_path / f"{number}" / "latents"
        job = Job(url=str(dataset))
        ends = run_together(job, job_at(job, job.url, backwards=backwards))
        assert ends == [(0, ""), (0, "")]
        assert contents(dataset) == unbroken
        assert list(iter_problems(dataset, full=True)) == []


def test_two_workers_one_of_which_is_killed_write_what_one_does(tmp_path, unbroken):
    rng = random.Random(2)
    begin = time.monotonic()
    assert write(Job(url=str(tmp_path / "timed"))) == (0, "")
    longest_sec = time.monotonic() - begin
    for number in range(8):
        dataset = tmp_path / f"{number}" / "latents"
        job = Job(url=str(dataset))
        first, second = start(job), start(job)
        first.let_it_work()
        second.let_it_work()
        time.sleep(longest_sec * rng.uniform(0.0, 0.9))
        first.kill()
        assert second.end() == (0, "")
        assert write(job) == (0, "")
        # The first may have died over a shard that the second had just finished.
        left = [path for path in dataset.rglob("*.partial") if path.is_file()]
        assert len(left) <= 1
        problems = [str(problem.where) for problem in iter_problems(dataset, full=True)]
        assert problems == list(map(str, left))
        for path in left:
            path.unlink()
        assert contents(dataset) == unbroken


def test_two_workers_on_an_object_store_write_what_one_does_elastic(s3, small):
    for number in range(3):
        url = f"s3://{BUCKET}/together{number}/latents"
        job = Job(url=url, lengths=SMALL)
        ends = run_together(job, job_at(job, url, backwards=number % 2 == 1), **s3.environment)
        assert ends == [(0, ""), (0, "")]
        assert contents(location(url)) == small
        assert list(iter_problems(location(url), full=True)) == []


def commit_bytes(data: Path, content: bytes) -> Receipt:
    facts: dict[str, Any] = {"shard": data.stem, "column": None, "source": {}}
    facts |= {"rows_in": 0, "rows": 0, "absent": {}}
    return commit(data, lambda p: p.write_bytes(content), lambda f: Receipt(**facts, **f))  # type: ignore


@pytest.mark.parametrize("ours", [b"the same", b"other bytes"])
def test_a_worker_that_looked_too_early_leaves_the_first_receipt_as_it_is_kill(
    tmp_path, monkeypatch, ours
):
    """The other worker finishes between our look at the shard and our writing it."""
    data = tmp_path / "ledger" / "00000.parquet"
    theirs = []
    size_of = receipt_module.size_of

    def look_too_early(where: Location) -> int | None:
        found = size_of(where)
        if not theirs:
            theirs.append(b"")  # the other worker looks as well
            commit_bytes(data, b"the same")
            theirs.append(receipt_path(data).stat().st_ino)
        return found

    def read_too_early(where: Location) -> Receipt:
        if not theirs:
            look_too_early(data)
            raise FileNotFoundError(where)
        return read_receipt(where)

    monkeypatch.setattr(receipt_module, "size_of", look_too_early)
    monkeypatch.setattr(receipt_module, "read_receipt", read_too_early)
    if ours == b"the same":
        commit_bytes(data, ours)
    else:
        with pytest.raises(DatasetError, match=r"two workers .* their bytes differ"):
            commit_bytes(data, ours)
    assert receipt_path(data).stat().st_ino == theirs[1]


def expect_no_silence(dataset: Location, ends: list[tuple[int, str]]) -> bool:
    """Either all is well, or there is an error and verify names what is wrong; was there one?"""
    errors = [error for status, error in ends if status]
    for error in errors:
        assert "two workers encoded this shard at once, and their bytes differ" in error
        assert "python -m shards repair" in error
    problems = [str(problem) for problem in iter_problems(dataset, full=True)]
    if not errors:
        assert problems == []
        return False
    unfinished = ("dataset.json", "no receipt", "is in the ledger, not here")
    for problem in problems:
        wrong_bytes = "sha256 differs" in problem or "wanted" in problem
        assert wrong_bytes or any(text in problem for text in unfinished), problem
        if wrong_bytes:
            where = problem.split(": ")[0].rpartition("/")[2]
            assert where.endswith(DATA_SUFFIXES)
    return True


def test_two_workers_whose_bytes_differ_are_told_and_nothing_is_silent_kill(tmp_path):
    told = 0
    for number in range(12):
        dataset = tmp_path / f"{number}"
        job = Job(url=str(dataset), lengths=(30, 30, 30))
        told += expect_no_silence(dataset, run_together(job, job_at(job, job.url, seed=1)))
    assert told >= 1


def test_two_workers_whose_bytes_differ_are_told_on_an_object_store_kill(s3):
    told = 0
    for number in range(3):
        url = f"s3://{BUCKET}/differ{number}"
        job = Job(url=url, lengths=SMALL)
        ends = run_together(job, job_at(job, url, seed=1), **s3.environment)
        told += expect_no_silence(location(url), ends)
    assert told >= 1
