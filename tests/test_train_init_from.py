"""Starting from weights alone: the hand-off from one run, or from a model, to another run."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers_train import (
    newest_checkpoint,
    run_on_memory,
    small_config,
    tensors_of,
    write_unet,
)
from safetensors.torch import load_file

from shards.errors import UserError
from train.trainer import Trainer


@pytest.fixture(scope="module")
def first_phase(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with an average that differs from its weights."""
    folder = tmp_path_factory.mktemp("first")
    run_on_memory(small_config(folder, ema_decay=0.9))
    return folder / "run"


def start_of(folder: Path, source: object, **changes: object) -> Trainer:
    """A trainer at the start of a run from `source`."""
    from helpers_train import MemoryBatches

    from train.trainer import build_accelerator

    config = small_config(folder, init_from=str(source), **changes)
    return Trainer(config, MemoryBatches(), build_accelerator(config))


def weights_of(checkpoint: Path, part: str = "unet") -> dict[str, torch.Tensor]:
    return load_file(checkpoint / part / "diffusion_pytorch_model.safetensors")


def assert_starts_from(trainer: Trainer, weights: dict[str, torch.Tensor]) -> None:
    assert trainer.step == 0
    assert trainer.model.weights.tensors.keys() == weights.keys()
    for name, master in trainer.model.weights.tensors.items():
        assert torch.equal(master, weights[name]), name
    assert not trainer.model.update.optimizer.state, "weights alone, not the optimizer"


@pytest.mark.parametrize(("kind", "part"), [("raw", "unet"), ("ema", "unet_ema")])
def test_a_run_starts_from_the_weights_of_another(tmp_path, first_phase, kind, part):
    checkpoint = newest_checkpoint(first_phase)
    for source in (first_phase, checkpoint):
        trainer = start_of(tmp_path / source.name, source, init_weights=kind, seed=5)
        assert_starts_from(trainer, weights_of(checkpoint, part))
    assert not torch.equal(
        weights_of(checkpoint, "unet")["conv_in.weight"],
        weights_of(checkpoint, "unet_ema")["conv_in.weight"],
    )


def test_a_diffusers_folder_and_its_unet_are_both_taken(tmp_path, first_phase):
    weights = weights_of(newest_checkpoint(first_phase))
    unet = UNet2DConditionModel.from_pretrained(newest_checkpoint(first_phase) / "unet")
    unet.save_pretrained(tmp_path / "model" / "unet")
    for source in (tmp_path / "model", tmp_path / "model" / "unet"):
        assert_starts_from(start_of(tmp_path / source.name, source), weights)


def test_weights_stored_in_float16_become_float32_masters(tmp_path, first_phase):
    unet = UNet2DConditionModel.from_pretrained(newest_checkpoint(first_phase) / "unet")
    unet.half().save_pretrained(tmp_path / "model" / "unet")
    trainer = start_of(tmp_path, tmp_path / "model", mixed_precision="bf16-weights")
    for name, weight in weights_of(newest_checkpoint(first_phase)).items():
        assert torch.equal(trainer.model.weights.tensors[name], weight.half().float())
    assert {p.dtype for p in trainer.model.unet.parameters()} == {torch.bfloat16}


def test_a_second_phase_may_have_another_size_and_resumes_as_itself(tmp_path, first_phase):
    config = small_config(tmp_path, init_from=str(first_phase), max_steps=4, checkpoint_every=2)
    whole = run_on_memory(config)
    assert whole.step == 4
    short = small_config(tmp_path / "b", init_from=str(first_phase), max_steps=2)
    run_on_memory(short)
    resumed = small_config(tmp_path / "b", init_from=str(first_phase), max_steps=4)
    run_on_memory(resumed)
    one, other = (tensors_of(newest_checkpoint(run)) for run in (whole.run_dir, resumed.output_dir))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_weights_for_a_run_that_has_begun_are_refused_not_ignored(tmp_path, first_phase):
    run_on_memory(small_config(tmp_path, max_steps=2))
    with pytest.raises(UserError, match="init_from"):
        start_of(tmp_path, first_phase, max_steps=2)


def test_what_was_said_of_the_start_is_announced(tmp_path, first_phase, capsys):
    start_of(tmp_path, first_phase).announce()
    assert f"starting from the raw weights of {first_phase}" in capsys.readouterr().out


def test_weights_of_another_unet_are_refused_by_name_and_shape(tmp_path, first_phase):
    other = write_unet(tmp_path / "other.json", block_out_channels=[32, 96])
    with pytest.raises(UserError, match=r"weights of another U-Net .*wanted .*--init-from"):
        start_of(tmp_path, first_phase, unet=other)


@pytest.mark.parametrize("source", ["nowhere/at-all", "missing"])
def test_a_hub_id_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch, source):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=rf"{source}: no U-Net weights \(.*--init-from") as error:
        start_of(tmp_path, source)
    assert "\n" not in str(error.value)


def test_a_run_without_an_average_has_none_to_start_from(tmp_path):
    run_on_memory(small_config(tmp_path / "plain", max_steps=1))
    with pytest.raises(UserError, match="ema"):
        start_of(tmp_path, tmp_path / "plain" / "run", init_weights="ema")
