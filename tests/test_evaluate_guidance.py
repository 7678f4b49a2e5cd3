"""The guidance sweep and the metrics command, on a pipeline of random weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import image_bytes, sample_members, write_tar
from helpers_clip import build_clip_folder
from helpers_train import contents_of, error_line, flags, write_unet
from PIL import Image

from evaluate.__main__ import main
from evaluate.assemble import assemble
from evaluate.generated import Generated
from evaluate.guidance import table_of
from evaluate.protocols import PROTOCOLS
from evaluate.schedulers import SCHEDULERS
from examples.grammar import caption_of, sample_scene
from examples.render import render
from train.config import TrainConfig
from train.objective import Objective
from train.unet import build_unet, load_unet_config

NUM_IMAGES = 4


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of scenes with their captions."""
    rng = np.random.default_rng(3)
    members = []
    for number in range(6):
        scene = sample_scene("single", "held_out", rng)
        image = image_bytes(render(scene, rng, 64))
        members += sample_members(f"{number:04d}", image, caption_of(scene))
    return write_tar(tmp_path_factory.mktemp("scenes") / "00000.tar", members).parent


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Any:
    path = write_unet(tmp_path_factory.mktemp("unet") / "unet.json", cross_attention_dim=128)
    schedule = Objective(TrainConfig(), torch.device("cpu")).scheduler_config()
    return assemble(build_unet(load_unet_config(path), 8, 0), schedule, str(model_folder))


@pytest.fixture
def sweep(monkeypatch, tmp_path, pipeline, scenes, clip_folder):
    """`sweep(...)`: run the command with these flags changed; returns its folder."""
    monkeypatch.setattr("evaluate.pipeline.load_pipeline", lambda *_, **__: pipeline)

    def run(**changes: Any) -> Path:
        settings = {
            "source": "a-run",
            "scenes": scenes,
            "num_images": NUM_IMAGES,
            "num_steps": 2,
            "features": clip_folder,
            "clip": clip_folder,
            "out": tmp_path / "out",
        }
        chosen = {n: v for n, v in (settings | changes).items() if v is not None}
        main(["guidance", *flags(**chosen), "--scales", "1", "4"])
        return Path(chosen["out"])

    return run


def test_prompts_keep_the_keys_of_their_source(sweep, tmp_path, scenes):
    """For COCO: the images that the reference should be of."""
    images = [{"id": number} for number in range(6)]
    captions = [{"image_id": n, "id": 10 + n, "caption": f"a lion {n}"} for n in range(6)]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": captions}))
    out = sweep(scenes=None, prompts=f"coco:{path}", reference=scenes)
    rows = Generated(out / "guidance-4").rows
    assert [row["prompt"] for row in rows] == [f"a lion {row['key']}" for row in rows]


def test_every_scale_is_generated_measured_and_shown(sweep, capsys, clip_folder, scenes):
    out = sweep()
    document = json.loads((out / "guidance.json").read_text())
    assert [row["guidance_scale"] for row in document["scales"]] == [1, 4]
    for row in document["scales"]:
        assert row["num_images"] == NUM_IMAGES
        assert row["num_reference"] == 6
        assert len(row["clip_scores"]) == NUM_IMAGES
        assert {"fid", "kid", "clip_score", "scene_accuracy", "warnings"} <= row.keys()
        assert Generated(row["folder"]).missing() == []
    first, second = document["scales"]
    assert first["fid"] != second["fid"]
    assert document["features"]["name"] == document["clip"]["name"] == str(clip_folder)
    assert len(document["features"]["weights_sha256"]) == 64
    assert document["reference"]["source"] == str(scenes)
    assert document["used"]["num_steps"] == 2
    assert document["protocol"]["num_steps"] == 20, "what was changed is beside what it was"
    with Image.open(out / "grid.png") as grid:
        columns = len(set(Generated(first["folder"]).prompts))
        assert grid.size == (columns * 168 + 8, 2 * 213 + 8), "a row for each scale"
    with Image.open(out / "guidance.png") as plot:
        assert np.asarray(plot.convert("L")).std() > 10
    lines = capsys.readouterr().out.splitlines()
    assert (out / "guidance.md").read_text().splitlines() == lines[:4]
    assert [row["guidance_scale"] for row in json.loads(lines[-1])] == [1, 4]


def test_the_same_noise_starts_the_images_of_every_scale(sweep):
    out = sweep()
    one, other = (Generated(out / f"guidance-{scale}") for scale in (1, 4))
    assert [row["seed"] for row in one.rows] == list(range(NUM_IMAGES))
    assert one.rows == other.rows
    assert one.settings["guidance_scale"] == 1
    assert other.settings["guidance_scale"] == 4


def test_the_same_command_makes_what_is_missing_and_the_same_figures(sweep):
    out = sweep()
    before = contents_of(out)
    for name in ("guidance-4/images/000002.png", "guidance.json", "guidance.png"):
        (out / name).unlink()
    untouched = out / "guidance-1" / "images" / "000000.png"
    made = untouched.stat().st_mtime_ns
    assert contents_of(sweep()) == before
    assert untouched.stat().st_mtime_ns == made


