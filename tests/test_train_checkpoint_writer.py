"""Whatever goes wrong while a checkpoint is written, training goes on and a good one is there."""

import os
import resource
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoint import (
    PARTS,
    Told,
    assert_holds,
    odd_snapshot,
    save,
    save_pieces,
    snapshot_of,
    split,
    steps_of,
)
from helpers_s3 import S3, running_s3
from helpers_train import Killed, contents_of
from safetensors.torch import load_file

from shards import storage
from shards.errors import StorageError, UserError
from shards.retry import RetryPolicy
from shards.storage import Location, list_files, list_folders, location
from train import checkpoint_writer
from train.checkpoint import (
    STATE,
    WEIGHTS,
    Checkpoint,
    Snapshot,
    checkpoint_path,
    checkpoints_of,
    save_unet,
)
from train.host_memory import available_bytes

BUCKET = "checkpoint-writer"
NO_WAIT = RetryPolicy(attempts=3, first_delay_sec=0.0)
FOR_EVER = RetryPolicy(attempts=3, first_delay_sec=1e6)
FULL = OSError(28, "No space left on device")


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "_RETRY", NO_WAIT)
    monkeypatch.setattr(checkpoint_writer, "_POLL_SEC", 0.01)


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "local":
        return tmp_path / "run"
    return location(f"memory://run/{tmp_path.name}")


def assert_whole(checkpoint: Checkpoint) -> None:
    step = int(checkpoint.path.name)
    assert checkpoint.step == step
    checkpoint.verify()
    for part in PARTS:
        (tensor,) = checkpoint.tensors(part).values()
        assert tensor.tolist() == [step] * 3


def folders_of(run: Location) -> list[str]:
    """Names in `checkpoints/` below which there is any file."""
    folder = run / "checkpoints"
    return [name for name in list_folders(folder) if any_file(folder / name)]


def any_file(folder: Location) -> bool:
    return bool(list_files(folder)) or any(any_file(folder / n) for n in list_folders(folder))


# Killed -------------------------------------------------------------------------------------------


class FileOperations:
    """Counts the process's file operations through Python's audit events.

    From one of them on all may fail: those that write, on a full disk, or simply all, as for the
    dead.
    """

    NAMES = frozenset({"open", "os.mkdir", "os.remove", "os.rmdir", "os.rename", "shutil.rmtree"})
    REMOVING = frozenset({"os.remove", "os.rmdir", "shutil.rmtree"})

    def __init__(self) -> None:
        self.stop()
        sys.addaudithook(self._hear)  # for good; an empty folder hears nothing

    def stop(self) -> None:
        self.start(Path())

    def start(self, folder: Path, fails_at: int = -1, *, full: bool = False) -> None:
        self.folder = "" if folder == Path() else str(folder)
        self.count, self.fails_at, self.full = 0, fails_at, full

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folder or event not in self.NAMES:
            return
        is_removing = event in self.REMOVING
        if not is_removing and not str(arguments[0]).startswith(self.folder):
            return
        if self.full and (is_removing or is_reading(event, arguments)):
            return  # a full disk lets both pass
        self.count += 1
        if 0 < self.fails_at <= self.count:
            raise OSError(*FULL.args, arguments[0]) if self.full else Killed


def is_reading(event: str, arguments: tuple[Any, ...]) -> bool:
    return event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)


@pytest.fixture(scope="module")
def file_operations() -> FileOperations:
    return FileOperations()


@pytest.fixture
def watched(file_operations: FileOperations) -> Iterator[FileOperations]:
    yield file_operations
    file_operations.stop()


