import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from helpers_train import (
    contents_of,
    flags,
    interrupted_at,
    newest_checkpoint,
    run_on_memory,
    small_config,
    write_unet,
)
from PIL import Image

from evaluate.pipeline import find_unet, load_pipeline
from shards.dataset import Dataset
from shards.errors import UserError
from train.main import main
from train.trainer import Trainer

MakeDataset = Callable[..., Dataset]


def fake_run(folder: Path, *unets: str) -> Path:
    for unet in unets:
        (folder / unet).mkdir(parents=True)
        (folder / unet / "config.json").write_text("{}")
    return folder


A_CHECKPOINT = ["unet", "unet_ema"]
UNFINISHED = [f"checkpoints/00000{step}/{part}" for step in (2, 4) for part in A_CHECKPOINT]
FINISHED = ["unet", *UNFINISHED]
BEFORE_THE_AVERAGE = ["checkpoints/000002/unet"]
EXPORT_ALONE = ["unet"]


@pytest.mark.parametrize(
    ("held", "weights", "found"),
    [
        (FINISHED, "auto", "checkpoints/000004/unet_ema"),
        (FINISHED, "ema", "checkpoints/000004/unet_ema"),
        (FINISHED, "raw", "checkpoints/000004/unet"),
        (UNFINISHED, "auto", "checkpoints/000004/unet_ema"),
        (UNFINISHED, "raw", "checkpoints/000004/unet"),
        (["unet", "checkpoints/000009/unet"], "auto", "checkpoints/000009/unet"),
        (BEFORE_THE_AVERAGE, "auto", "checkpoints/000002/unet"),
        (BEFORE_THE_AVERAGE, "raw", "checkpoints/000002/unet"),
        ([*BEFORE_THE_AVERAGE, "checkpoints/000004.partial/unet"], "raw", *BEFORE_THE_AVERAGE),
        (EXPORT_ALONE, "auto", "unet"),
        (A_CHECKPOINT, "auto", "unet_ema"),
        (A_CHECKPOINT, "ema", "unet_ema"),
        (A_CHECKPOINT, "raw", "unet"),
    ],
)
def test_the_unet_asked_for_is_found(tmp_path, held, weights, found):
    run = fake_run(tmp_path / "run", *held)
    assert find_unet(run, weights).relative_to(run) == Path(found)


@pytest.mark.parametrize(
    ("held", "weights"), [([], "auto"), (BEFORE_THE_AVERAGE, "ema"), (EXPORT_ALONE, "ema")]
)
def test_a_unet_that_is_not_there_is_an_error_with_the_remedy(tmp_path, held, weights):
    run = fake_run(tmp_path / "run", *held)
    with pytest.raises(UserError, match=r"run: no .*U-Net; wanted .* --output-dir <run>"):
        find_unet(run, weights)


# Real runs and a real model folder ----------------------------------------------------------------


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_unet(tmp_path_factory.mktemp("unet") / "unet.json", cross_attention_dim=128)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
    make_latent_dataset: MakeDataset,
    model_folder: Path,
    unet: str,
) -> Path:
    """A run of the command at 32 px, with its average and the samples of its end."""
    folder = tmp_path_factory.mktemp("finished")
    data = make_latent_dataset(
        folder / "latents", [9, 6], resolutions=(32,), model=str(model_folder)
    ).path
    settings = {"data": data, "output_dir": folder / "run", "unet": unet, "resolution": 32}
    settings |= {"global_batch_size": 4, "max_steps": 3, "ema_decay": 0.5, "num_samples": 5}
    main(["tiny", *flags(**settings)])
    return folder / "run"


def weights_equal(unet: UNet2DConditionModel, folder: Path) -> bool:
    expected = UNet2DConditionModel.from_pretrained(folder).state_dict()
    return all(torch.equal(weight, expected[name]) for name, weight in unet.state_dict().items())


