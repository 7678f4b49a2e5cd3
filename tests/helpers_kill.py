"""Light processes that write a latent dataset of seeded numbers, for tests that kill them.

They come from a fork server that has our formats loaded and no torch, so they start in a few
milliseconds, and a kill at a random moment hits the work and not the imports.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import s3fs  # noqa: F401 - so that a forked process need not import it

from shards.arrays import Arrays, save_arrays
from shards.checksum import with_checksums
from shards.column import ImageColumn, TextColumn
from shards.errors import UserError
from shards.layout import column_path, ledger_path
from shards.ledger import OK, LedgerRow, count_reasons, save_ledger
from shards.manifest import write_manifest
from shards.receipt import NULL, Receipt, commit
from shards.storage import Location, list_files, list_folders, location, read_bytes, read_many

assert pyarrow.parquet

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["__main__", "helpers_kill"])

_ENCODER: dict[str, Any] = {
    "weights_sha256": "0" * 64,
    "encoder_config": {},
    "compute_dtype": "float32",
    "storage_dtype": "float16",
}
IMAGE = ImageColumn(
    **_ENCODER,
    resolution=64,
    latent_channels=4,
    latent_size=8,
    scaling_factor=0.2,
    transform={"resize": "none"},
)
TEXT = TextColumn(**_ENCODER, num_tokens=77, dim=64, tokenizer_sha256="1" * 64)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process writes, and where it dies.

    Args:
        url: of the dataset.
        lengths: rows of each shard.
        seed: of the numbers; no part of any name, so that another one is a faulty encoder.
        die: `(event, ending, mode)`: kill itself before it opens, renames or removes a path with
            this ending; `mode` is that of the opening. `("fill", ending, "")`: when half of
            that file is written.
        die_at: the how-manieth time.
        backwards: begin with the last shard instead of the first.
    """

    url: str
    lengths: tuple[int, ...] = (20, 0, 30, 7, 25, 12)
    seed: int = 0
    die: tuple[str, str, str] | None = None
    die_at: int = 1
    backwards: bool = False


@dataclass
class Writer:
    """A process that is writing."""

    process: BaseProcess
    connection: Connection

    def wait_until_it_works(self) -> None:
        assert self.connection.poll(30)
        assert self.connection.recv() == "working"

    def let_it_work(self) -> None:
        self.connection.send("go")

    def kill(self) -> bool:
        """Whether it was still at work."""
        self.process.kill()
        status, error = self.end()
        assert status in (0, -signal.SIGKILL), error
        return status != 0

    def end(self) -> tuple[int, str]:
        """Its exit status and its error."""
        self.process.join(60)
        status = self.process.exitcode
        if status is None:
            self.process.kill()
            raise AssertionError("it never ended")
        error = ""
        try:
            while self.connection.poll():
                error = self.connection.recv()
        except (EOFError, ConnectionResetError):  # the latter: killed before it read "go"
            pass
        return status, error