def test_a_kill_at_any_file_operation_leaves_whole_checkpoints_only(tmp_path, watched, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # guards against power cuts, slowly

    for step in (100, 200):
        save(tmp_path / "two", snapshot_of(step))

    def save_the_third(run: Path, die_at: int = -1) -> int:
        shutil.copytree(tmp_path / "two", run)
        watched.start(run, die_at)
        try:
            save(run, snapshot_of(300))
            return watched.count
        finally:
            watched.stop()

    num_operations = save_the_third(tmp_path / "whole")
    assert num_operations > 40, "writing and removing were both heard"
    seen = set()
    for die_at in range(1, num_operations + 1):
        run = tmp_path / str(die_at)
        with pytest.raises(Killed):
            save_the_third(run, die_at)
        found = checkpoints_of(run)
        for checkpoint in found:
            assert_whole(checkpoint)
        seen.add(tuple(steps_of(found)))
        save(run, snapshot_of(400))
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert names == [found[-1].path.name, "000400"], "nothing is left behind"
    assert seen == {(100, 200), (100, 200, 300), (200, 300)}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_kill_at_any_request_leaves_whole_checkpoints_only(tmp_path, monkeypatch, before):
    """Behind a URL, where nothing can be renamed; killed before a request or just after it."""
    requests, die_at = [], -1

    def deadly(name: str) -> Callable[..., Any]:
        operation = getattr(filesystem, name)

        def request(*args: Any, **options: Any) -> Any:
            requests.append(name)
            dead = 0 < die_at <= len(requests)
            if dead and (before or len(requests) > die_at):
                raise Killed
            result = operation(*args, **options)
            if dead:
                raise Killed
            return result

        return request

    filesystem = location("memory://run").fs
    for name in ("put_file", "rm_file", "rm"):
        monkeypatch.setattr(filesystem, name, deadly(name))
    seen, number = set(), 0
    while True:
        run = location(f"memory://kills/{tmp_path.name}/{number}")
        die_at = -1
        for step in (100, 200):
            save(run, snapshot_of(step))
        requests.clear()
        number += 1
        die_at = number
        try:
            save(run, snapshot_of(300))
        except Killed:
            pass
        else:
            break
        found = checkpoints_of(run)
        for checkpoint in found:
            assert_whole(checkpoint)
        seen.add(tuple(steps_of(found)))
        die_at = -1
        save(run, snapshot_of(400))
        assert folders_of(run) == [found[-1].path.name, "000400"], "nothing is left behind"
    assert number > 8
    assert seen == {(100, 200), (100, 200, 300), (200, 300)}


def test_a_killed_export_leaves_no_half_weights_under_their_name(tmp_path, watched):
    """The export of a run that was made longer replaces the one before, or does not."""
    old, new = ({"weight": torch.full((1000,), float(number))} for number in (1, 2))
    folder, die_at, seen = tmp_path / "unet", 0, []
    while True:
        save_unet(folder, {}, old)
        die_at += 1
        watched.start(folder, die_at)
        try:
            save_unet(folder, {}, new)
        except Killed:
            watched.stop()
        else:
            break
        found = load_file(folder / WEIGHTS)["weight"].unique()
        seen += found.tolist()
    assert seen == sorted(seen), "one number each time, the old one first"
    assert set(seen) == {1.0, 2.0}
    assert len(seen) == die_at - 1


# Keeping ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "keep_every", "kept"),
    [
        (1, 0, [600]),
        (2, 0, [500, 600]),
        (9, 0, [100, 200, 300, 400, 500, 600]),
        (1, 200, [200, 400, 600]),
        (2, 300, [300, 500, 600]),
        (1, 1000, [600]),
    ],
)
def test_the_newest_stay_and_every_so_often_one_for_ever(run, keep, keep_every, kept):
    for step in range(100, 700, 100):
        save(run, snapshot_of(step), keep=keep, keep_every=keep_every)
    assert steps_of(checkpoints_of(run)) == kept
    assert folders_of(run) == [f"{step:06d}" for step in kept]
    for checkpoint in checkpoints_of(run):
        assert_whole(checkpoint)


