"""Engines hand out shards, and neither they nor their workers' fate changes a byte."""

import itertools
import os
import pickle
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_python, status_of
from helpers_precompute import (
    NUM_SHARDS,
    Patch,
    arguments,
    build_small_shards,
    num_finished,
    run_here,
    start_job,
    wait_until,
)
from test_precompute_job import contents

import precompute.job
import precompute.local_engine
import precompute.worker
import precompute.worker_process
from precompute.config import PrecomputeConfig
from precompute.engine import MAX_ATTEMPTS, Dispatch, Failed
from precompute.shard_task import ShardTask
from shards.dataset import Dataset
from shards.errors import (
    CorruptFileError,
    DatasetError,
    StorageError,
    UnreadableShardError,
    UserError,
)
from shards.reader import LatentReader
from shards.source_shard import SourceShard
from shards.verify import iter_problems


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_shards(tmp_path_factory.mktemp("engine-images"))


@pytest.fixture(scope="module")
def unbroken(
    images: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("engine-unbroken") / "latents"
    run_here(images, model_folder, out)
    return contents(out)


@pytest.fixture
def run(images: Path, model_folder: Path, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """`run(patch, *arguments)`: the job in a process with changed code; its status and output."""

    def run(patch: Patch, *more: str) -> tuple[int, str]:
        argv = arguments(images, model_folder, tmp_path / "latents", *more)
        return start_job(argv, tmp_path / "output", patch).end()

    return run


def unchanged() -> None:
    """No patch."""


def at_shard(name: str, act: Callable[[], object]) -> Patch:
    """Do something else where that shard is to be encoded."""
    encode_shard = precompute.worker.encode_shard

    def encode(task: ShardTask, *args: Any) -> Any:
        if task.source.name == name:
            act()
        return encode_shard(task, *args)

    def patch() -> None:
        precompute.worker.encode_shard = encode  # type: ignore[assignment]

    return patch


def raise_(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# Bytes.


@pytest.mark.parametrize("workers", [2, 3])
def test_bytes_do_not_depend_on_the_number_of_workers(run, unbroken, tmp_path, workers):
    status, text = run(unchanged, f"--workers={workers}")
    assert status == 0, text
    assert contents(tmp_path / "latents") == unbroken


def test_bytes_do_not_depend_on_the_order_in_which_shards_end(run, unbroken, tmp_path):
    encode_shard = precompute.worker.encode_shard
    order = tmp_path / "order"

    def patch() -> None:
        def encode(task: ShardTask, *args: Any) -> Any:
            time.sleep(random.Random(task.source.name).uniform(0, 0.15))
            account = encode_shard(task, *args)
            with order.open("a") as file:
                file.write(f"{task.source.name}\n")
            return account

        precompute.worker.encode_shard = encode  # type: ignore[assignment]

    status, text = run(patch, "--workers=2")
    assert status == 0, text
    ended = order.read_text().split()
    assert len(ended) == NUM_SHARDS
    assert ended != sorted(ended)
    assert contents(tmp_path / "latents") == unbroken


# Shards and workers that fail.


def test_a_shard_that_kills_its_workers_costs_that_shard_alone(run, unbroken, tmp_path):
    status, text = run(at_shard("00005", kill_self), "--workers=2")
    assert status == 2, text
    assert f"1 of {NUM_SHARDS} shards unread" in text
    assert "00005.tar: its worker died 3 times" in text
    assert "SIGKILL" in text
    assert text.count("a worker died") == MAX_ATTEMPTS
    assert num_finished(tmp_path / "latents") == NUM_SHARDS - 1
    assert list(iter_problems(tmp_path / "latents", full=True)) == []
    assert run(unchanged, "--workers=2")[0] == 0
    assert contents(tmp_path / "latents") == unbroken


def test_two_shards_that_kill_their_workers_cost_no_third(run, tmp_path):
    def patch() -> None:
        at_shard("00004", kill_self)()
        at_shard("00005", kill_self)()

    status, text = run(patch, "--workers=2")
    assert status == 2, text
    assert f"2 of {NUM_SHARDS} shards unread" in text
    assert num_finished(tmp_path / "latents") == NUM_SHARDS - 2


def test_workers_that_cannot_start_end_the_job(run, tmp_path):
    starts = tmp_path / "starts"

    def patch() -> None:
        def die(*_: Any) -> None:
            with starts.open("a") as file:
                file.write("x")
            kill_self()

        precompute.worker_process.Worker = die  # type: ignore

    status, text = run(patch, "--workers=2")
    assert status == 2
    assert "Traceback" not in text
    assert "error: workers: died 3 times while they loaded the model, at last" in text
    assert "SIGKILL" in text
    assert "fewer --workers" in text
    assert MAX_ATTEMPTS <= len(starts.read_text()) <= MAX_ATTEMPTS + 1


@pytest.mark.parametrize("workers", [1, 2])
def test_an_unreadable_shard_is_reported_and_the_job_goes_on(run, tmp_path, workers):
    error = UnreadableShardError("here", "no such disk", remedy="buy one")
    status, text = run(at_shard("00003", raise_(error)), f"--workers={workers}")
    assert status == 2, text
    assert f"1 of {NUM_SHARDS} shards unread; here: no such disk. Remedy: buy one" in text
    assert num_finished(tmp_path / "latents") == NUM_SHARDS - 1


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", [UserError, DatasetError, StorageError])
def test_a_users_error_in_a_worker_is_one_line(run, workers, kind):
    error = kind("here", "a hole", wanted="none", remedy="fill it")
    status, text = run(at_shard("00003", raise_(error)), f"--workers={workers}")
    assert status == 2
    assert text.splitlines()[-1] == (
        "precompute: error: here: a hole; wanted none. Remedy: fill it"
    )
    assert "Traceback" not in text


@pytest.mark.parametrize("workers", [1, 2])
def test_a_users_error_while_a_worker_loads_is_one_line(run, workers):
    def patch() -> None:
        def refuse(*_: Any) -> None:
            raise UserError("the model", "is no model")

        precompute.local_engine.Worker = refuse  # type: ignore
        precompute.worker_process.Worker = refuse  # type: ignore

    status, text = run(patch, f"--workers={workers}")
    assert status == 2
    assert text.splitlines()[-1] == "precompute: error: the model: is no model"
    assert "Traceback" not in text


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("where", ["shard", "load"])
def test_a_bug_in_a_worker_shows_where_it_is(run, workers, where):
    def divide_by_nothing(*_: Any) -> None:
        1 / 0  # noqa: B018

    def patch() -> None:
        if where == "load":
            precompute.local_engine.Worker = divide_by_nothing  # type: ignore
            precompute.worker_process.Worker = divide_by_nothing  # type: ignore
        else:
            at_shard("00003", divide_by_nothing)()

    status, text = run(patch, f"--workers={workers}")
    assert status == 1
    assert "ZeroDivisionError" in text
    assert "in divide_by_nothing" in text
    assert "1 / 0" in text


def test_memory_that_runs_out_names_the_option_that_helps(run):
    error = torch.OutOfMemoryError("CUDA out of memory.\nmore")
    status, text = run(at_shard("00003", raise_(error)), "--workers=2")
    assert status == 2
    assert text.splitlines()[-1].startswith("precompute: error: --batch-size: 4: out of memory")
    assert "a smaller --batch-size" in text


@pytest.mark.parametrize(
    "kind", [UserError, DatasetError, CorruptFileError, StorageError, UnreadableShardError]
)
def test_errors_of_workers_survive_the_way(kind):
    error = kind("here", "found", wanted="wanted", remedy="remedy")
    copy = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(error))))
    assert (type(copy), str(copy)) == (kind, str(error))


