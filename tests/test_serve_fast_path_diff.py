"""`python -m serve diff` and what it writes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from serve.fast_path import FastPath
from serve.image_diff import DIFFERENCES, SHEET, compare, say, to_uint8, write_differences


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


def test_equal_images_have_no_difference_and_no_ratio(picture):
    found = compare(picture, picture.copy())
    assert (found.max_levels, found.mean_levels, found.psnr_db) == (0, 0.0, None)
    assert say(found) == "equal"


def test_a_difference_is_counted_in_both_directions():
    """Bytes wrap around: 0 - 255 is 1."""
    dark, light = np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2, 3), np.uint8)
    light[0, 0, 0] = 255
    for pair in ((dark, light), (light, dark)):
        found = compare(*pair)
        assert found.max_levels == 255
        assert found.mean_levels == 255 / 12
        assert found.psnr_db == pytest.approx(10 * np.log10(12))


def test_images_of_two_sizes_are_not_compared(picture):
    with pytest.raises(AssertionError):
        compare(picture, picture[:, :-1])


def test_images_and_numbers_lie_beside_each_other(tmp_path, picture):
    other = picture.copy()
    other[0, 0] ^= 1
    found = write_differences(tmp_path, [picture, other], [picture, picture])
    rows = json.loads((tmp_path / DIFFERENCES).read_text())["differences"]
    assert [row["max_levels"] for row in rows] == [each.max_levels for each in found] == [0, 1]
    for row, expected in zip(rows, (picture, other), strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / row["fast"])), expected)
        assert np.array_equal(np.asarray(Image.open(tmp_path / row["plain"])), picture)
    assert Image.open(tmp_path / SHEET).size > (24, 16)


def test_pixels_of_a_pipeline_become_bytes_to_the_nearest():
    import torch

    pixels = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 1.0, float("nan")])[None, None, None, :]
    (found,) = to_uint8(pixels.expand(1, 3, 1, 5))
    assert found[0, :, 0].tolist() == [0, 0, 1, 255, 0]


def test_the_command_says_what_is_on_and_how_far_apart_images_are(tmp_path, capsys, monkeypatch):
    from benchmarks.latency.models import open_pipeline
    from serve.commands.diff import DiffConfig, run

    asked = []

    def load(*args, **settings):
        asked.append((args, settings))
        return open_pipeline("tiny")

    monkeypatch.setattr("evaluate.pipeline.load_pipeline", load)
    fast = FastPath(dtype="bfloat16", cuda_graphs="on")
    run(
        DiffConfig(
            source="somewhere", prompts="a leaf; a boat", steps=2, out=str(tmp_path), fast=fast
        )
    )
    printed = capsys.readouterr()
    assert "dtype bfloat16" in printed.err
    assert "cuda_graphs off: no CUDA device" in printed.err
    lines = printed.out.splitlines()
    assert [line.rpartition(": ")[2] for line in lines[:2]] == ["a leaf", "a boat"]
    rows = json.loads((tmp_path / DIFFERENCES).read_text())["differences"]
    assert len(rows) == 2
    assert all(0 < row["max_levels"] < 64 for row in rows)
    assert asked[0][0][0] == "somewhere"
