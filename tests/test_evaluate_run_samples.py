import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from conftest import TINY_MODEL
from diffusers import UNet2DConditionModel
from helpers_train import contents_of, error_line, flags, write_unet
from PIL import Image

from evaluate.__main__ import main
from evaluate.assemble import assemble
from evaluate.prompts import read_prompts
from evaluate.run_samples import SampleGrids
from evaluate.sample import generate
from shards.errors import UserError
from shards.storage import location
from train.config import TrainConfig
from train.objective import Objective
from train.unet import build_unet, load_unet_config

CAPTIONS = ["a red circle", "a blue square", "a green triangle"]
CPU = torch.device("cpu")
CELL, MARGIN, TEXT = 168, 8, 45


class FakeTrainer:
    """What an observer sees of a run: weights by kind, and what it prints and logs."""

    def __init__(self, config: TrainConfig, unets: dict[str, Any], step: int = 3) -> None:
        self.config, self.step, self.device = config, step, CPU
        self.run_dir = location(config.output_dir)
        self.unet_config = dict(unets["raw"].config)
        self.scheduler_config = Objective(config, CPU).scheduler_config()
        self.said: list[str] = []
        self.images: list[tuple[str, np.ndarray, int]] = []
        self.asked: list[str] = []
        self.accelerator = SimpleNamespace(print=self.said.append)
        self.trackers = SimpleNamespace(log_image=lambda *image: self.images.append(image))
        self._unets = unets
        self.model: Any = self  # which a trainer keeps these figures in

    def weights_on_host(self, kind: str) -> dict[str, torch.Tensor] | None:
        self.asked.append(kind)
        unet = self._unets.get(kind)
        return None if unet is None else {n: w.clone() for n, w in unet.state_dict().items()}


@pytest.fixture(scope="module")
def unets(tmp_path_factory) -> dict[str, Any]:
    """Two U-Nets that fit `model_folder`."""
    path = write_unet(tmp_path_factory.mktemp("unet") / "unet.json", cross_attention_dim=128)
    return {kind: build_unet(load_unet_config(path), 8, seed) for seed, kind in enumerate(KINDS)}


KINDS = ("raw", "ema")


def config_of(folder: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "max_steps": 6,
        "num_samples": 3,
        "sample_steps": 2,
        "seed": 5,
    }
    return TrainConfig(**(settings | changes))


@pytest.fixture
def observe(tmp_path, model_folder, unets):
    """`observe(kinds, step, ...)`: draw once in a run of its own folder; returns the trainer."""

    def run(kinds: tuple[str, ...] = KINDS, step: int = 3, **changes: Any) -> FakeTrainer:
        config = config_of(tmp_path, **changes)
        trainer = FakeTrainer(config, {kind: unets[kind] for kind in kinds}, step)
        grids = SampleGrids(config, str(model_folder), CAPTIONS)
        assert grids.observe(trainer) == {}
        return trainer

    return run


