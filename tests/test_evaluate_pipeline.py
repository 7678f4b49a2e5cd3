import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
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
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from evaluate.generate import GenerationSettings, settings_of
from evaluate.pipeline import find_unet, is_pipeline, load_pipeline
from evaluate.prompts import load_prompts
from evaluate.sample import generate
from shards.dataset import Dataset
from shards.errors import UserError
from shards.storage import location, write_whole
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
def finished(tmp_path_factory: pytest.TempPathFactory, latent_dataset: Path, unet: str) -> Path:
    """A run of the command at 32 px, with its average and the samples of its end."""
    folder = tmp_path_factory.mktemp("finished")
    settings = {"data": latent_dataset, "output_dir": folder / "run", "unet": unet}
    settings |= {"resolution": 32}
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
    finished, latent_dataset, unet, capsys
):
    before = contents_of(finished)
    settings = {"data": latent_dataset, "output_dir": finished, "unet": unet}
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
    with pytest.raises(UserError, match=r"no such folder.*wanted a diffusers model") as refusal:
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


def test_a_schedule_that_is_none_is_an_error_in_one_line(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for path in (tmp_path / "run").rglob("scheduler_config.json"):
        path.write_text("[3]")
    with pytest.raises(UserError, match="scheduler: not a schedule") as refusal:
        load_pipeline(tmp_path / "run", device="cpu")
    assert "\n" not in str(refusal.value)


def test_an_export_without_its_schedule_is_an_error(finished, tmp_path, model_folder):
    shutil.copytree(finished / "unet", tmp_path / "bare" / "unet")
    with pytest.raises(UserError, match=r"no scheduler/scheduler_config.json"):
        load_pipeline(tmp_path / "bare", str(model_folder), device="cpu")


# Pipelines of others ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    load_pipeline(finished, device="cpu").save_pretrained(out)
    return out


def drop_a_weight(path: Path) -> str:
    """Take the first tensor out of a file; returns its name."""
    weights = load_file(path)
    name = sorted(weights)[0]
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_pipeline_that_lacks_a_weight_is_refused(exported, tmp_path, part):
    """The libraries make up what is missing, with a warning alone."""
    shutil.copytree(exported, tmp_path / "out")
    (path,) = (tmp_path / "out" / part).glob("*.safetensors")
    name = drop_a_weight(path)
    with pytest.raises(
        UserError, match=f"{part}: cannot be loaded .1 weights missing: "
    ) as refusal:
        load_pipeline(tmp_path / "out", device="cpu")
    assert name.removeprefix("text_model.") in str(refusal.value)


def test_a_checkpoint_that_lacks_a_weight_is_refused(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    folder = find_unet(tmp_path / "run")
    name = drop_a_weight(folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=f"lacks 1 weights .* first {name}"):
        load_pipeline(tmp_path / "run", device="cpu")


def test_a_checkpoint_of_another_shape_is_refused_in_one_line(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    path = find_unet(tmp_path / "run") / "config.json"
    path.write_text(
        path.read_text().replace('"block_out_channels": [\n  32', '"block_out_channels": [\n  48')
    )
    with pytest.raises(UserError, match="cannot be loaded") as refusal:
        load_pipeline(tmp_path / "run", device="cpu")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"_class_name": "FluxPipeline"}', "is a FluxPipeline; wanted StableDiffusionPipeline or"),
        ("{}", "is a None; wanted StableDiffusionPipeline or StableDiffusionXLPipeline"),
        ("{", "model_index.json: cannot be read"),
    ],
)
def test_a_pipeline_of_another_kind_is_refused_by_its_name(exported, tmp_path, index, message):
    shutil.copytree(exported, tmp_path / "out")
    (tmp_path / "out" / "model_index.json").write_text(index)
    with pytest.raises(UserError, match=message):
        load_pipeline(tmp_path / "out", device="cpu")


@pytest.mark.parametrize("lost", ["vae", "text_encoder", "tokenizer", "scheduler", "unet"])
def test_a_pipeline_without_one_of_its_parts_is_refused(exported, tmp_path, lost):
    shutil.copytree(exported, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / lost)
    with pytest.raises(UserError, match=lost):
        load_pipeline(tmp_path / "out", device="cpu")