def test_an_old_checkpoint_that_cannot_be_removed_does_not_fail_the_new_one(tmp_path, monkeypatch):
    for step in (100, 200):
        save(tmp_path, snapshot_of(step), keep=1)
    told = Told()
    writer = told.writer(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", failing(OSError(13, "Permission denied", "000200")))
        writer.save(snapshot_of(300))
    writer.wait(final=True)
    (line,) = told
    assert "old checkpoint is not removed" in line
    assert "Permission denied" in line
    assert steps_of(checkpoints_of(tmp_path)) == [300]
    save(tmp_path, snapshot_of(400), keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000400"]


def test_a_step_that_is_there_already_is_left_as_it_is(run):
    checkpoint = save(run, snapshot_of(100))
    again = replace(snapshot_of(100), weights={"weight": torch.zeros(3)})
    save(run, again)
    assert_whole(checkpoint)


# A disk that is full, a storage that is down ------------------------------------------------------


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    return fail


def test_a_full_disk_at_any_write_leaves_the_last_good_one_and_gives_its_space_back(
    tmp_path, watched, monkeypatch
):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr(checkpoint_writer, "_RETRY", FOR_EVER)
    save(tmp_path / "whole", snapshot_of(100))
    watched.start(tmp_path / "whole", full=True)
    save(tmp_path / "whole", snapshot_of(200))
    num_operations = watched.count
    watched.stop()
    assert num_operations > 20
    for full_at in range(1, num_operations + 1):
        run, told = tmp_path / str(full_at), Told()
        good = save(run, snapshot_of(100))
        writer = told.writer(run)
        watched.start(run, full_at, full=True)
        writer.save(snapshot_of(200))
        writer.wait()
        watched.stop()
        (line,) = told
        assert line.startswith("warning: checkpoint 200 is not written (")
        assert str(run) in line
        assert "No space left on device" in line
        assert "Training goes on" in line
        assert "\n" not in line
        assert_whole(good)
        left = [name for name in contents_of(run) if not name.startswith("checkpoints/000100/")]
        assert all(name.endswith(STATE) for name in left), "tensors hold no space"
        writer.save(snapshot_of(300))
        writer.wait(final=True)
        assert steps_of(checkpoints_of(run)) == [100, 300]
        assert told[1:] == ["checkpoint 200 is given up for 300"]
        assert writer.last_saved_step == 300
        assert len(list((run / "checkpoints").iterdir())) == 2


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond some bytes, as on a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_file_that_was_half_written_holds_no_space(tmp_path, num_processes):
    big = replace(snapshot_of(200), weights={"weight": torch.ones(30_000)}, optimizer={})
    told = Told()
    writer = told.writer(tmp_path)
    snapshot = big if num_processes == 1 else split(big, 2)[1]
    if num_processes == 2:
        snapshot = replace(snapshot, weights={"weight": torch.ones(30_000)})
    writer.save(snapshot)
    with pytest.raises(UserError, match=r"could not be written .*File too large"):
        writer.wait(final=True)
    assert not any(name.endswith(".safetensors") for name in contents_of(tmp_path))
    assert sum(map(len, contents_of(tmp_path).values())) < 1000
    assert len(told) == 1


def test_what_failed_is_written_once_there_is_room(run, monkeypatch):
    told = Told()
    writer = told.writer(run, in_background=True)
    room, attempts = threading.Event(), []
    write_file = checkpoint_writer._write_file

    def attempt(where: Location, fill: Any) -> Any:
        attempts.append(where)
        if not room.is_set():
            raise StorageError(where, "cannot be written (No space left on device)")
        return write_file(where, fill)

    monkeypatch.setattr(checkpoint_writer, "_write_file", attempt)
    writer.save(snapshot_of(100))
    wait_until(lambda: len(attempts) >= 5)
    writer.wait()
    assert writer.last_saved_step == -1
    assert checkpoints_of(run) == []
    room.set()
    wait_until(lambda: writer.last_saved_step == 100)
    writer.wait(final=True)
    assert_whole(checkpoints_of(run)[-1])
    assert len(told) == 2, "one line when it fails, one when it is good again"
    assert "No space left" in told[0]
    assert "tries to write it again" in told[0]
    assert told[1] == "checkpoint 100 is written after all"


def wait_until(happened: Callable[[], bool]) -> None:
    """For a thread to get there; a minute is for ever."""
    waiting = threading.Event()
    for _ in range(6000):
        if happened():
            return
        waiting.wait(0.01)
    raise AssertionError("it never happened")


def test_pauses_between_tries_grow_up_to_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "_RETRY", RetryPolicy(first_delay_sec=100.0, factor=2.0))
    monkeypatch.setattr(checkpoint_writer, "_write", failing(FULL))
    pauses: list[float] = []

    def pause(seconds: float) -> bool:
        pauses.append(seconds)
        return len(pauses) == 5

    writer = Told().writer(tmp_path, in_background=True)
    monkeypatch.setattr(writer._no_more_pauses, "wait", pause)
    writer.save(snapshot_of(100))
    wait_until(lambda: len(pauses) == 5)
    assert pauses[0] < pauses[1] < pauses[2] == pauses[3] == 300


@pytest.mark.parametrize("in_background", [True, False])
def test_a_last_checkpoint_that_cannot_be_written_ends_in_an_error(
    tmp_path, monkeypatch, in_background
):
    save(tmp_path, snapshot_of(100))
    told, attempts = Told(), []

    def attempt(run: Path, snapshot: Snapshot) -> None:
        attempts.append(snapshot.step)
        raise StorageError("s3://bucket/x", "writing failed 5 times in 30 s")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "_RETRY", FOR_EVER)
        patch.setattr(checkpoint_writer, "_write", attempt)
        writer = told.writer(tmp_path, in_background=in_background)
        writer.save(snapshot_of(200))
        writer.wait()
        patch.setattr(checkpoint_writer, "_RETRY", NO_WAIT)
        with pytest.raises(UserError, match=r"s3://bucket/x: writing failed .*same command again"):
            writer.wait(final=True)
    assert attempts == [200] * (1 + NO_WAIT.attempts)
    assert len(told) == 1
    assert steps_of(checkpoints_of(tmp_path)) == [100]


