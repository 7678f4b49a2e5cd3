import json
import math

import fsspec
import pytest

from shards.errors import UserError
from shards.storage import location, read_bytes
from train.interval import log_line
from train.metrics import MetricsLog, read_metrics


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


@pytest.fixture
def remote():
    """A place behind a URL."""
    yield location("memory://bucket/run/metrics.jsonl")
    fsspec.filesystem("memory").store.clear()


def steps_of(where) -> list[float]:
    return [row["step"] for row in read_metrics(where)]


def test_rows_are_appended_as_one_json_object_a_line(path):
    log = MetricsLog(path, step=0)
    for step in (10, 20):
        log.write({"step": step, "train/loss": 0.1 + 0.2})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"step": step, "train/loss": 0.1 + 0.2} for step in (10, 20)]
    assert read_metrics(path) == rows


def test_rows_after_the_checkpoint_are_written_again(path):
    log = MetricsLog(path, step=0)
    for step in (10, 20, 30):
        log.write({"step": step})
    resumed = MetricsLog(path, step=20)
    assert steps_of(path) == [10, 20]
    resumed.write({"step": 30})
    assert steps_of(path) == [10, 20, 30]


@pytest.mark.parametrize("rest", ['{"step": 30', '{"step": 30}', "{"])
def test_a_line_that_was_cut_short_does_not_count_and_spoils_no_other(path, rest):
    MetricsLog(path, step=0).write({"step": 10})
    with path.open("a") as file:
        file.write(rest)
    assert steps_of(path) == [10]
    MetricsLog(path, step=50).write({"step": 60})
    assert steps_of(path) == [10, 60]


def test_flushing_a_local_file_changes_nothing(path):
    log = MetricsLog(path, step=0)
    log.write({"step": 10})
    before = path.read_bytes()
    log.flush()
    assert path.read_bytes() == before


def test_a_run_without_metrics_has_no_rows(path, remote):
    assert read_metrics(path) == []
    assert read_metrics(remote) == []


def no_such_token(name: str) -> float:
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize("figure", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_is_null_in_the_file_and_nan_when_read(path, figure):
    MetricsLog(path, step=0).write({"step": 10, "val/loss": figure, "train/loss": 1.5})
    row = json.loads(path.read_text(), parse_constant=no_such_token)
    assert row == {"step": 10, "val/loss": None, "train/loss": 1.5}
    MetricsLog(path, step=10)  # reads it and writes it again
    (row,) = read_metrics(path)
    assert math.isnan(row.pop("val/loss"))
    assert row == {"step": 10, "train/loss": 1.5}
    assert json.loads(path.read_text(), parse_constant=no_such_token)["val/loss"] is None


@pytest.mark.parametrize("line", ["{", "", "[1]", '"step"', '{"loss": 1}', "\x00\x00", "\udcff"])
def test_a_line_that_is_no_row_is_an_error_that_names_it(path, line):
    MetricsLog(path, step=0).write({"step": 10})
    with path.open("a", errors="surrogateescape") as file:
        file.write(f'{line}\n{{"step": 20}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 .*Remedy: remove that line"):
        read_metrics(path)


# Behind a URL -------------------------------------------------------------------------------------


def test_remote_rows_are_in_the_file_once_flushed(remote):
    log = MetricsLog(remote, step=0)
    log.write({"step": 10})
    assert read_bytes(remote) == b""
    log.flush()
    assert read_bytes(remote) == b'{"step": 10}\n'
    log.write({"step": 20})
    log.flush()
    assert steps_of(remote) == [10, 20]


def test_a_remote_run_goes_on_where_its_checkpoint_stands(remote):
    log = MetricsLog(remote, step=0)
    for step in (10, 20, 30):
        log.write({"step": step})
    log.flush()
    log.write({"step": 40})  # killed before the next checkpoint
    resumed = MetricsLog(remote, step=20)
    assert steps_of(remote) == [10, 20]
    resumed.write({"step": 30})
    resumed.flush()
    assert steps_of(remote) == [10, 20, 30]


def test_remote_and_local_files_hold_the_same_bytes(path, remote):
    for where in (path, remote):
        log = MetricsLog(where, step=0)
        for step in (10, 20):
            log.write({"step": step, "train/loss": 1 / step})
        log.flush()
    assert path.read_bytes() == read_bytes(remote)


def test_the_line_for_people_says_what_is_left():
    row = {"step": 150.0, "train/loss": 0.12345, "perf/iters_per_sec": 0.5}
    row |= {"perf/images_per_sec": 16.0, "perf/data_wait_frac": 0.004, "perf/peak_mem_gib": 3.21}
    row["perf/mfu"] = 0.417
    assert log_line(row, 2000) == (
        "step 0150/2000 | loss 0.1235 | 0.50 it/s | 16 img/s | MFU 41.7% | data 0.4% | "
        "mem 3.2 GiB | ETA 1:01:40"
    )
