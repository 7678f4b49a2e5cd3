import json

import pytest

from train.interval import log_line
from train.metrics import MetricsLog, read_metrics


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def steps_of(path) -> list[float]:
    return [row["step"] for row in read_metrics(path)]


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


def test_a_run_without_metrics_has_no_rows(path):
    assert read_metrics(path) == []


def test_the_line_for_people_says_what_is_left():
    row = {"step": 150.0, "train/loss": 0.12345, "perf/iters_per_sec": 0.5}
    row |= {"perf/images_per_sec": 16.0, "perf/data_wait_frac": 0.004, "perf/peak_mem_gib": 3.21}
    assert log_line(row, 2000) == (
        "step 0150/2000 | loss 0.1235 | 0.50 it/s | 16 img/s | data 0.4% | mem 3.2 GiB | "
        "ETA 1:01:40"
    )
