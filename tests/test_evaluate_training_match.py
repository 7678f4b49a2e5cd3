"""The null condition of sampling is that of training, to the states that the U-Net is given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_generate import run_on_dataset, untrained_run
from safetensors.torch import load_file, save_file

from evaluate.pipeline import load_pipeline
from evaluate.sample import generate
from evaluate.training_match import check_null_condition
from evaluate.training_run import TrainingRun
from precompute.config import PrecomputeConfig
from precompute.job import precompute
from shards.dataset import Dataset
from shards.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, latent_dataset: Path) -> Path:
    return run_on_dataset(tmp_path_factory.mktemp("run"), latent_dataset)


def load(run: Path, model: Path | str = "", **options: Any) -> tuple[Any, str]:
    """The pipeline, and what it said of its training."""
    said: list[str] = []
    pipeline = load_pipeline(run, str(model), device="cpu", say=said.append, **options)
    (line,) = said
    return pipeline, line


def test_the_unet_is_given_the_datasets_null_condition_as_the_unconditional_one(
    run, latent_dataset, monkeypatch
):
    pipeline, said = load(run)
    assert "relative difference" in said
    seen: list[torch.Tensor] = []
    real = pipeline.unet.forward

    def forward(sample: torch.Tensor, timestep: Any, **inputs: Any) -> Any:
        seen.append(inputs["encoder_hidden_states"])
        return real(sample, timestep, **inputs)

    monkeypatch.setattr(pipeline.unet, "forward", forward)
    generate(pipeline, ["a red circle", "a blue square"], num_steps=2, guidance_scale=4.0)
    dataset = Dataset(latent_dataset)
    null = dataset.read_null(dataset.text_column())["states"].astype(np.float32)
    assert len(seen) == 2
    for states in seen:
        unconditional, conditional = states.chunk(2)
        for one in unconditional.numpy():
            assert np.abs(one - null).max() < 2e-3 * np.abs(null).max()
        assert np.abs(conditional.numpy() - null).max() > 0.1 * np.abs(null).max()


def test_a_unet_that_knows_a_stored_sample_gives_the_picture_that_its_latents_decode_to(
    run, latent_dataset, monkeypatch
):
    """Through the scale of training, noise, sampler, VAE and [-1, 1] to pixels."""
    pipeline, _ = load(run, scheduler="ddim")
    dataset = Dataset(latent_dataset)
    image = dataset.image_column(32)
    moments = torch.from_numpy(image.map_shard("00000")["moments"][3].astype(np.float32))
    latents = moments[:4] * image.spec.scaling_factor

    def forward(noisy: torch.Tensor, timestep: Any, **_: Any) -> tuple[torch.Tensor]:
        signal = pipeline.scheduler.alphas_cumprod[int(timestep)] ** 0.5
        sigma = (1 - signal**2) ** 0.5
        noise = (noisy - signal * latents) / sigma
        return (signal * noise - sigma * latents,)  # v

    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    monkeypatch.setattr(pipeline.unet, "forward", forward)
    (picture,) = generate(pipeline, ["a red circle"], num_steps=10)
    with torch.inference_mode():
        decoded = pipeline.vae.decode(moments[None, :4]).sample[0]
    expected = ((decoded.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(picture - expected).max() <= 1
    assert expected.std() > 1


def test_a_model_is_found_by_what_the_run_was_trained_with(run, model_folder):
    pipeline, _ = load(run)
    assert pipeline.tokenizer.name_or_path == str(model_folder)


def edited(model: Path, to: Path, edit: Callable[[Path], None]) -> Path:
    shutil.copytree(model, to)
    edit(to)
    return to


def pad_with_another_token(model: Path) -> None:
    """As the tokenizers of SD 1 and SD 2 differ."""
    path = model / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "pad_token": "!"}))


def shorten(model: Path) -> None:
    path = model / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 32}))


def change_text_encoder(model: Path, noise: float = 0.05) -> None:
    path = model / "text_encoder" / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: weight + noise * weight.std() * torch.randn(weight.shape, generator=generator)
        if weight.is_floating_point() and weight.ndim > 1
        else weight
        for name, weight in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})


def change_scale(model: Path) -> None:
    path = model / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 0.18215}))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (pad_with_another_token, "its tokenizer makes other token ids"),
        (shorten, "its tokenizer makes other token ids"),
        (change_text_encoder, r"its states differ by \d+\.\d% of their size"),
        (change_scale, r"its VAE has scaling_factor 0\.18215; wanted"),
    ],
)
def test_a_model_that_is_not_that_of_the_training_is_refused(
    run, model_folder, tmp_path, edit, message
):
    other = edited(model_folder, tmp_path / "other", edit)
    with pytest.raises(UserError, match=message) as refusal:
        load(run, other)
    assert str(refusal.value).startswith(str(other))
    assert "--model" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_copy_of_the_model_elsewhere_is_the_same_model(run, model_folder, tmp_path):
    copy = edited(model_folder, tmp_path / "copy", lambda folder: None)
    assert "relative difference" in load(run, copy)[1]


def test_rounding_of_stage_1_is_no_other_model(run, model_folder, tmp_path):
    """Weights saved in half precision, as many are on the hub."""

    def halve(model: Path) -> None:
        path = model / "text_encoder" / "model.safetensors"
        save_file(
            {name: weight.half() for name, weight in load_file(path).items()},
            path,
            metadata={"format": "pt"},
        )

    pipeline, said = load(run, edited(model_folder, tmp_path / "half", halve))
    assert "relative difference" in said
    assert pipeline.text_encoder.dtype == torch.float32


def test_half_precision_is_compared_before_it_rounds(run):
    pipeline, said = load(run, dtype="bfloat16")
    assert pipeline.unet.dtype == torch.bfloat16
    assert "relative difference 0.0" in said


def with_settings(run: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(run, to)
    record = json.loads((to / "config.json").read_text())
    record["settings"] |= changes
    (to / "config.json").write_text(json.dumps(record))
    return to


def test_a_dataset_that_is_gone_is_said_and_the_run_still_loads(run, model_folder, tmp_path):
    moved = with_settings(run, tmp_path / "run", data=str(tmp_path / "gone"))
    _, said = load(moved, model_folder)
    assert said.startswith(f"null condition not compared with that of training: {tmp_path}/gone")
    assert "Remedy" not in said
    with pytest.raises(UserError, match=r"does not say which model .*gone.*--model"):
        load(moved)


def test_a_run_without_records_wants_a_model_named(run, model_folder, tmp_path):
    shutil.copytree(run / "unet", tmp_path / "bare" / "unet")
    shutil.copytree(run / "scheduler", tmp_path / "bare" / "scheduler")
    with pytest.raises(UserError, match=r"does not say which model .*--model <folder or hub id>"):
        load(tmp_path / "bare")
    assert "its training is not known" in load(tmp_path / "bare", model_folder)[1]


def test_a_run_on_a_dataset_that_was_made_anew_since_is_not_refused(
    latent_dataset, model_folder, tmp_path
):
    """Its own null condition is no longer to be had: that of another encoder proves nothing."""
    data = tmp_path / "latents"
    shutil.copytree(latent_dataset, data)
    run = run_on_dataset(tmp_path, data)
    other = edited(model_folder, tmp_path / "other", change_text_encoder)
    with pytest.raises(UserError, match="is not the null condition of the training"):
        load(run, other)
    changed = with_settings(run, tmp_path / "changed")
    record = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**record, "batches": "another"}))
    assert "warning: the dataset has changed since the training" in load(changed, other)[1]
    assert "relative difference" in load(changed)[1]


def test_a_damaged_null_condition_is_refused(latent_dataset, tmp_path):
    data = tmp_path / "latents"
    shutil.copytree(latent_dataset, data)
    run = run_on_dataset(tmp_path, data)
    (null,) = data.glob("text-*/null.safetensors")
    null.write_bytes(null.read_bytes()[:-8] + b"\x00\x3c" * 4)
    with pytest.raises(UserError, match=r"null\.safetensors"):
        load(run)


def test_a_run_that_dropped_no_caption_is_told_that_guidance_was_not_learnt(run, tmp_path):
    never = with_settings(run, tmp_path / "run", caption_drop_prob=0.0)
    assert "guidance has not been learnt" in load(never)[1]
    assert "guidance has not been learnt" not in load(run)[1]


def test_a_run_on_numbers_in_memory_loads(tmp_path, model_folder):
    run = untrained_run(tmp_path)
    assert "not compared" in load(run, model_folder)[1]


# Datasets of token ids ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ids_run(
    tmp_path_factory: pytest.TempPathFactory, image_shards: Path, model_folder: Path
) -> Path:
    folder = tmp_path_factory.mktemp("ids")
    precompute(
        PrecomputeConfig(
            shards=str(image_shards / "00000.tar"),
            out=str(folder / "latents"),
            model=str(model_folder),
            resolutions="32",
            text="ids",
            device="cpu",
            batch_size=8,
        )
    )
    return run_on_dataset(folder, folder / "latents", validation_samples=1)


def test_a_dataset_of_token_ids_knows_its_text_encoder_by_its_weights(
    ids_run, model_folder, tmp_path
):
    assert "of the same text encoder" in load(ids_run)[1]
    other = edited(model_folder, tmp_path / "other", change_text_encoder)
    with pytest.raises(UserError, match="its text encoder has other weights"):
        load(ids_run, other)
    padded = edited(model_folder, tmp_path / "padded", pad_with_another_token)
    with pytest.raises(UserError, match="its tokenizer makes other token ids"):
        load(ids_run, padded)
    assert TrainingRun(ids_run).held_out(TrainingRun(ids_run).data)


def test_the_difference_is_measured_against_the_size_of_the_states(run, monkeypatch):
    pipeline, _ = load(run)
    data = TrainingRun(run).data
    exact = check_null_condition(pipeline, data)
    assert 0 < exact < 1e-3
    real = pipeline.encode_prompt
    monkeypatch.setattr(pipeline, "encode_prompt", lambda *a, **k: (real(*a, **k)[0] * 1.001, None))
    assert abs(check_null_condition(pipeline, data) - 0.001) < 2e-4