# Handing out.


def task(name: str) -> ShardTask:
    return ShardTask(source=SourceShard(name=name, url=f"{name}.tar", num_bytes=1), columns=[])


@pytest.mark.parametrize("seed", range(20))
def test_whoever_dies_every_shard_ends_once(seed):
    """Two workers; the poisonous shards kill theirs, and nothing else is lost to them."""
    rng = random.Random(seed)
    names = [f"{number:03d}" for number in range(40)]
    poison = set(rng.sample(names, seed % 4))
    dispatch, ended, failed = Dispatch([task(name) for name in names]), [], []
    workers: list[list[str]] = [[], []]
    serials = itertools.count()
    ids = [next(serials) for _ in workers]
    while not dispatch.is_done:
        for number, held in enumerate(workers):
            held += [given.source.name for given in dispatch.hand_out(ids[number])]
        number = rng.choice([n for n, held in enumerate(workers) if held])
        held = workers[number]
        if poison & set(held):
            events = dispatch.lose_worker(ids[number], "", was_ready=True)
            failed += [event.task.source.name for event in events if isinstance(event, Failed)]
            workers[number], ids[number] = [], next(serials)
            continue
        name = held.pop(rng.randrange(len(held)))
        ended.append(dispatch.take_back(ids[number], name).source.name)
    assert sorted(ended) == sorted(set(names) - poison)
    assert sorted(failed) == sorted(poison)


def test_workers_that_die_now_and_then_while_they_start_are_no_loop_and_no_end():
    dispatch = Dispatch([task("a")])
    for _ in range(10):
        dispatch.lose_worker("x", "", was_ready=False)
        dispatch.lose_worker("x", "", was_ready=False)
        dispatch.lose_worker("y", "", was_ready=True)
    dispatch.lose_worker("x", "", was_ready=False)
    dispatch.lose_worker("y", "", was_ready=False)
    with pytest.raises(UserError, match="died 3 times while they loaded the model, at last why"):
        dispatch.lose_worker("x", "why", was_ready=False)


# Parts of a job.