def test_a_last_checkpoint_that_is_written_at_a_last_try_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "_RETRY", FOR_EVER)
    told = Told()
    writer = told.writer(tmp_path, in_background=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "_write", failing(FULL))
        writer.save(snapshot_of(100))
        writer.wait()
    monkeypatch.setattr(checkpoint_writer, "_RETRY", NO_WAIT)
    writer.wait(final=True)
    assert_whole(checkpoints_of(tmp_path)[-1])
    assert told[-1] == "checkpoint 100 is written after all"


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with running_s3(BUCKET) as running:
        yield running


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    monkeypatch.setattr("shards.storage.REMOTE", RetryPolicy(attempts=3, first_delay_sec=0.0))
    monkeypatch.setattr("shards.retry.REMOTE", RetryPolicy(attempts=3, first_delay_sec=0.0))
    config = {"connect_timeout": 5, "read_timeout": 30, "retries": {"total_max_attempts": 1}}
    monkeypatch.setitem(storage._S3_OPTIONS, "config_kwargs", config)
    server.faults.clear()
    yield server
    server.faults.clear()


@pytest.mark.parametrize("kind", ["500", "reset", "lost"])
def test_an_object_store_that_fails_in_passing_goes_unnoticed(s3, tmp_path, kind):
    run = location(f"s3://{BUCKET}/{tmp_path.name}")
    for step in (100, 200, 300, 400):
        methods = ("PUT", "GET", "HEAD", *(("DELETE", "POST") if step > 200 else ()))
        for method in methods:
            s3.faults.plan(kind, where=lambda found, path, method=method: found == method)
        save(run, snapshot_of(step))
        assert {method for _, method, _ in s3.faults.hits} == set(methods)
        s3.faults.clear()
    assert steps_of(checkpoints_of(run)) == [300, 400]
    assert folders_of(run) == ["000300", "000400"]
    for checkpoint in checkpoints_of(run):
        assert_whole(checkpoint)


def test_an_object_store_that_is_down_stops_nothing_and_keeps_the_last_good_one(s3, tmp_path):
    run = location(f"s3://{BUCKET}/{tmp_path.name}")
    good, told = save(run, snapshot_of(100)), Told()
    writer = told.writer(run, in_background=True)
    s3.faults.plan("503", times=100_000)
    writer.save(snapshot_of(200))
    wait_until(lambda: len(s3.faults.hits) > 12)
    (line,) = told
    assert f"{BUCKET}/{tmp_path.name}" in line
    assert "failed 3 times" in line
    assert "Training goes on" in line
    s3.faults.clear()
    wait_until(lambda: writer.last_saved_step == 200)
    writer.wait(final=True)
    assert_whole(good)
    assert steps_of(checkpoints_of(run)) == [100, 200]


