"""A run as a folder that diffusers loads: the same images, whole or not at all."""

from __future__ import annotations

import json
import shutil
import signal
import stat
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from helpers_generate import difference, run_on_dataset, wait_for
from helpers_train import Killed, contents_of, error_line, flags, newest_checkpoint, start
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import evaluate.export
from evaluate.__main__ import main
from evaluate.export import Export, export_pipeline
from evaluate.pipeline import load_pipeline
from evaluate.prompts import load_prompts
from evaluate.sample import generate
from shards.errors import StorageError, UserError
from shards.storage import location

PROMPTS = ["a red circle", "a blue square above a green triangle", ""]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, latent_dataset: Path) -> Path:
    return run_on_dataset(tmp_path_factory.mktemp("run"), latent_dataset)


def export(run: Path, out: Path | str, archive: Path | str = "", **changes: Any) -> None:
    what = Export(**({"run": str(run), "scheduler": "dpm++"} | changes))
    export_pipeline(what, str(out), str(archive))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, run: Path) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    export(run, out)
    return out


def images_of(pipeline: Any) -> list[np.ndarray]:
    return generate(pipeline, PROMPTS, seed=3, num_steps=4)


def of_run(run: Path, **options: Any) -> list[np.ndarray]:
    return images_of(load_pipeline(run, device="cpu", **options))


# What is in it ------------------------------------------------------------------------------------


def test_the_folder_makes_the_images_of_the_run_to_the_bit(run, exported):
    expected = of_run(run)
    ours = images_of(load_pipeline(exported, device="cpu"))
    assert all(np.array_equal(*pair) for pair in zip(expected, ours, strict=True))


def test_diffusers_loads_it_and_makes_the_same_images_without_us(run, exported):
    pipeline = StableDiffusionPipeline.from_pretrained(exported)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    assert pipeline.safety_checker is None
    for number, (prompt, expected) in enumerate(zip(PROMPTS, of_run(run), strict=True)):
        output = pipeline(
            prompt,
            num_inference_steps=4,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(3 + number),
            output_type="np",
        )
        pixels = (output.images[0] * 255).round().astype(np.uint8)
        assert difference(pixels, expected) <= 1


def test_the_schedule_is_that_of_the_training(run, exported):
    trained = json.loads((run / "scheduler" / "scheduler_config.json").read_text())
    saved = json.loads((exported / "scheduler" / "scheduler_config.json").read_text())
    for name in ("beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_spacing"):
        assert saved[name] == trained[name]
    assert saved["_class_name"] == "DPMSolverMultistepScheduler"


@pytest.mark.parametrize(("weights", "part"), [("raw", "unet"), ("ema", "unet_ema")])
def test_the_weights_asked_for_are_saved(run, tmp_path, weights, part):
    export(run, tmp_path / "out", weights=weights)
    (saved,) = (tmp_path / "out" / "unet").glob("*.safetensors")
    (trained,) = (newest_checkpoint(run) / part).glob("*.safetensors")
    ours, theirs = load_file(saved), load_file(trained)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert f"| weights | {part} of " in (tmp_path / "out" / "README.md").read_text()


def test_half_precision_with_its_variant_in_the_names(run, exported, tmp_path):
    out = tmp_path / "half"
    main(["export", *flags(run=run, out=out, variant="fp16")])
    names = [path.name for path in out.rglob("*.safetensors")]
    assert len(names) == 3
    assert all(".fp16." in name for name in names)
    pipeline = StableDiffusionPipeline.from_pretrained(
        out, variant="fp16", torch_dtype=torch.float16
    )
    assert pipeline.unet.dtype == pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.float16
    ours = images_of(load_pipeline(out, device="cpu"))
    for one, other in zip(ours, images_of(load_pipeline(exported, device="cpu")), strict=True):
        assert difference(one, other) < 40
        assert np.abs(one.astype(int) - other).mean() < 3
    assert 'variant="fp16"' in (out / "README.md").read_text()


def test_bfloat16_halves_the_bytes(run, exported, tmp_path):
    export(run, tmp_path / "out", dtype="bfloat16")
    sizes = [
        (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
        for folder in (tmp_path / "out", exported)
    ]
    assert 0.45 < sizes[0] / sizes[1] < 0.55


def test_the_card_says_how_it_was_made(run, exported, latent_dataset):
    card = (exported / "README.md").read_text()
    header = card.split("---\n")[1]
    assert "pipeline_tag: text-to-image" in header
    assert "library_name: diffusers" in header
    for said in (
        f"| weights | unet_ema of {newest_checkpoint(run)} |",
        f"| `data` | {latent_dataset} |",
        "| `global_batch_size` | 4 |",
        "| sampler | DPMSolverMultistepScheduler |",
        "relative difference",
        "images of 32 x 32 pixels",
        f"torch {torch.__version__}",
    ):
        assert said in card
    assert "{" not in card


def test_a_run_that_writes_its_next_checkpoint_meanwhile_is_exported_as_it_was(
    run, tmp_path, monkeypatch
):
    growing = tmp_path / "run"
    shutil.copytree(run, growing)
    newest = newest_checkpoint(growing)
    real = evaluate.export.load_pipeline

    def load_while_it_grows(source: Any, *args: Any, **options: Any) -> Any:
        if not (growing / "checkpoints" / "000009").exists():
            shutil.copytree(newest, growing / "checkpoints" / "000009")
        return real(source, *args, **options)

    monkeypatch.setattr(evaluate.export, "load_pipeline", load_while_it_grows)
    export(growing, tmp_path / "out")
    assert f"unet_ema of {newest} |" in (tmp_path / "out" / "README.md").read_text()
    loaded = json.loads((tmp_path / "out" / "training.json").read_text())
    assert loaded["exported"]["unet"] == str(newest / "unet_ema")


def test_it_remembers_what_its_run_held_out(run, exported):
    assert load_prompts("held-out", str(exported)) == load_prompts("held-out", str(run))


def test_others_may_read_it(exported):
    for path in exported.rglob("*"):
        assert path.stat().st_mode & stat.S_IROTH


def test_a_pipeline_from_a_checkpoint_is_that_of_the_run(run, exported, tmp_path):
    export(newest_checkpoint(run), tmp_path / "out")
    ours, theirs = contents_of(tmp_path / "out"), contents_of(exported)
    assert ours == theirs


# Whole or not at all ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (OSError(28, "No space left on device"), StorageError),
        (SafetensorError("I/O error: No space left on device (os error 28)"), StorageError),
        (Killed(), Killed),
    ],
)
@pytest.mark.parametrize("out", ["out", ""])
def test_an_export_that_fails_leaves_nothing(run, tmp_path, monkeypatch, failure, expected, out):
    def fail(*_: Any, **__: Any) -> str:
        raise failure

    monkeypatch.setattr(evaluate.export, "model_card", fail)
    with pytest.raises(expected):
        export(run, out and tmp_path / out, tmp_path / "out.tar.gz")
    assert list(tmp_path.iterdir()) == []