@cache
def start_server() -> None:
    """With a path on which it finds what it is to load; without, each process would load it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()


def start(job: Job, temporary: Path | None = None, **environment: str) -> Writer:
    """Start a process; it waits for `let_it_work`.

    Args:
        temporary: its folder for temporary files.
    """
    start_server()
    ours, theirs = PROCESSES.Pipe()
    if temporary:
        temporary.mkdir(parents=True, exist_ok=True)
        environment["TMPDIR"] = str(temporary)
    process = PROCESSES.Process(target=_run, args=(json.dumps(asdict(job)), theirs, environment))
    process.start()
    theirs.close()
    writer = Writer(process, ours)
    writer.wait_until_it_works()
    return writer


def write(job: Job, temporary: Path | None = None, **environment: str) -> tuple[int, str]:
    """Run a job to its end, or to its death: exit status and error."""
    writer = start(job, temporary, **environment)
    writer.let_it_work()
    return writer.end()


def _run(document: str, connection: Connection, environment: dict[str, str]) -> None:
    assert "torch" not in sys.modules
    job = Job(**json.loads(document))
    os.environ.update(environment)
    tempfile.tempdir = None  # read TMPDIR again
    if endpoint := environment.get("FSSPEC_S3_ENDPOINT_URL"):
        import fsspec

        fsspec.config.conf["s3"] = {"endpoint_url": endpoint}
    connection.send("working")
    assert connection.recv() == "go"
    if job.die:
        sys.addaudithook(_deadly_hook(*job.die, job.die_at))
    try:
        write_dataset(job)
    except UserError as error:
        connection.send(str(error))
        raise SystemExit(2) from None


def _deadly_hook(event: str, ending: str, mode: str, at: int) -> Callable[[str, Any], None]:
    """Kill this process before the interpreter does something for the `at`-th time."""
    seen = 0

    def hook(name: str, args: Any) -> None:
        nonlocal seen
        if name != event or not str(args[0]).endswith(ending):
            return
        if event == "open" and (args[1] or "") != mode:
            return
        seen += 1
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def write_dataset(job: Job) -> None:
    """Write what is missing; equal jobs write equal bytes, receipts but for their timings."""
    dataset = location(job.url)
    start = time.monotonic()
    rng = np.random.default_rng([job.seed, 99])
    null = {
        "input_ids": rng.integers(0, 1000, 77, dtype=np.uint16),
        "states": rng.standard_normal((77, TEXT.dim)).astype(np.float16),
    }
    facts: dict[str, Any] = {"rows_in": 1, "rows": 1, "absent": {}, "column": TEXT.to_json()}
    _commit(
        job,
        column_path(dataset, TEXT.column_id, NULL),
        partial(save_arrays, arrays=null),
        {**facts, "shard": NULL, "source": {}},
        start,
    )
    numbers = range(len(job.lengths))
    for number in reversed(numbers) if job.backwards else numbers:
        _write_shard(job, dataset, number, start)
    write_manifest(dataset)


def _write_shard(job: Job, dataset: Location, number: int, start: float) -> None:
    shard, length = f"{number:05d}", job.lengths[number]
    rng = np.random.default_rng([job.seed, number])
    rows = [LedgerRow(key=f"{shard}{row}", status=OK, caption=f"{row}") for row in range(length)]
    rows += [LedgerRow(key=f"{shard}x", status="broken_image")]
    reasons = count_reasons(rows)
    facts: dict[str, Any] = {
        "shard": shard,
        "source": {"url": f"/nowhere/{shard}.tar", "bytes": 0, "sha256": "2" * 64},
        "rows_in": len(rows),
        "rows": length,
        "absent": reasons,
    }
    shape = (length, 4, 8, 8)
    mean = rng.standard_normal(shape) * 4
    moments = np.concatenate([mean, np.full(shape, np.log(9.0))], axis=1).astype(np.float16)
    states = rng.standard_normal((length, 77, TEXT.dim)).astype(np.float16)
    row, caption = np.arange(length, dtype=np.int32), np.array([*range(length), -1], np.int32)
    input_ids = rng.integers(0, 1000, (length, 77), dtype=np.uint16)
    texts = {"states": states, "input_ids": input_ids}
    image: Arrays = {**with_checksums(IMAGE, {"moments": moments}, row), "row": row}
    text: Arrays = {**with_checksums(TEXT, texts, caption), "caption": caption}
    stats = {"latent_mean": 0.0, "latent_std": 1.0} if length else {}

    fill_ledger = partial(save_ledger, rows=rows)
    _commit(job, ledger_path(dataset, shard), fill_ledger, {**facts, "column": None}, start)
    for column, arrays in ((IMAGE, image), (TEXT, text)):
        its_stats = stats if column is IMAGE else {}
        _commit(
            job,
            column_path(dataset, column.column_id, shard),
            partial(save_arrays, arrays=arrays),
            {**facts, "column": column.to_json(), "stats": its_stats},
            start,
        )


def _commit(
    job: Job, data: Location, fill: Callable[[Path], None], facts: dict[str, Any], start: float
) -> None:
    def fill_and_die(path: Path) -> None:
        fill(path)
        event, ending, _ = job.die or ("", "", "")
        if event == "fill" and str(data).endswith(ending):
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def receipt_of(written: dict[str, Any]) -> Receipt:
        timings = {"write": round(time.monotonic() - start, 6)}
        return Receipt(**facts, **written, model="seeded", timings=timings)

    commit(data, fill_and_die, receipt_of)


def contents(dataset: Location) -> dict[str, Any]:
    """Every file by name, those that do not belong there too; receipts without their timings."""
    found: dict[str, Any] = {name: read_bytes(dataset / name) for name in list_files(dataset)}
    for folder in list_folders(dataset):
        assert list_folders(dataset / folder) == []
        for name, data in read_many(dataset / folder, list(list_files(dataset / folder))):
            if name.endswith(".json"):
                receipt = json.loads(data)
                del receipt["timings"]
                found[f"{folder}/{name}"] = receipt
            else:
                found[f"{folder}/{name}"] = data
    return found