# While training goes on ---------------------------------------------------------------------------


class Slow:
    """Holds every checkpoint back until it is let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.may_end = threading.Semaphore(0), threading.Semaphore(0)
        self._write = checkpoint_writer._write
        monkeypatch.setattr(checkpoint_writer, "_write", self.write)

    def write(self, run: Location, snapshot: Snapshot) -> None:
        self.begun.release()
        assert self.may_end.acquire(timeout=60)
        self._write(run, snapshot)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    return Slow(monkeypatch)


def test_training_goes_on_while_a_checkpoint_is_written(run, slow):
    told = Told()
    writer = told.writer(run, in_background=True)
    snapshot = odd_snapshot()
    writer.save(snapshot)
    for tensors in snapshot.parts.values():
        for tensor in tensors.values():
            tensor.zero_()  # the next step
    assert slow.begun.acquire(timeout=60)
    assert checkpoints_of(run) == []
    slow.may_end.release()
    writer.wait(final=True)
    assert told == []
    assert_holds(checkpoints_of(run)[-1], odd_snapshot())


def test_a_second_checkpoint_waits_for_the_first_and_both_are_whole(tmp_path, slow):
    told = Told()
    writer = told.writer(tmp_path, in_background=True)
    writer.save(snapshot_of(100))
    assert slow.begun.acquire(timeout=60)
    second = threading.Thread(target=writer.save, args=(snapshot_of(200),))
    second.start()
    assert not slow.begun.acquire(timeout=0.2), "two were written at once"
    slow.may_end.release()
    assert slow.begun.acquire(timeout=60)
    assert steps_of(checkpoints_of(tmp_path)) == [100]
    slow.may_end.release()
    second.join()
    writer.wait(final=True)
    assert told == []
    assert steps_of(checkpoints_of(tmp_path)) == [100, 200]


def test_written_in_the_step_it_is_whole_when_save_returns(run):
    writer = Told().writer(run, in_background=False)
    writer.save(snapshot_of(100))
    assert_whole(checkpoints_of(run)[-1])
    assert writer.last_saved_step == 100


def test_without_room_for_a_copy_training_waits_and_says_so_once(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "available_bytes", lambda: 36 / 0.81)
    told = Told()
    writer = told.writer(tmp_path, in_background=True)
    for step in (100, 200):
        writer.save(snapshot_of(step))
        assert writer.last_saved_step == step
    (line,) = told
    assert "training waits" in line
    monkeypatch.setattr(checkpoint_writer, "available_bytes", lambda: 36 / 0.79)
    monkeypatch.setattr(checkpoint_writer, "_write", failing(FULL))
    writer.save(snapshot_of(300))
    assert writer._thread is not None, "with room again it is written in the background"
    with pytest.raises(UserError):
        writer.wait(final=True)


def test_room_is_asked_for_by_all_processes_of_a_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "available_bytes", lambda: 1000)
    whole = replace(snapshot_of(100), weights={"weight": torch.ones(60)})
    piece = split(whole, 2)[1]
    room_for = 1000 * 0.8 // piece.num_bytes
    told = Told()
    for processes in (room_for, room_for + 1):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", f"{processes:.0f}")
        told.writer(tmp_path / f"{processes}", in_background=True).save(piece)
    assert len(told) == 1


def test_without_room_what_fails_is_not_kept_and_the_next_one_is_written(tmp_path, monkeypatch):
    """Its tensors are those of training: a later try would write another step's numbers."""
    monkeypatch.setattr(checkpoint_writer, "available_bytes", lambda: 0)
    told = Told()
    writer = told.writer(tmp_path, in_background=False)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "_write", failing(FULL))
        writer.save(snapshot_of(100))
        with pytest.raises(UserError, match="No space left"):
            writer.wait(final=True)
    writer.save(snapshot_of(200))
    writer.wait(final=True)
    assert "Training goes on without it" in told[0]
    assert steps_of(checkpoints_of(tmp_path)) == [200]


