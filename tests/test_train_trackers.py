import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from accelerate import Accelerator
from accelerate.utils import LoggerType
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shards.errors import UserError
from shards.storage import location
from train.config import TrainConfig
from train.trackers import Trackers, accelerator_options

CONFIG = TrainConfig(learning_rate=3e-4, max_steps=77, adam_betas=(0.9, 0.95))
IMAGE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def pretend_installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets Accelerate find some trackers and no others."""

    def install(*names: str) -> None:
        found = [LoggerType(name) for name in names]
        monkeypatch.setattr("accelerate.tracking._available_trackers", found)

    return install


class Service:
    """What W&B and trackio offer to Accelerate: runs that are kept by id, rows by step."""

    def __init__(self) -> None:
        self.runs: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        self.inits: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.num_finished = 0

    def init(self, **options: Any) -> Any:
        self.inits.append(options)
        assert options["resume"] == "allow"
        rows = self.runs.setdefault(options.get("id") or options["name"], [])
        return SimpleNamespace(
            log=lambda values, step: rows.append((step, values)), finish=self._finish
        )

    def _finish(self) -> None:
        self.num_finished += 1


@pytest.fixture(params=["wandb", "trackio"])
def service(request, monkeypatch, pretend_installed) -> Iterator[Any]:
    """A stand-in for the package of this name."""
    kept = Service()
    module: Any = ModuleType(request.param)
    module.init, module.name, module.kept = kept.init, request.param, kept
    module.config = SimpleNamespace(update=lambda values, **_: kept.config.update(values))
    module.Image = lambda pixels: ("image", pixels)
    monkeypatch.setitem(sys.modules, request.param, module)
    pretend_installed(request.param)
    return module


def open_trackers(names: str, run_dir: Path, step: int = 0) -> Trackers:
    accelerator = Accelerator(cpu=True, **accelerator_options(names, run_dir))
    return Trackers(names, CONFIG, run_dir, accelerator, step)


def log_steps(trackers: Trackers, steps: range, loss: float = 1.0) -> None:
    for step in steps:
        trackers.log({"step": step, "train/loss": loss / step}, step)


def events_of(run_dir: Path) -> EventAccumulator:
    (folder,) = {path.parent for path in (run_dir / "tensorboard").glob("*/events*")}
    return EventAccumulator(str(folder)).Reload()


def scalars_of(run_dir: Path, tag: str = "train/loss") -> dict[int, float]:
    events = events_of(run_dir).Scalars(tag)
    assert len({event.step for event in events}) == len(events), "a step is there twice"
    return {event.step: event.value for event in events}


# TensorBoard --------------------------------------------------------------------------------------


def test_tensorboard_has_the_rows_and_the_image(run_dir):
    trackers = open_trackers("tensorboard", run_dir)
    trackers.log({"step": 10, "train/loss": 0.5, "val/loss": 0.25}, 10)
    trackers.log_image("samples/raw", IMAGE, 10)
    trackers.close()
    events = events_of(run_dir)
    assert set(events.Tags()["scalars"]) == {"train/loss", "val/loss"}, "the step is no figure"
    assert scalars_of(run_dir, "val/loss") == {10: 0.25}
    (image,) = events.Images("samples/raw")
    assert (image.step, image.width, image.height) == (10, 30, 20)
    assert pixels_of(image.encoded_image_string) == IMAGE.tolist()


def pixels_of(png: bytes) -> list[Any]:
    pixels: list[Any] = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).tolist()
    return pixels


def test_a_resumed_run_shows_no_step_twice_and_goes_on(run_dir):
    first = open_trackers("tensorboard", run_dir)
    log_steps(first, range(10, 51, 10))
    for step in range(10, 51, 10):
        first.log_image("samples/raw", IMAGE, step)
    first.close()
    open_trackers("tensorboard", run_dir, step=30).close()  # only then its thread has written
    assert sorted(scalars_of(run_dir)) == [10, 20, 30], "what came after the checkpoint is void"
    second = open_trackers("tensorboard", run_dir, step=30)
    log_steps(second, range(40, 71, 10), loss=2.0)
    second.log_image("samples/raw", IMAGE, 40)
    second.close()
    expected = {step: (1.0 if step <= 30 else 2.0) / step for step in range(10, 71, 10)}
    assert scalars_of(run_dir) == pytest.approx(expected)
    images = events_of(run_dir).Images("samples/raw")
    assert [image.step for image in images] == [10, 20, 30, 40]


def test_a_run_that_begins_anew_shows_nothing_of_the_one_before(run_dir):
    first = open_trackers("tensorboard", run_dir)
    log_steps(first, range(10, 51, 10))
    first.close()
    second = open_trackers("tensorboard", run_dir, step=0)
    log_steps(second, range(10, 21, 10), loss=3.0)
    second.close()
    assert scalars_of(run_dir) == pytest.approx({10: 0.3, 20: 0.15})


def test_settings_are_stored_once_as_flat_values(run_dir):
    for step in (0, 10, 20):
        open_trackers("tensorboard", run_dir, step).close()
    (path,) = (run_dir / "tensorboard").rglob("hparams.yml")
    settings = yaml.safe_load(path.read_text())
    assert settings["learning_rate"] == 3e-4
    assert settings["max_steps"] == 77
    assert settings["adam_betas"] == "(0.9, 0.95)"
    assert settings["sharding"] == "off"
    assert settings.keys() == set(TrainConfig.__dataclass_fields__)


# W&B and trackio ----------------------------------------------------------------------------------


def test_rows_images_and_settings_reach_the_service(service, run_dir):
    trackers = open_trackers(service.name, run_dir)
    trackers.log({"step": 10, "train/loss": 0.5}, 10)
    trackers.log({"step": 10, "val/loss": 0.25}, 10)
    trackers.log_image("samples/raw", IMAGE, 10)
    trackers.close()
    (rows,) = service.kept.runs.values()
    assert rows[:2] == [(10, {"train/loss": 0.5}), (10, {"val/loss": 0.25})]
    step, values = rows[2]
    image = values["samples/raw"]
    (kind, pixels) = image[0] if service.name == "wandb" else image
    assert (step, kind) == (10, "image")
    assert np.array_equal(pixels, IMAGE)
    assert service.kept.config["learning_rate"] == 3e-4
    assert service.kept.inits[0]["project"] == "latentmill"
    assert service.kept.num_finished == 1


def test_a_resumed_run_goes_on_in_the_same_run_without_a_row_twice(service, run_dir):
    first = open_trackers(service.name, run_dir)
    log_steps(first, range(10, 51, 10))  # then killed
    del first
    second = open_trackers(service.name, run_dir, step=30)
    log_steps(second, range(40, 71, 10))
    for step in (40, 60):
        second.log_image("samples/raw", IMAGE, step)
    second.close()
    (rows,) = service.kept.runs.values()
    figures = [step for step, values in rows if "train/loss" in values]
    assert figures == [10, 20, 30, 40, 50, 60, 70]
    assert [step for step, values in rows if "samples/raw" in values] == [60]
    third = open_trackers(service.name, run_dir, step=70)
    log_steps(third, range(80, 91, 10))
    (rows,) = service.kept.runs.values()
    assert rows[-1][0] == 90


def test_a_run_that_begins_anew_is_another_run_there(service, run_dir):
    for _ in range(2):
        trackers = open_trackers(service.name, run_dir)
        log_steps(trackers, range(10, 21, 10))
    assert len(service.kept.runs) == 2
    assert [[step for step, _ in rows] for rows in service.kept.runs.values()] == [[10, 20]] * 2


def test_a_tracker_may_join_a_run_that_has_begun(service, run_dir):
    trackers = open_trackers(service.name, run_dir, step=30)
    log_steps(trackers, range(40, 51, 10))
    (rows,) = service.kept.runs.values()
    assert [step for step, _ in rows] == [40, 50]


def test_two_runs_of_one_name_are_two_runs(service, run_dir, tmp_path):
    for folder in (run_dir, tmp_path / "elsewhere" / run_dir.name):
        log_steps(open_trackers(service.name, folder), range(10, 11))
    assert len(service.kept.runs) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": "x"}', '{"id": 1, "step": "x"}'])
def test_a_damaged_record_is_an_error_with_the_remedy(service, run_dir, text):
    (run_dir / "trackers.json").write_text(text)
    with pytest.raises(UserError, match=r"trackers\.json: not a record.*Remedy: delete it"):
        open_trackers(service.name, run_dir, step=10)


def test_a_run_behind_a_url_can_be_tracked(service):
    run_dir = location("memory://bucket/run")
    log_steps(open_trackers(service.name, run_dir), range(10, 21, 10))
    log_steps(open_trackers(service.name, run_dir, step=10), range(20, 31, 10))
    (rows,) = service.kept.runs.values()
    assert [step for step, _ in rows] == [10, 20, 30]
    run_dir.fs.rm("/bucket", recursive=True)


# What cannot be -----------------------------------------------------------------------------------


def test_without_names_nothing_is_written_or_asked_of_accelerate(run_dir):
    assert accelerator_options(" , ", run_dir) == {}
    trackers = Trackers("", CONFIG, run_dir, SimpleNamespace(is_main_process=True), 0)
    trackers.log({"step": 1, "train/loss": 1.0}, 1)
    trackers.log_image("samples/raw", IMAGE, 1)
    trackers.close()
    assert list(run_dir.iterdir()) == []


def test_other_processes_write_nothing(run_dir):
    other = SimpleNamespace(is_main_process=False)
    trackers = Trackers("tensorboard", CONFIG, run_dir, other, 0)
    log_steps(trackers, range(10, 31, 10))
    trackers.log_image("samples/raw", IMAGE, 10)
    trackers.close()
    assert list(run_dir.iterdir()) == []


@pytest.mark.parametrize("names", ["tensorbord", "all", "comet_ml", "tensorboard,mlflow"])
def test_an_unknown_name_is_refused_before_anything_runs(run_dir, names):
    with pytest.raises(UserError, match=r"--trackers: .*tensorboard, wandb, trackio"):
        accelerator_options(names, run_dir)


def test_a_tracker_that_is_not_installed_is_refused(run_dir, pretend_installed):
    pretend_installed("tensorboard")
    with pytest.raises(UserError, match=r"wandb is not installed\. Remedy: pip install wandb"):
        accelerator_options("tensorboard, wandb", run_dir)


def test_tensorboard_is_refused_for_a_run_on_an_object_store():
    with pytest.raises(UserError, match=r"memory://bucket/run.*--trackers wandb"):
        accelerator_options("tensorboard", location("memory://bucket/run"))


def test_names_may_be_repeated_and_spaced(run_dir):
    options = accelerator_options(" tensorboard ,tensorboard,", run_dir)
    assert options["log_with"] == ["tensorboard"]


def test_accelerates_own_end_does_not_finish_a_run_again(service, run_dir):
    accelerator = Accelerator(cpu=True, **accelerator_options(service.name, run_dir))
    trackers = Trackers(service.name, CONFIG, run_dir, accelerator, 0)
    trackers.close()
    accelerator.end_training()
    assert service.kept.num_finished == 1
    assert json.loads((run_dir / "trackers.json").read_text())["step"] == 0