@pytest.mark.parametrize("options", [{"model": "a/b"}, {"weights": "ema"}])
def test_what_a_run_alone_has_is_refused_for_a_pipeline(exported, options):
    with pytest.raises(UserError, match=r"is no run; wanted nothing"):
        load_pipeline(exported, **options, device="cpu")


@pytest.mark.parametrize("source", ["runs/nowhere", "owner/name@main"])
def test_what_is_neither_a_folder_nor_on_the_hub_is_said_to_be_neither(source):
    with pytest.raises(
        UserError, match=f"{source}: no such folder, and not to be had from the hub"
    ):
        load_pipeline(source)


@pytest.mark.parametrize(
    ("name", "kind"), [("euler", EulerDiscreteScheduler), ("ddim", DDIMScheduler)]
)
def test_the_sampler_asked_for_runs_on_the_same_schedule(finished, exported, name, kind):
    for source in (finished, exported):
        scheduler = load_pipeline(source, device="cpu", scheduler=name).scheduler
        assert isinstance(scheduler, kind)
        assert scheduler.config.prediction_type == "v_prediction"
        assert scheduler.config.timestep_spacing == "trailing"


def test_a_pipeline_that_was_saved_in_half_precision_runs_in_the_dtype_asked_for(
    exported, tmp_path
):
    StableDiffusionPipeline.from_pretrained(exported, torch_dtype=torch.float16).save_pretrained(
        tmp_path / "half"
    )
    pipeline = load_pipeline(tmp_path / "half", device="cpu")
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.float32}
    assert pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.float32
    with pytest.raises(UserError, match="dtype: 'float8'; wanted one of float32"):
        load_pipeline(exported, dtype="float8")
    with pytest.raises(UserError, match="--device: cuda:99"):
        load_pipeline(exported, device="cuda:99")


def test_a_run_behind_a_url_is_what_it_is_on_a_disk(finished):
    url = location("memory://runs/finished")
    for name, data in contents_of(finished).items():
        write_whole(url / name, lambda path, data=data: path.write_bytes(data))
    here, there = (load_pipeline(source, device="cpu") for source in (finished, url))
    assert settings_of(here, ["a"], GenerationSettings()) == settings_of(
        there, ["a"], GenerationSettings()
    )
    newest = url / "checkpoints" / newest_checkpoint(finished).name
    assert load_prompts("held-out", str(newest)) == load_prompts("held-out", str(finished))
    assert not is_pipeline(url)


def test_a_pipeline_with_a_safety_checker_is_loaded_without_it(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "out")
    path = tmp_path / "out" / "model_index.json"
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    path.write_text(json.dumps({**json.loads(path.read_text()), "safety_checker": checker}))
    assert load_pipeline(tmp_path / "out", device="cpu").safety_checker is None


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A tiny SDXL: two text encoders, the second with a projection, and size embeddings."""
    text = CLIPTextConfig.from_pretrained(model_folder / "text_encoder")
    text.projection_dim = 32
    tokenizer = CLIPTokenizer.from_pretrained(model_folder / "tokenizer")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=2 * text.hidden_size,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    folder = tmp_path_factory.mktemp("xl") / "xl"
    StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(model_folder / "vae"),
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
    ).save_pretrained(folder)
    return folder


def test_sdxl_is_sampled_as_diffusers_samples_it(xl_folder):
    ours = load_pipeline(xl_folder, device="cpu", scheduler="euler")
    assert isinstance(ours, StableDiffusionXLPipeline)
    assert ours.config.force_zeros_for_empty_prompt
    (image,) = generate(ours, ["a red circle"], seed=5, num_steps=3, guidance_scale=5.0)
    theirs = StableDiffusionXLPipeline.from_pretrained(xl_folder)
    theirs.set_progress_bar_config(disable=True)
    output = theirs(
        "a red circle",
        num_inference_steps=3,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    )
    expected = (output.images[0] * 255).round().astype(np.uint8)
    assert image.shape == (64, 64, 3)
    assert np.abs(image.astype(int) - expected).max() <= 1


def test_sdxl_is_no_model_for_a_run(finished, xl_folder):
    with pytest.raises(UserError, match="has 2 text encoders; wanted the one"):
        load_pipeline(finished, str(xl_folder), device="cpu")