class Bug(BaseException):
    """Nothing that a disk or network does."""


@pytest.mark.parametrize("meet", ["save", "wait", "final wait", "prepare"])
def test_a_thread_that_dies_is_not_overlooked(tmp_path, monkeypatch, meet):
    told = Told()
    writer = told.writer(tmp_path, in_background=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "_write", failing(Bug("a bug")))  # type: ignore[arg-type]
        writer.save(snapshot_of(100))
        with pytest.raises(Bug, match="a bug"):
            {
                "save": lambda: writer.save(snapshot_of(200)),
                "wait": writer.wait,
                "final wait": lambda: writer.wait(final=True),
                "prepare": lambda: writer.prepare(200),
            }[meet]()
    assert checkpoints_of(tmp_path) == []
    writer.save(snapshot_of(300))
    writer.wait(final=True)
    assert steps_of(checkpoints_of(tmp_path)) == [300]


def test_a_closed_writer_tries_no_more_and_says_what_it_never_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "_RETRY", FOR_EVER)
    told, before = Told(), set(threading.enumerate())
    writer = told.writer(tmp_path, in_background=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "_write", failing(FULL))
        writer.save(snapshot_of(100))
        writer.close()
    assert told[1:] == ["warning: checkpoint 100 was never written"]
    assert set(threading.enumerate()) <= before


def test_a_closed_writer_has_written_what_was_under_way(tmp_path, slow):
    told = Told()
    writer = told.writer(tmp_path, in_background=True)
    writer.save(snapshot_of(100))
    slow.may_end.release()
    writer.close()
    assert told == []
    assert steps_of(checkpoints_of(tmp_path)) == [100]


def test_waiting_for_nothing_is_soon_over(tmp_path):
    writer = Told().writer(tmp_path)
    writer.wait()
    writer.wait(final=True)
    assert writer.last_saved_step == -1


# Several processes --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_process_0_waits_for_the_receipts_of_all(run, order):
    told, pieces = Told(), split(odd_snapshot(), 3)
    writers = [told.writer(run, in_background=True) for _ in pieces]
    writers[0].prepare(100)
    for process in order:
        assert checkpoints_of(run) == []
        writers[process].save(pieces[process])
    for writer in writers:
        writer.wait(final=True)
        assert writer.last_saved_step == 100
    assert told == []
    assert_holds(checkpoints_of(run)[-1], odd_snapshot())


def test_a_process_that_never_writes_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "_RECEIPTS_SEC", 0.05)
    good = save(tmp_path, snapshot_of(50))
    told, pieces = Told(), split(odd_snapshot(), 3)
    writers = [told.writer(tmp_path) for _ in pieces]
    writers[0].prepare(100)
    writers[1].save(pieces[1])
    writers[0].save(pieces[0])
    with pytest.raises(UserError, match=r"no pieces-00002-of-00003.json after"):
        writers[0].wait(final=True)
    assert "pieces-00001" not in told[0]
    assert_whole(good)
    assert steps_of(checkpoints_of(tmp_path)) == [50]
    writers[2].save(pieces[2])
    writers[0].save(pieces[0])
    assert_holds(checkpoints_of(tmp_path)[-1], odd_snapshot())


def test_what_a_killed_process_left_does_not_pass_for_a_receipt(run, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "_RECEIPTS_SEC", 0.05)
    first_life = split(odd_snapshot(), 2)
    Told().writer(run).save(first_life[1])  # process 0 was killed before it could save
    told = Told()
    writer = told.writer(run)
    writer.prepare(100)
    assert folders_of(run) == []
    writer.save(first_life[0])
    assert "no pieces-00001-of-00002.json" in told[0]
    assert checkpoints_of(run) == []


def test_process_0_must_prepare_before_all_save(tmp_path):
    writer = Told().writer(tmp_path)
    with pytest.raises(AssertionError, match=r"prepare\(\) comes first"):
        writer.save(split(odd_snapshot(), 2)[0])
    writer.prepare(100)
    with pytest.raises(AssertionError, match=r"prepare\(\) comes first"):
        writer.save(split(odd_snapshot(200), 2)[0])