def pictures_in(path: Path, count: int) -> list[np.ndarray]:
    """The pictures of a grid that is one or two wide, without their captions."""
    with Image.open(path) as file:
        sheet = np.asarray(file)
    columns = (sheet.shape[1] - MARGIN) // CELL
    places = [
        (MARGIN + i // columns * (CELL + TEXT), MARGIN + i % columns * CELL) for i in range(count)
    ]
    return [sheet[top : top + 160, left : left + 160].astype(int) for top, left in places]


def difference(first: np.ndarray, second: np.ndarray) -> int:
    return int(np.abs(first - second).max())


# What is written ----------------------------------------------------------------------------------


def test_a_grid_of_each_kind_of_weights_is_written_and_tracked(observe):
    trainer = observe()
    run = trainer.run_dir
    assert contents_of(run).keys() == {"samples/000003.png", "samples/000003-ema.png"}
    raw, ema = (pictures_in(run / f"samples/000003{end}.png", 3) for end in ("", "-ema"))
    for one, other in zip(raw, ema, strict=True):
        assert one.std() > 1
        assert difference(one, other) > 10, "other weights, another image"
    with Image.open(run / "samples/000003.png") as grid:
        assert grid.size == (2 * CELL + MARGIN, 2 * (CELL + TEXT) + MARGIN)
        assert np.array_equal(np.asarray(grid), trainer.images[0][1])
    assert [(name, step) for name, _, step in trainer.images] == [
        ("samples/raw", 3),
        ("samples/ema", 3),
    ]
    assert trainer.said == [f"samples: {run}/samples/000003{end}.png" for end in ("", "-ema")]


@pytest.mark.parametrize(("kinds", "last"), [(KINDS, "-ema"), (("raw",), "")])
def test_the_end_of_the_run_leaves_the_better_grid_at_the_top(observe, kinds, last):
    run = observe(kinds, step=6).run_dir
    assert (run / "samples.png").read_bytes() == (run / f"samples/000006{last}.png").read_bytes()


def test_pictures_depend_on_the_prompt_and_the_seed_alone(tmp_path, model_folder, unets):
    """Three prompts, one of them twice: the n-th picture starts from the noise of seed + n."""
    named = "a red circle; a blue square; a red circle"

    def pictures(folder: str, **changes: Any) -> list[np.ndarray]:
        config = config_of(tmp_path / folder, sample_prompts=named, **changes)
        trainer = FakeTrainer(config, {"raw": unets["raw"]})
        SampleGrids(config, str(model_folder), CAPTIONS).observe(trainer)
        return pictures_in(tmp_path / folder / "run/samples/000003.png", 3)

    first, again, later = pictures("a"), pictures("b"), pictures("c", seed=7)
    assert all(difference(*pair) == 0 for pair in zip(first, again, strict=True))
    assert difference(first[0], first[2]) > 10, "the same prompt from another noise"
    assert difference(first[2], later[0]) <= 2, "the same prompt from the noise of seed 7"
    assert difference(first[0], later[0]) > 10


def test_the_same_weights_give_the_same_bytes_at_another_step(observe):
    one, other = (observe(("raw",), step=step).run_dir for step in (2, 4))
    assert (one / "samples/000002.png").read_bytes() == (other / "samples/000004.png").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"sample_guidance": 9.0},
        {"sample_rescale": 1.0, "sample_guidance": 9.0},
        {"sample_negative_prompt": "a blue square", "sample_guidance": 9.0},
        {"sample_steps": 3},
    ],
)
def test_every_setting_changes_the_pictures(observe, tmp_path, change):
    base = {name: value for name, value in change.items() if name == "sample_guidance"}
    plain = pictures_in(observe(("raw",), **(base if len(change) > 1 else {})).run_dir / GRID, 3)
    changed = pictures_in(observe(("raw",), **change).run_dir / GRID, 3)
    assert max(map(difference, plain, changed)) > 2


GRID = "samples/000003.png"


def test_a_run_behind_a_url_has_its_grids_there(observe):
    run = observe(("raw",), step=6, output_dir="memory://bucket/run").run_dir
    with (run / "samples.png").open("rb") as file, Image.open(file) as grid:
        assert grid.size == (2 * CELL + MARGIN, 2 * (CELL + TEXT) + MARGIN)
    assert (run / "samples" / "000006.png").exists()
    fsspec.filesystem("memory").store.clear()


# What is left alone -------------------------------------------------------------------------------


def test_the_generators_of_training_are_left_alone(observe):
    torch.manual_seed(3)
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    observe()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert torch.is_grad_enabled()


def unets_in_memory() -> int:
    gc.collect()
    return sum(type(thing) is UNet2DConditionModel for thing in gc.get_objects())


def test_the_model_is_loaded_once_and_no_unet_is_kept(tmp_path, model_folder, unets, monkeypatch):
    loaded: list[str] = []

    def assemble_and_count(unet: Any, scheduler_config: Any, model: str) -> Any:
        loaded.append(model)
        return assemble(unet, scheduler_config, model)

    monkeypatch.setattr("evaluate.run_pipeline.assemble", assemble_and_count)
    config = config_of(tmp_path)
    grids = SampleGrids(config, str(model_folder), CAPTIONS)
    before = unets_in_memory()
    for step in (2, 4):
        grids.observe(FakeTrainer(config, unets, step))
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 4
    assert loaded == [str(model_folder)]
    assert unets_in_memory() == before