def part_of(shards: list[int], shard_range: str) -> list[int]:
    return PrecomputeConfig(shards="", shard_range=shard_range).in_range(shards)


def test_parts_are_disjoint_even_and_cover_everything():
    for num_shards, num_parts in itertools.product([0, 1, 2, 3, 7, 10, 97], [1, 2, 3, 8, 97, 100]):
        shards = list(range(num_shards))
        parts = [part_of(shards, f"{part}/{num_parts}") for part in range(num_parts)]
        assert list(itertools.chain(*parts)) == shards
        lengths = {len(part) for part in parts}
        assert max(lengths) - min(lengths) <= 1


def test_ranges_are_those_of_python():
    shards = list(range(10))
    rng = random.Random(0)
    for _ in range(100):
        first, last = rng.randrange(15), rng.randrange(15)
        assert part_of(shards, f"{first}:{last}") == shards[first:last]
        assert part_of(shards, f" {first} : ") == shards[first:]
        assert part_of(shards, f":{last}") == shards[:last]
    assert part_of(shards, "") == shards


@pytest.mark.parametrize(
    "text", ["3", "a:b", "-2:", "1:2:3", "3/3", "4/3", "0/0", "-1/3", "1/-3", "1.5/3", "/", "1/"]
)
def test_what_is_no_range_is_refused(text):
    with pytest.raises(UserError, match=r"--shard-range: .*wanted 0:100, or 3/16"):
        part_of([1, 2, 3], text)


def test_two_jobs_of_an_array_write_one_dataset_at_once(
    images, model_folder, unbroken, tmp_path, capsys
):
    out = tmp_path / "latents"
    jobs = [
        start_job(
            arguments(images, model_folder, out, f"--shard-range={part}/2", "--workers=2"),
            tmp_path / f"output {part}",
        )
        for part in range(2)
    ]
    wait_until(lambda: num_finished(out) >= 2)
    alone = start_job(arguments(images, model_folder, out), tmp_path / "output alone")
    for command in (["gc", out, "--yes"], ["repair", out]):
        assert status_of(*command) == 2
        assert "another process is writing here" in capsys.readouterr().err
    assert all(job.process.is_alive() for job in jobs), "they were too quick for this test"
    status, text = alone.end()
    assert status == 2
    assert "another process is writing here" in text
    assert [job.end()[0] for job in jobs] == [0, 0]
    assert contents(out) == unbroken
    assert list(iter_problems(out, full=True)) == []


def test_a_part_beside_a_whole_job_is_refused(images, model_folder, tmp_path):
    out = tmp_path / "latents"
    whole = start_job(arguments(images, model_folder, out), tmp_path / "output")
    wait_until(lambda: num_finished(out) >= 1)
    argv = arguments(images, model_folder, out, "--shard-range=0/2")
    status, text = start_job(argv, tmp_path / "output part").end()
    assert whole.process.is_alive(), "it was too quick for this test"
    assert status == 2
    assert "another process is writing here" in text
    assert whole.end()[0] == 0


# Following.


def test_a_job_can_be_followed(images, model_folder, tmp_path):
    """At any moment dataset.json can be trained on, names whole shards alone, and grows."""
    out = tmp_path / "latents"

    def patch() -> None:
        precompute.job._MANIFEST_SEC = 0.0
        precompute.job._MANIFEST_SHARE = 1.0

    job = start_job(arguments(images, model_folder, out, "--workers=2"), tmp_path / "output", patch)
    wait_until((out / "dataset.json").exists)
    seen: list[int] = []
    while True:
        is_over = not job.process.is_alive()
        dataset = Dataset(out)
        image, text = dataset.image_column(32), dataset.text_column()
        reader = LatentReader(dataset, image, text, seed=0, global_batch_size=2, num_partitions=1)
        assert image.shards.keys() == text.shards.keys()
        if not seen or len(image.shards) > seen[-1]:
            assert reader.gather(0, range(2)).moments.shape[0] == 2
        seen.append(len(image.shards))
        if is_over:
            break
    assert job.end()[0] == 0
    assert seen == sorted(seen)
    assert len(set(seen)) >= 5, seen
    assert seen[-1] == NUM_SHARDS


# Without Ray.


def test_ray_is_not_imported_unless_it_is_asked_for(images, model_folder, tmp_path):
    argv = arguments(images, model_folder, tmp_path / "latents", "--shard-range=:1")
    code = (
        "import sys\n"
        "from precompute.__main__ import main\n"
        f"main({argv!r})\n"
        "assert 'torch' in sys.modules and 'ray' not in sys.modules"
    )
    done = run_python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_ray_its_remedy_is_named(run):
    def patch() -> None:
        sys.modules["ray"] = None  # type: ignore[assignment]

    status, text = run(patch, "--engine=ray")
    assert status == 2
    assert text.splitlines()[-1] == (
        "precompute: error: --engine ray: Ray is not installed. "
        "Remedy: .venv/bin/pip install 'ray[serve]'"
    )