def test_where_nothing_could_be_prepared_no_checkpoint_counts(tmp_path, monkeypatch):
    pieces = split(odd_snapshot(), 2)
    Told().writer(tmp_path).save(pieces[1])
    told = Told()
    writers = [told.writer(tmp_path) for _ in pieces]
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", failing(OSError(5, "Input/output error")))
        writers[0].prepare(100)
    writers[1].save(pieces[1])
    writers[0].save(pieces[0])
    assert checkpoints_of(tmp_path) == []
    assert "Input/output error" in told[0]
    with pytest.raises(UserError, match="Input/output error"):
        writers[0].wait(final=True)
    second = split(odd_snapshot(200), 2)
    writers[0].prepare(200)
    for process in (1, 0):
        writers[process].save(second[process])
    assert_holds(checkpoints_of(tmp_path)[-1], odd_snapshot(200))
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_sharded_checkpoints_are_kept_and_removed_like_others(run):
    for step in (100, 200, 300, 400):
        save_pieces(run, split(odd_snapshot(step), 2), keep=1, keep_every=200)
    assert steps_of(checkpoints_of(run)) == [200, 400]
    assert folders_of(run) == ["000200", "000400"]


def test_a_disk_that_fails_one_process_fails_the_checkpoint_and_the_next_is_whole(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint_writer, "_RECEIPTS_SEC", 0.05)
    told = Told()
    writers = [told.writer(tmp_path) for _ in range(2)]
    for step in (100, 200):
        pieces = split(odd_snapshot(step), 2)
        writers[0].prepare(step)
        with monkeypatch.context() as patch:
            if step == 100:
                patch.setattr(checkpoint_writer, "_write_file", failing(FULL))
                patch.setattr(checkpoint_writer, "_RETRY", FOR_EVER)
            writers[1].save(pieces[1])
        writers[0].save(pieces[0])
    assert steps_of(checkpoints_of(tmp_path)) == [200]
    assert_holds(checkpoints_of(tmp_path)[-1], odd_snapshot(200))
    assert sorted(told)[:2] == ["checkpoint 100 is given up for 200"] * 2


# The host's memory --------------------------------------------------------------------------------


def host(folder: Path, group: str, limits: dict[str, tuple[str, int, int]]) -> int:
    """What can be taken on a host of 1000 KiB free; limits: group to max, current and files."""
    (folder / "proc" / "self").mkdir(parents=True)
    (folder / "proc" / "meminfo").write_text("MemTotal: 9999 kB\nMemAvailable:    1000 kB\n")
    (folder / "proc" / "self" / "cgroup").write_text(group)
    for name, (limit, used, files) in limits.items():
        path = folder / "cgroup" / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "memory.max").write_text(f"{limit}\n")
        (path / "memory.current").write_text(f"{used}\n")
        stat = f"anon 5\ninactive_file {files - 100}\nactive_file 100\n"
        (path / "memory.stat").write_text(stat)
    return available_bytes(folder / "proc", folder / "cgroup")


@pytest.mark.parametrize(
    ("group", "limits", "room"),
    [
        ("", {}, 1_024_000),
        ("4:memory:/old\n0::/\n", {}, 1_024_000),
        ("0::/\n", {"": ("500000", 400_000, 300_000)}, 400_000),
        ("0::/\n", {"": ("max", 400_000, 300_000)}, 1_024_000),
        ("0::/job/step\n", {"job": ("90000", 10_000, 100), "job/step": ("max", 1, 100)}, 80_100),
        ("0::/job/step\n", {"job": ("90000", 0, 100), "job/step": ("7000", 0, 100)}, 7_100),
        ("0::/\n", {"": ("9000000", 0, 100)}, 1_024_000),
    ],
)
def test_room_is_what_the_machine_and_every_limit_around_the_process_leave(
    tmp_path, group, limits, room
):
    assert host(tmp_path, group, limits) == room


def test_this_machine_has_some_memory():
    assert available_bytes() > 2**20
    assert checkpoint_path(Path("run"), 7) == Path("run/checkpoints/000007")
