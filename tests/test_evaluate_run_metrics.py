"""FID, KID and CLIP score of a run in progress: what they are of, and that they change nothing."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from helpers_clip import build_clip_folder
from helpers_train import assert_same_bits, flags, newest_checkpoint, run_torchrun, tensors_of

from evaluate.run_metrics import build_run_metrics, captions_of
from shards.dataset import Dataset
from shards.errors import UserError
from train.config import TrainConfig
from train.main import main
from train.metrics import read_metrics

FIGURES = ("fid", "kid", "clip_score")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def arguments(latent_dataset: Path, model_folder: Path, clip_folder: Path, tmp_path_factory):
    """`arguments(out, ...)`: of a run of four steps that measures at the second and the last."""
    from helpers_train import write_unet

    unet = write_unet(tmp_path_factory.mktemp("unet") / "unet.json", cross_attention_dim=128)

    def build(out: Path, *guidance: float, **changes: Any) -> list[str]:
        settings = {
            "data": latent_dataset,
            "output_dir": out,
            "unet": unet,
            "resolution": 64,
            "max_steps": 4,
            "global_batch_size": 4,
            "log_every": 1,
            "learning_rate": 1e-3,
            "validation_samples": 3,
            "num_samples": 0,
            "ema_decay": 0,
            "lr_schedule": "constant",
            "model": model_folder,
            "eval_images": 5,
            "eval_every": 2,
            "eval_steps": 2,
            "eval_features": clip_folder,
        }
        chosen = flags(**(settings | changes))
        return ["tiny", *chosen, "--eval-guidance", *map(str, guidance or (1, 3))]

    return build


@pytest.fixture(scope="module")
def measured(arguments, tmp_path_factory) -> Path:
    """A run with metrics."""
    out = tmp_path_factory.mktemp("measured") / "run"
    main(arguments(out))
    return out


def eval_rows(run: Path) -> dict[int, dict[str, float]]:
    rows = read_metrics(run / "metrics.jsonl")
    return {int(row["step"]): row for row in rows if any(n.startswith("eval/") for n in row)}


def test_figures_of_each_scale_come_at_their_steps(measured):
    rows = eval_rows(measured)
    assert list(rows) == [2, 4]
    names = {f"eval/{figure}_g{scale}" for figure in FIGURES for scale in (1, 3)}
    for row in rows.values():
        assert row.keys() == {"step", *names}
        assert all(math.isfinite(value) for value in row.values())
        assert row["eval/fid_g1"] > 0
    assert rows[2]["eval/fid_g1"] != rows[4]["eval/fid_g1"], "other weights"
    assert rows[4]["eval/fid_g1"] != rows[4]["eval/fid_g3"], "another guidance"


def test_the_run_is_the_one_without_metrics_to_the_last_bit(measured, arguments, tmp_path):
    main(arguments(tmp_path / "plain", eval_images=0))
    plain, with_metrics = (newest_checkpoint(run) for run in (tmp_path / "plain", measured))
    assert_same_bits(tensors_of(plain), tensors_of(with_metrics))
    without = [
        {name: value for name, value in row.items() if not name.startswith("perf/")}
        for row in read_metrics(measured / "metrics.jsonl")
        if not any(name.startswith("eval/") for name in row)
    ]
    assert without == [
        {name: value for name, value in row.items() if not name.startswith("perf/")}
        for row in read_metrics(tmp_path / "plain" / "metrics.jsonl")
    ]


def test_averaged_weights_are_measured_where_there_are_any(arguments, tmp_path):
    main(arguments(tmp_path / "run", 2, ema_decay=0.9, max_steps=2))
    (row,) = eval_rows(tmp_path / "run").values()
    assert row.keys() == {"step", *(f"eval/ema_{figure}_g2" for figure in FIGURES)}


def test_a_run_continues_with_other_metrics(measured, arguments, tmp_path, capsys):
    """They are no part of what a run is."""
    out = tmp_path / "run"
    main(arguments(out, max_steps=2, eval_images=0))
    main(arguments(out, 2, max_steps=4))
    assert list(eval_rows(out)) == [4]
    assert "continuing" in capsys.readouterr().out


def test_two_processes_measure_once_and_agree(arguments, tmp_path):
    out = run_torchrun(REPOSITORY / "train" / "main.py", *arguments(tmp_path / "two"))
    rows = eval_rows(tmp_path / "two")
    assert list(rows) == [2, 4]
    assert out.count("eval/fid_g1") == 2, "said by one process"


def test_generators_of_training_are_left_alone(arguments, tmp_path, monkeypatch):
    """Around each measurement by itself: torch's, numpy's and Python's."""
    import random

    from evaluate.run_metrics import RunMetrics

    def states() -> tuple[Any, ...]:
        numpy_state = np.random.get_state()[1].tolist()  # noqa: NPY002
        return torch.random.get_rng_state().tolist(), numpy_state, random.getstate()

    observe, seen = RunMetrics.observe, []

    def watched(self: RunMetrics, trainer: Any) -> dict[str, float]:
        before = states()
        figures = observe(self, trainer)
        seen.append((figures, states() == before, torch.is_grad_enabled()))
        return figures

    monkeypatch.setattr(RunMetrics, "observe", watched)
    main(arguments(tmp_path / "run", 3, max_steps=2))
    ((figures, is_alike, has_grad),) = seen
    assert figures
    assert is_alike
    assert has_grad


# What goes wrong ----------------------------------------------------------------------------------


def test_a_model_that_is_elsewhere_is_said_once_and_the_run_goes_on(arguments, tmp_path, capsys):
    main(arguments(tmp_path / "run", model=tmp_path / "gone"))
    assert eval_rows(tmp_path / "run") == {}
    assert capsys.readouterr().out.count("no metrics from now on") == 1
    assert newest_checkpoint(tmp_path / "run").name.endswith("4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_features": "gone.pt"}, "feature network gone.pt: no such file"),
        ({"validation_samples": 0}, "0 samples are held out to compare 5 with"),
        ({"eval_images": 1}, "to compare 1 with; wanted at least 2 of both"),
    ],
)
def test_what_cannot_be_measured_is_said_before_the_first_step(
    arguments, tmp_path, capsys, changes, message
):
    with pytest.raises(SystemExit):
        main(arguments(tmp_path / "run", **changes))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_online_holds_nothing_out():
    with pytest.raises(UserError, match="--online holds nothing out"):
        build_run_metrics(TrainConfig(eval_images=4), "model", None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [(3.0, -1.0), (float("nan"),), (float("inf"),), ()])
def test_guidance_that_cannot_be_meant_is_refused(wrong):
    with pytest.raises(ValueError, match="--eval-guidance"):
        TrainConfig(eval_guidance=wrong)


def test_captions_are_those_of_the_ledger(make_latent_dataset, tmp_path):
    dataset: Dataset = make_latent_dataset(tmp_path / "latents", [4, 4], captions_per_shard=3)
    keys = ["00001/000010002", "00000/000000000", "00001/000010000"]
    found = captions_of(dataset, keys)
    assert [text.split(" of ")[1] for text in found] == ["00001", "00000", "00001"]
    assert captions_of(dataset, keys[::-1]) == found[::-1]


def test_the_settings_are_in_the_record_of_the_run(measured):
    settings = json.loads((measured / "config.json").read_text())["settings"]
    assert settings["eval_images"] == 5
    assert settings["eval_guidance"] == [1, 3]