def test_an_archive_inside_the_folder_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"--archive: .* is inside .*; wanted another folder"):
        export(run, tmp_path / "out", tmp_path / "x" / ".." / "out" / "model.tar.gz")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_cleared(run, exported, tmp_path):
    left = tmp_path / "out.partial" / "unet"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    (tmp_path / "out.partial" / "rest").write_bytes(b"x")
    export(run, tmp_path / "out")
    assert contents_of(tmp_path / "out") == contents_of(exported)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_kill_9_while_it_writes_and_the_same_command_again(run, exported, tmp_path):
    argv = ["export", *flags(run=run, out=tmp_path / "out")]
    process = start("-m", "evaluate", *argv)
    partial = tmp_path / "out.partial"
    try:
        wait_for(lambda: any(partial.glob("*/*")) or process.poll() is not None)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert not (tmp_path / "out").exists()
    main(argv)
    assert contents_of(tmp_path / "out") == contents_of(exported)
    assert not partial.exists()


@pytest.mark.parametrize("kind", ["folder", "file", "dangling"])
def test_what_is_there_already_is_not_touched(run, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "mine").write_text("x")
    elif kind == "file":
        out.write_text("x")
    else:
        out.symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"is there already.*another --out"):
        export(run, out)
    assert contents_of(tmp_path).keys() <= {"out/mine", "out"}


def test_weights_that_half_precision_cannot_hold_are_refused(run, tmp_path):
    large = tmp_path / "run"
    shutil.copytree(newest_checkpoint(run), large / "checkpoints" / "000002")
    for name in ("config.json", "scheduler"):
        source = run / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, large / name)
    (path,) = (large / "checkpoints" / "000002" / "unet_ema").glob("*.safetensors")
    weights = load_file(path)
    weights["conv_in.bias"][3] = 1e5
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"unet, conv_in\.bias: not finite in float16"):
        export(large, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    export(large, tmp_path / "out", dtype="bfloat16")


# The archive --------------------------------------------------------------------------------------


def test_the_archive_holds_the_folder_at_its_top_and_is_the_same_each_time(run, exported, tmp_path):
    export(run, tmp_path / "out", tmp_path / "model.tar.gz")
    export(run, "", tmp_path / "again.tar.gz")
    with tarfile.open(tmp_path / "model.tar.gz", "r:gz") as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    assert contents_of(tmp_path / "unpacked") == contents_of(exported)
    assert (tmp_path / "model.tar.gz").read_bytes() == (tmp_path / "again.tar.gz").read_bytes()
    pipeline = load_pipeline(tmp_path / "unpacked", device="cpu")
    assert np.array_equal(images_of(pipeline)[1], of_run(run)[1])


def test_the_archive_may_go_behind_a_url_and_the_folder_may_not(run, tmp_path):
    url = "memory://exports/model.tar.gz"
    export(run, "", url)
    (tmp_path / "model.tar.gz").write_bytes(location(url).read_bytes())
    with tarfile.open(tmp_path / "model.tar.gz") as tar:
        assert "model_index.json" in tar.getnames()
    with pytest.raises(UserError, match="is behind a URL; wanted a local folder"):
        export(run, "memory://exports/folder")


# The command --------------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote_and_what_it_compared(run, tmp_path, capsys):
    main(["export", *flags(run=run, out=tmp_path / "out", archive=tmp_path / "out.tar.gz")])
    said = capsys.readouterr()
    assert said.out.splitlines() == [str(tmp_path / "out"), str(tmp_path / "out.tar.gz")]
    assert "null condition: that of " in said.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": ""}, "--out: not given, nor --archive"),
        ({"archive": "model.zip"}, "--archive: model.zip; wanted a name that ends in .tar.gz"),
        ({"variant": "fp16", "dtype": "bfloat16"}, "--variant: fp16 of bfloat16"),
        ({"run": "/nowhere"}, "/nowhere: no U-Net"),
        ({"scheduler": "k"}, "scheduler: 'k'"),
        ({"model": "gone"}, "gone: no such folder"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(run, tmp_path, capsys, changes, message):
    settings = {"run": run, "out": tmp_path / "out"} | changes
    line = error_line(capsys, lambda: main(["export", *flags(**settings)]))
    assert line.startswith(f"evaluate: error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_is_not_exported_again(exported, tmp_path):
    with pytest.raises(UserError, match="is a pipeline already; wanted a training run"):
        export(exported, tmp_path / "out")