def test_prompts_and_a_folder_of_pictures_take_the_place_of_scenes(sweep, tmp_path, pipeline):
    folder = tmp_path / "real"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        pixels = rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    out = sweep(scenes=None, prompts="a lion; a leaf", reference=folder)
    document = json.loads((out / "guidance.json").read_text())
    assert "scene_accuracy" not in document["scales"][0]
    assert document["reference"]["size"] == [64, 64]
    assert Generated(out / "guidance-1").prompts == ["a lion", "a leaf"] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scenes": None}, "wanted --scenes, or both --prompts and --reference"),
        ({"scenes": None, "prompts": "a lion"}, "wanted --scenes, or both"),
        ({"num_images": 1}, "--num-images: 1; wanted at least 2"),
        ({"features": "inception:gone.pth"}, "its weights are not at gone.pth"),
        ({"clip": "gone"}, "gone: no such folder"),
        ({"out": None}, "--out: not given"),
        ({"device": "gpu"}, "--device: gpu"),
    ],
)
def test_errors_are_one_line_and_come_before_the_generating(
    sweep, capsys, tmp_path, changes, message
):
    line = error_line(capsys, lambda: sweep(**changes))
    assert line.startswith("evaluate: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_protocols_name_samplers_that_exist_and_a_source_for_each_number():
    for protocol in PROTOCOLS.values():
        assert protocol.scheduler in SCHEDULERS
        assert protocol.num_images >= 2
        assert protocol.sources
    for name in ("coco-30k", "mlperf-sd2"):
        protocol = PROTOCOLS[name]
        stated = {"num_images", "side", "scheduler", "num_steps", "scales", "features", "clip"}
        assert stated <= protocol.sources.keys()
    assert PROTOCOLS["coco-30k"].scales == (1, 1.5, 2, 3, 4, 5, 6, 7, 8)
    mlperf = PROTOCOLS["mlperf-sd2"]
    assert (mlperf.max_fid, mlperf.min_clip_score, mlperf.scales) == (90, 15, (8,))


def test_a_target_is_judged_by_both_figures(capsys):
    from evaluate.commands.guidance import _report

    def judged(fid: float, clip_score: float) -> str:
        row = {"guidance_scale": 8.0, "num_images": 2, "fid": fid, "clip_score": clip_score}
        row |= {"clip_score_spread": {"p10": 0.0, "median": 0.0, "p90": 0.0}, "warnings": []}
        _report([row], PROTOCOLS["mlperf-sd2"], "out")
        return capsys.readouterr().out

    assert "target at 8 (FID <= 90, CLIP score >= 15): met" in judged(90, 15)
    assert "missed" in judged(90.1, 15)
    assert "missed" in judged(90, 14.9)


def test_a_table_without_kid_has_no_column_for_it():
    row = {"guidance_scale": 1.5, "fid": 2.0, "clip_score": 3.0}
    row["clip_score_spread"] = {"p10": 1.0, "median": 3.0, "p90": 5.0}
    head, _, body = table_of([row]).splitlines()
    assert head == "| guidance | FID | CLIP score (p10 to p90) |"
    assert body == "| 1.5 | 2.000 | 3.00 (1.0 to 5.0) |"


# The metrics command ------------------------------------------------------------------------------


def measure(capsys: pytest.CaptureFixture[str], **settings: Any) -> dict[str, Any]:
    capsys.readouterr()
    main(["metrics", *flags(**settings)])
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


def test_metrics_are_those_of_the_sweep_and_a_saved_reference_gives_them_again(
    sweep, capsys, tmp_path, scenes, clip_folder
):
    out = sweep()
    row = json.loads((out / "guidance.json").read_text())["scales"][1]
    saved, common = tmp_path / "real.safetensors", {"features": clip_folder}
    common |= {"images": out / "guidance-4"}
    fresh = measure(capsys, **common, reference=scenes, save_reference=saved)
    again = measure(capsys, **common, reference=saved, out=tmp_path / "metrics.json")
    for name in ("fid", "kid", "clip_score", "num_images", "num_reference"):
        assert fresh[name] == again[name] == row[name]
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["clip_scores"] == row["clip_scores"]
    assert written["features"]["weights_sha256"] == fresh["features"]["weights_sha256"]


def test_pictures_against_themselves_have_no_distance(capsys, scenes, clip_folder):
    found = measure(capsys, images=scenes, reference=scenes, features=clip_folder)
    assert found["fid"] == pytest.approx(0, abs=1e-6)
    assert found["num_images"] == found["num_reference"] == 6
    assert "clip_score" in found, "shards have captions"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "nothing to do"),
        ({"images": "gone"}, "gone: no such image shard"),
        ({"save_reference": "x.npz"}, "wanted a name that ends in .safetensors"),
        ({"images": "gone", "batch_size": 0}, "--batch-size: 0"),
        ({"images": "gone", "features": "gone.pt"}, "feature network gone.pt: no such file"),
        ({"images": "gone", "device": "gpu"}, "--device: gpu"),
    ],
)
def test_errors_of_the_metrics_are_one_line(capsys, scenes, clip_folder, changes, message):
    settings = {"reference": scenes, "features": clip_folder} | changes
    line = error_line(capsys, lambda: main(["metrics", *flags(**settings)]))
    assert message in line