def test_other_processes_ask_for_weights_and_do_no_more(tmp_path, model_folder, unets):
    """Putting sharded weights together takes all processes."""
    config = config_of(tmp_path)
    trainer = FakeTrainer(config, unets)
    trainer._unets = {}
    SampleGrids(config, str(model_folder), CAPTIONS).observe(trainer)
    assert trainer.asked == ["raw", "ema"]
    assert not (tmp_path / "run").exists()
    assert trainer.said == []


# What goes wrong ----------------------------------------------------------------------------------


def test_a_model_that_is_elsewhere_is_said_once(tmp_path, unets):
    config = config_of(tmp_path)
    grids = SampleGrids(config, str(tmp_path / "gone"), CAPTIONS)
    trainer = FakeTrainer(config, unets)
    for _ in range(2):
        assert grids.observe(trainer) == {}
    (line,) = trainer.said
    assert line.startswith(f"no sample grid: {tmp_path / 'gone'}: no such folder")
    assert trainer.asked == ["raw", "ema"] * 2, "the other processes wait for that"
    assert not (tmp_path / "run").exists()


def test_a_model_of_another_width_is_said_once(tmp_path, model_folder, tmp_path_factory):
    path = write_unet(tmp_path / "unet.json")  # attends to states of width 32
    trainer = FakeTrainer(config_of(tmp_path), {"raw": build_unet(load_unet_config(path), 8, 0)})
    SampleGrids(trainer.config, str(model_folder), CAPTIONS).observe(trainer)
    (line,) = trainer.said
    assert "width 128; wanted 32" in line


def test_weights_that_are_not_numbers_write_no_black_grid(tmp_path, model_folder, unets):
    broken = build_unet(dict(unets["raw"].config), 8, 0)
    with torch.no_grad():
        broken.conv_out.bias.fill_(torch.nan)
    trainer = FakeTrainer(config_of(tmp_path), {"raw": broken})
    SampleGrids(trainer.config, str(model_folder), CAPTIONS).observe(trainer)
    (line,) = trainer.said
    assert "prompt 'a red circle': its image has pixels that are not numbers" in line
    assert not (tmp_path / "run").exists()