def test_the_export_and_the_model_folder_are_a_diffusers_pipeline(finished, model_folder):
    unet = UNet2DConditionModel.from_pretrained(finished, subfolder="unet")
    scheduler = DPMSolverMultistepScheduler.from_pretrained(finished, subfolder="scheduler")
    pipeline = StableDiffusionPipeline.from_pretrained(
        model_folder, unet=unet, scheduler=scheduler, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(
        "a red circle",
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    )
    assert output.images.shape == (1, 32, 32, 3)
    assert np.isfinite(output.images).all()
    assert output.images.std() > 0.001


@pytest.mark.parametrize(
    ("weights", "part"), [("auto", "unet_ema"), ("ema", "unet_ema"), ("raw", "unet")]
)
def test_the_pipeline_of_a_finished_run_has_the_weights_asked_for(
    finished, model_folder, weights, part
):
    pipeline = load_pipeline(finished, str(model_folder), weights=weights, device="cpu")
    newest = newest_checkpoint(finished)
    other = {"unet": "unet_ema", "unet_ema": "unet"}[part]
    assert weights_equal(pipeline.unet, newest / part)
    assert not weights_equal(pipeline.unet, newest / other)
    again = load_pipeline(newest, str(model_folder), weights=weights, device="cpu")
    assert weights_equal(again.unet, newest / part)


def test_the_pipeline_samples_on_the_schedule_of_training(finished, model_folder):
    pipeline = load_pipeline(finished, str(model_folder), device="cpu")
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.config.beta_end == 0.012
    assert pipeline.safety_checker is None
    assert pipeline.unet.config.sample_size * pipeline.vae_scale_factor == 32


def test_a_run_in_progress_can_be_sampled(tmp_path, model_folder, unet, monkeypatch):
    monkeypatch.setattr("helpers_train.DIM", 128)
    config = small_config(tmp_path, unet=unet, ema_decay=0.5, prediction_type="epsilon")
    trainer = run_on_memory(config, before_batch=interrupted_at(1))
    assert isinstance(trainer, Trainer)
    pipeline = load_pipeline(tmp_path / "run", str(model_folder), device="cpu")
    assert weights_equal(pipeline.unet, newest_checkpoint(tmp_path / "run") / "unet_ema")
    assert pipeline.scheduler.config.prediction_type == "epsilon"


def test_the_command_ends_with_a_grid_of_samples(finished):
    with Image.open(finished / "samples.png") as grid:
        assert grid.size == (2 * 168 + 8, 3 * 213 + 8)


def test_a_finished_run_draws_the_same_grid_again_and_changes_nothing(
    finished, tmp_path, unet, capsys
):
    before = contents_of(finished)
    settings = {"data": finished.parent / "latents", "output_dir": finished, "unet": unet}
    settings |= {"resolution": 32, "global_batch_size": 4, "max_steps": 3, "ema_decay": 0.5}
    main(["tiny", *flags(**settings, num_samples=5)])
    assert "is at step 3 of 3 already" in capsys.readouterr().out
    assert contents_of(finished) == before


def test_a_run_whose_model_is_elsewhere_still_ends_well(
    tmp_path, make_latent_dataset, unet, capsys
):
    data = make_latent_dataset(
        tmp_path / "latents", [9], resolutions=(32,), model=str(tmp_path / "gone")
    ).path
    settings = {"data": data, "output_dir": tmp_path / "run", "unet": unet, "resolution": 32}
    main(["tiny", *flags(**settings, global_batch_size=4, max_steps=1, num_samples=2)])
    assert f"no sample grid: {tmp_path / 'gone'}" in capsys.readouterr().out
    assert (tmp_path / "run" / "unet" / "config.json").exists()


@pytest.mark.parametrize("model", ["nowhere/model", "no-such-folder", "../up/and/away"])
def test_a_model_folder_that_is_not_there_is_an_error_in_one_line(finished, model):
    with pytest.raises(UserError, match=r"cannot be loaded as a pipeline .*--model") as refusal:
        load_pipeline(finished, model, device="cpu")
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith(model)


def test_a_model_of_another_width_is_an_error_in_one_line(tmp_path, model_folder):
    run_on_memory(small_config(tmp_path, max_steps=1))  # its U-Net attends to states of width 32
    with pytest.raises(UserError, match=r"width 128.*wanted 32.*--model"):
        load_pipeline(tmp_path / "run", str(model_folder), device="cpu")


@pytest.mark.parametrize("damage", [b"", b"x" * 500])
def test_damaged_weights_are_an_error_in_one_line(finished, tmp_path, model_folder, damage):
    shutil.copytree(finished, tmp_path / "run")
    folder = find_unet(tmp_path / "run")
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(damage)
    with pytest.raises(UserError, match="cannot be loaded") as refusal:
        load_pipeline(tmp_path / "run", str(model_folder), device="cpu")
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith(str(folder))


def test_an_export_without_its_schedule_is_an_error(finished, tmp_path, model_folder):
    shutil.copytree(finished / "unet", tmp_path / "bare" / "unet")
    with pytest.raises(UserError, match=r"no scheduler/scheduler_config.json"):
        load_pipeline(tmp_path / "bare", str(model_folder), device="cpu")
