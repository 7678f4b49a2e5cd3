from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_python
from helpers_train import error_line, flags, run_on_memory, small_config, write_unet
from PIL import Image

from evaluate.__main__ import main
from evaluate.grid import write_grid
from evaluate.pipeline import load_pipeline
from evaluate.prompts import captions_of
from evaluate.sample import generate
from shards.dataset import Dataset

MakeDataset = Callable[..., Dataset]
PROMPTS = ["a red circle", "a blue square", "", "a green triangle", "a red circle"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained run whose U-Net fits `model_folder`."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("helpers_train.DIM", 128)
        unet = write_unet(folder / "unet.json")
        run_on_memory(small_config(folder, unet=unet, max_steps=1))
    return folder / "run"


@pytest.fixture(scope="module")
def pipeline(run: Path, model_folder: Path):
    return load_pipeline(run, str(model_folder), device="cpu")


def images_of(pipeline, prompts: list[str], **settings) -> list[np.ndarray]:
    return generate(pipeline, prompts, **({"num_steps": 3, "seed": 7} | settings))


@pytest.fixture(scope="module")
def images(pipeline) -> list[np.ndarray]:
    return images_of(pipeline, PROMPTS)


def difference(first: np.ndarray, second: np.ndarray) -> int:
    return int(np.abs(first.astype(int) - second.astype(int)).max())


def test_images_have_the_unets_own_size(images):
    assert [image.shape for image in images] == [(64, 64, 3)] * len(PROMPTS)
    assert {image.dtype for image in images} == {np.dtype(np.uint8)}
    assert all(image.std() > 1 for image in images)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_images_do_not_depend_on_the_batch_size(pipeline, images, batch_size):
    for one, other in zip(images, images_of(pipeline, PROMPTS, batch_size=batch_size), strict=True):
        assert difference(one, other) <= 1


def test_each_image_has_its_own_seed(pipeline, images):
    tail = images_of(pipeline, PROMPTS[3:], seed=7 + 3)
    for one, other in zip(images[3:], tail, strict=True):
        assert difference(one, other) <= 1
    assert difference(images[0], images[4]) > 10, "the same prompt from another noise"


def test_another_seed_is_another_image(pipeline, images):
    (other,) = images_of(pipeline, PROMPTS[:1], seed=8)
    assert difference(images[0], other) > 10


def test_torchs_global_generator_does_not_matter_and_is_left_alone(pipeline, images):
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    (again,) = images_of(pipeline, PROMPTS[:1])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert difference(images[0], again) <= 1


def test_guidance_is_against_the_empty_prompt(pipeline):
    """Towards the empty prompt there is nothing to be guided away from."""
    free, guided = (images_of(pipeline, [""], guidance_scale=scale)[0] for scale in (1.0, 7.0))
    assert difference(free, guided) <= 2


# The grid -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "columns", "rows"), [(1, 1, 1), (2, 1, 2), (4, 2, 2), (5, 2, 3), (16, 4, 4)]
)
def test_the_grid_is_about_square_with_room_for_captions(tmp_path, count, columns, rows):
    pixels = np.zeros((64, 64, 3), np.uint8)
    write_grid(tmp_path / "new" / "grid.png", [pixels] * count, ["caption"] * count)
    with Image.open(tmp_path / "new" / "grid.png") as grid:
        assert grid.format == "PNG"
        assert grid.size == (columns * (160 + 8) + 8, rows * (160 + 8 + 45) + 8)


def test_images_stand_in_reading_order_unchanged(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (200, 200, 3), dtype=np.uint8) for _ in range(3)]
    write_grid(tmp_path / "grid.png", pictures, ["one", "two", "three"], columns=2)
    with Image.open(tmp_path / "grid.png") as file:
        grid = np.asarray(file)
    for index, picture in enumerate(pictures):
        left, top = 8 + index % 2 * 208, 8 + index // 2 * 253
        assert np.array_equal(grid[top : top + 200, left : left + 200], picture)
        below = grid[top + 200 : top + 245, left : left + 200]
        assert (below < 128).any(), "the caption is written below its picture"
    assert (grid[261:461, 216:] == 255).all(), "the last place stays empty"


def test_a_long_caption_stays_under_its_own_picture(tmp_path):
    black = np.zeros((160, 160, 3), np.uint8)
    captions = [" ".join(["interminable"] * 40), ""]
    write_grid(tmp_path / "grid.png", [black] * 2, captions, columns=2)
    with Image.open(tmp_path / "grid.png") as file:
        grid = np.asarray(file)
    assert (grid[168:, 8 + 168 :] == 255).all()
    assert (grid[168:213, 8:168] < 128).any()


def test_prompts_for_samples_are_different_captions_from_all_over(tmp_path, make_latent_dataset):
    dataset = make_latent_dataset(
        tmp_path / "latents", [40, 40], captions_per_shard=20, dropped=2, dim=32, num_tokens=5
    )
    captions = captions_of(dataset, 8)
    assert len(captions) == len(set(captions)) == 8
    assert {caption[-5:] for caption in captions} == {"00000", "00001"}
    assert not [caption for caption in captions if "caption -1 " in caption], "none was dropped"
    assert captions_of(dataset, 8) == captions
    assert len(captions_of(dataset, 1000)) == 40


# The command --------------------------------------------------------------------------------------


def sample(run: Path, model: Path, prompts: str, **settings) -> list[str]:
    named = {"run": run, "model": model, "prompts": prompts, "num_steps": 2} | settings
    return ["sample", *flags(**named)]


def test_the_command_writes_a_grid_and_says_where(run, model_folder, tmp_path, capsys):
    out = tmp_path / "grids" / "grid.png"
    main(sample(run, model_folder, "a lion; a leaf;; the sea ", out=out))
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    with Image.open(out) as grid:
        assert grid.size == (2 * 168 + 8, 2 * 213 + 8)


def test_prompts_may_come_from_a_file(run, model_folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a lion; with a comma, and a semicolon\n\n  a leaf\n")
    main(sample(run, model_folder, str(prompts)))
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "samples.png")
    with Image.open(run / "samples.png") as grid:
        assert grid.size == (168 + 8, 2 * 213 + 8)


def test_the_command_as_a_process_ends_with_status_2_and_one_line(tmp_path):
    done = run_python("-m", "evaluate", *sample(tmp_path / "nowhere", tmp_path, "a lion"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"evaluate: error: {tmp_path / 'nowhere'}: no U-Net")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": " ; ;"}, "--prompts: no prompt given"),
        ({"weights": "ema"}, "no ema U-Net"),
        ({"model": "gone/away"}, "gone/away: no such folder"),
        ({"num_steps": 0}, "--num-steps"),
    ],
)
def test_errors_are_one_line(run, model_folder, tmp_path, capsys, changes, message):
    named = {"run": run, "model": model_folder, "prompts": "a lion", "num_steps": 2}
    argv = ["sample", *flags(**(named | changes), out=tmp_path / "grid.png")]
    line = error_line(capsys, lambda: main(argv))
    assert line.startswith("evaluate: error: ")
    assert message in line
    assert not (tmp_path / "grid.png").exists()