def test_memory_that_does_not_suffice_ends_the_grids_not_the_run(
    tmp_path, model_folder, unets, monkeypatch
):
    def generate_nothing(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nand so on")

    monkeypatch.setattr("evaluate.run_samples.generate", generate_nothing)
    trainer = FakeTrainer(config_of(tmp_path), unets)
    SampleGrids(trainer.config, str(model_folder), CAPTIONS).observe(trainer)
    assert trainer.said == ["no sample grid: CUDA out of memory. Tried to allocate 2 GiB."]


def test_an_error_of_ours_is_not_hidden(tmp_path, model_folder, unets, monkeypatch):
    monkeypatch.setattr("evaluate.run_samples.generate", lambda *_, **__: 1 / 0)
    trainer = FakeTrainer(config_of(tmp_path), unets)
    with pytest.raises(ZeroDivisionError):
        SampleGrids(trainer.config, str(model_folder), CAPTIONS).observe(trainer)


# Prompts ------------------------------------------------------------------------------------------


def prompts_of(folder: Path, captions: list[str] = CAPTIONS, **changes: Any) -> list[str]:
    return SampleGrids(config_of(folder, **changes), "no-model", captions)._prompts


def test_prompts_are_taken_in_turn_until_there_are_as_many_as_images(tmp_path):
    assert prompts_of(tmp_path, num_samples=5) == [*CAPTIONS, *CAPTIONS[:2]]
    assert prompts_of(tmp_path, num_samples=2) == CAPTIONS[:2]
    named = prompts_of(tmp_path, num_samples=3, sample_prompts="a lion; a leaf")
    assert named == ["a lion", "a leaf", "a lion"]


def test_more_prompts_than_images_are_refused_not_cut(tmp_path):
    with pytest.raises(UserError, match=r"--sample-prompts: 3 prompts.*--num-samples 3"):
        prompts_of(tmp_path, num_samples=2, sample_prompts="a; b; c")


def test_no_prompts_at_all_are_refused(tmp_path):
    with pytest.raises(UserError, match="--sample-prompts: none given"):
        prompts_of(tmp_path, captions=[])


def test_a_file_of_prompts_that_is_missing_is_refused_when_the_run_starts(tmp_path):
    missing = tmp_path / "prompts.txt"
    with pytest.raises(UserError, match=r"--sample-prompts: no file .*prompts\.txt"):
        prompts_of(tmp_path, sample_prompts=str(missing))


@pytest.mark.parametrize("name", ["prompts.txt", "prompts", "my prompts.txt", "list.md"])
def test_a_file_has_a_prompt_in_each_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes("\ufeffa lion; roaring\r\n\n  ein Löwe \n".encode())
    expected = ["a lion; roaring", "ein Löwe"]
    assert read_prompts(name, "--prompts") == expected
    assert read_prompts(str(tmp_path / name), "--prompts") == expected


def test_a_file_of_prompts_may_be_behind_a_url():
    with location("memory://bucket/prompts.txt").open("w") as file:
        file.write("a lion\na leaf\n")
    assert read_prompts("memory://bucket/prompts.txt", "--prompts") == ["a lion", "a leaf"]
    fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize(
    "text",
    [
        "a lion",
        "lion",
        "a cat and/or a dog",
        "Löwe " * 100,
        "ライオン" * 40,
        "a lion; a leaf.txt on a table",
        "examples",
    ],
)
def test_a_text_is_no_file(text):
    assert read_prompts(text, "--prompts") == [part.strip() for part in text.split(";")]


@pytest.mark.parametrize("named", ["gone.txt", "my gone.txt", "gone/prompts", "examples/"])
def test_what_looks_like_a_file_and_is_none_is_an_error(named):
    with pytest.raises(UserError, match=f"--prompts: no file {named}.*wanted a text file"):
        read_prompts(named, "--prompts")


def test_a_file_that_is_no_text_is_an_error(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    with pytest.raises(UserError, match="is not UTF-8"):
        read_prompts(str(tmp_path / "prompts.txt"), "--prompts")


@pytest.mark.parametrize("text", ["", " ; ;", "\n"])
def test_no_prompt_is_an_error(text):
    with pytest.raises(UserError, match="--prompts: no prompt given"):
        read_prompts(text, "--prompts")


# The pipeline and the command ---------------------------------------------------------------------


def test_a_negative_prompt_without_guidance_is_refused(unets, model_folder):
    scheduler = Objective(TrainConfig(), CPU).scheduler_config()
    pipeline = assemble(unets["raw"], scheduler, str(model_folder))
    with pytest.raises(UserError, match=r"negative prompt: has no effect .*of 1\.0"):
        generate(pipeline, ["a lion"], guidance_scale=1.0, negative_prompt="blur")


@pytest.mark.parametrize(
    "objective",
    [
        {"prediction_type": "flow"},
        {"prediction_type": "sample"},
        {"prediction_type": "v_prediction", "zero_terminal_snr": True},
    ],
    ids=str,
)
def test_every_objective_can_be_sampled(observe, objective):
    run = observe(("raw",), **objective).run_dir
    assert all(picture.std() > 0.5 for picture in pictures_in(run / GRID, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "gone.txt"}, "--prompts: no file gone.txt"),
        ({"guidance_rescale": 1.5}, "--guidance-rescale: 1.5; wanted 0 to 1"),
        ({"guidance_rescale": "nan"}, "--guidance-rescale: nan; wanted 0 to 1"),
    ],
)
def test_errors_of_the_command_are_one_line(tmp_path, capsys, changes, message):
    named = {"run": tmp_path, "model": TINY_MODEL, "prompts": "a lion"} | changes
    line = error_line(capsys, lambda: main(["sample", *flags(**named)]))
    assert line.startswith(f"evaluate: error: {message}")
