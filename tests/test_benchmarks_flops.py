"""Parameters and FLOPs of the published models, held to the published and the hand-counted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.flops import table

UNET_PARAMETERS = {"sd2-base": 865_910_724, "sd15": 859_520_964}
TEXT_PARAMETERS = {"sd2-base": 340_387_840, "sd15": 123_060_480}
GFLOP = {
    ("sd2-base", 256): {"unet": 539.31, "vae": 272.7, "text": 45.13},
    ("sd2-base", 512): {"unet": 2408.74, "vae": 1116.7, "text": 45.13},
    ("sd15", 256): {"unet": 537.343, "vae": 272.7, "text": 13.299},
    ("sd15", 512): {"unet": 2406.773, "vae": 1116.7, "text": 13.299},
}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return table()


def test_flops_are_those_of_the_real_configurations(rows):
    assert [(row["unet"], row["resolution"]) for row in rows] == list(GFLOP)
    for row in rows:
        expected = GFLOP[row["unet"], row["resolution"]]
        found = {part: flops / 1e9 for part, flops in row["flops_per_image"].items()}
        assert found == pytest.approx(expected, rel=1e-3)


def test_parameters_are_exact(rows):
    for row in rows:
        found = row["num_parameters"]
        assert found["unet"] == UNET_PARAMETERS[row["unet"]]
        assert found["text"] == TEXT_PARAMETERS[row["unet"]]
        assert found["vae"] == 34_163_664  # AutoencoderKL has 83,653,863, most in its decoder


def test_the_predicted_ratio_is_all_flops_over_the_unets(rows):
    ratios = {row["resolution"]: row["predicted_ratio"] for row in rows[:2]}
    assert ratios == pytest.approx({256: 1.589, 512: 1.482}, abs=1e-3)
    for row in rows:
        unet, *frozen = row["flops_per_image"].values()
        assert row["predicted_ratio"] == pytest.approx(1 + sum(frozen) / unet)


def test_the_command_prints_a_table_and_ends_with_one_json_line(tmp_path, capsys):
    out = tmp_path / "flops.json"
    main(["flops", "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result == json.loads(out.read_text())
    assert result["theme"] == "flops"
    (sd2_256,) = (line for line in lines if line.startswith("sd2-base    256"))
    for figure in ("865,910,724", "539.31", "272.72", "45.13", "1.589x"):
        assert figure in sd2_256
