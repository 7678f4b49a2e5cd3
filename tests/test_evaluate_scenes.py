import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import image_bytes, sample_members, smooth_image, write_tar
from helpers_train import error_line, flags
from PIL import Image

from evaluate.__main__ import main
from evaluate.scenes import held_out_captions, measure_scenes
from examples.grammar import caption_of, parse_caption, sample_scene
from examples.render import render

PARTS = ("background", "colour", "shape", "size")


def captions_of_scenes(count: int, grammar: str) -> list[str]:
    rng = np.random.default_rng(3)
    return [caption_of(sample_scene(grammar, "held_out", rng)) for _ in range(count)]


@pytest.fixture
def true_renders(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every "generated" picture is drawn from its caption; returns what was asked for."""
    asked: list[dict[str, Any]] = []

    def load_pipeline(run: str, model: str, **settings: Any) -> str:
        asked.append({"run": run, "model": model, **settings})
        return "pipeline"

    def generate(pipeline: str, captions: list[str], **settings: Any) -> list[np.ndarray]:
        asked.append({"pipeline": pipeline, **settings})
        rng = np.random.default_rng(5)
        return [np.asarray(render(parse_caption(caption), rng, 64)) for caption in captions]

    monkeypatch.setattr("evaluate.scenes.load_pipeline", load_pipeline)
    monkeypatch.setattr("evaluate.scenes.generate", generate)
    return asked


def write_scene_shard(folder: Path, captions: list[str]) -> Path:
    rng = np.random.default_rng(0)
    image = image_bytes(smooth_image(rng, 32, 32), "JPEG")
    members = []
    for number, caption in enumerate(captions):
        members += sample_members(f"{number:08d}", image, caption)
    write_tar(folder / "00000.tar", members)
    return folder


@pytest.mark.parametrize("grammar", ["single", "pairs"])
def test_true_renders_are_all_right_and_chance_is_far_lower(tmp_path, true_renders, grammar):
    captions = captions_of_scenes(60, grammar)
    result = measure_scenes(
        str(tmp_path), "model", captions, seed=4, guidance_scale=2.5, weights="raw"
    )
    accuracy, chance = result["accuracy"], result["chance"]
    assert result["num_images"] == 60
    assert accuracy["all_right"] == 1.0
    for part in PARTS:
        assert accuracy[part] == 1.0
        assert chance[part] < 0.75
    assert chance["all_right"] < 0.1
    assert (accuracy["relation"] == 1.0) if grammar == "pairs" else (accuracy["relation"] is None)
    assert true_renders == [
        {"run": str(tmp_path), "model": "model", "weights": "raw"},
        {"pipeline": "pipeline", "seed": 4, "guidance_scale": 2.5},
    ]


def test_pictures_of_other_scenes_score_at_chance(tmp_path, true_renders, monkeypatch):
    captions = captions_of_scenes(60, "single")
    rng = np.random.default_rng(5)
    others = [np.asarray(render(parse_caption(c), rng, 64)) for c in captions[1:] + captions[:1]]
    monkeypatch.setattr("evaluate.scenes.generate", lambda *_, **__: others)
    result = measure_scenes(str(tmp_path), "m", captions, seed=0, guidance_scale=1, weights="auto")
    assert result["accuracy"]["all_right"] < 0.1
    for part in PARTS:
        assert abs(result["accuracy"][part] - result["chance"][part]) < 0.25


def test_the_result_and_a_grid_are_left_in_the_run(tmp_path, true_renders):
    captions = captions_of_scenes(30, "single")
    result = measure_scenes(str(tmp_path), "m", captions, seed=0, guidance_scale=3, weights="auto")
    assert json.loads((tmp_path / "scene_accuracy.json").read_text()) == result
    assert result["grid"] == str(tmp_path / "held_out.png")
    with Image.open(tmp_path / "held_out.png") as grid:
        assert grid.size == (5 * 168 + 8, 5 * 213 + 8), "the first 25"


def test_captions_come_once_each_then_from_the_start_again(tmp_path):
    one, two, three = list(dict.fromkeys(captions_of_scenes(20, "single")))[:3]
    folder = write_scene_shard(tmp_path / "scenes", [one, two, one, "", three])
    assert held_out_captions(str(folder), 2) == [one, two]
    assert held_out_captions(str(folder), 7) == [one, two, three, one, two, three, one]


def test_the_command_prints_a_table_and_one_json_line(tmp_path, true_renders, capsys):
    folder = write_scene_shard(tmp_path / "scenes", captions_of_scenes(20, "single"))
    main(["scenes", *flags(run=tmp_path, scenes=folder, model="m", num_images=20)])
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["accuracy"]["all_right"] == 1.0
    assert [line.split()[0] for line in lines[1:-1]] == [*PARTS, "all_right"]
    assert lines[-2].split()[1] == "100.0%"


@pytest.mark.parametrize(
    ("captions", "num_images", "message"),
    [
        (None, 20, "no such image shard"),
        (["", ""], 20, "no captions"),
        (["a cat on a mat"], 20, "a cat on a mat"),
        (["a large red circle on a yellow background"], 1, "--num-images"),
        (["a large red circle on a yellow background"], 0, "--num-images"),
    ],
)
def test_errors_are_one_line(tmp_path, true_renders, capsys, captions, num_images, message):
    folder = tmp_path / "scenes"
    if captions is not None:
        write_scene_shard(folder, captions)
    argv = ["scenes", *flags(run=tmp_path, scenes=folder, model="m", num_images=num_images)]
    line = error_line(capsys, lambda: main(argv))
    assert line.startswith("evaluate: error: ")
    assert message in line
