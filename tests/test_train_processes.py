"""Runs of two processes; `torchrun tests/test_train_processes.py` is what each of them executes."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_train import (
    interrupted_at,
    newest_checkpoint,
    reader_of,
    run_torchrun,
    small_config,
    tensors_of,
    write_unet,
)
from safetensors.torch import load_file

from shards.batch import LatentBatch
from shards.dataset import Dataset
from shards.errors import UserError
from shards.reader import LatentReader
from train.config import TrainConfig
from train.draws import Draws, draw
from train.metrics import read_metrics
from train.trainer import Trainer, build_accelerator, train

LENGTHS = [30, 11, 26]
SETTINGS: dict[str, Any] = {
    "max_steps": 8,
    "learning_rate": 1e-4,
    "caption_drop_prob": 0.5,
    "ema_decay": 0.5,
    "ema_start_step": 5,
    "log_every": 2,
    "checkpoint_every": 3,
    "keep_checkpoints": 9,
    "micro_batch_size": 2,
}


ZERO2 = {"sharding": "zero2"}
PIECES = {**ZERO2, "checkpoint_format": "sharded"}
TWO_PROCESS_RUNS: dict[str, dict[str, Any]] = {
    "fresh": {},
    "continued": {},
    "stopped": {"ema_start_step": 0},
    "zero2": ZERO2,
    "pieces": PIECES,
    "low": {"mixed_precision": "bf16-weights"},
    "low-zero2": {"mixed_precision": "bf16-weights", **ZERO2},
    "batched": {"batched_projections": "on"},
    "low-batched": {"batched_projections": "on", "mixed_precision": "bf16-weights"},
}


def config_in(folder: Path, data: str, **changes: Any) -> TrainConfig:
    unet = str(folder.parent / "unet.json")  # written once, before two processes want it
    return small_config(folder, **(SETTINGS | {"data": data, "unet": unet} | changes))


# In each of the two processes ---------------------------------------------------------------------


def record(reader: LatentReader, rank: int, before_batch: Callable[[int], None]) -> dict[str, Any]:
    """Fills, as the reader is used, with the samples of each step and when it was asked for."""
    seen: dict[str, Any] = {"samples": {}, "seconds": []}
    iter_batches = reader.iter_batches

    def recorded(first_step: int, positions: range) -> Iterator[LatentBatch]:
        for batch in iter_batches(first_step, positions):
            seen["seconds"].append(time.perf_counter())
            seen["samples"][batch.step] = batch.samples.tolist()
            before_batch(batch.step)
            yield batch

    reader.iter_batches = recorded
    return seen


def two_processes(folder: Path, data: str) -> None:
    """Three runs and a refusal; rank 1 dawdles before it ends each."""
    accelerator = build_accelerator(TrainConfig())
    rank = accelerator.process_index
    assert accelerator.num_processes == 2
    finish = Trainer.finish

    def finish_late(trainer: Trainer) -> None:
        time.sleep(0.5 * rank)
        finish(trainer)

    Trainer.finish = finish_late
    for name, changes in TWO_PROCESS_RUNS.items():
        config = config_in(folder / name, data, **changes)
        reader = reader_of(config)
        before_batch = interrupted_at(2 if name == "stopped" and rank == 1 else -1)
        seen = record(reader, rank, before_batch)
        trainer = train(config, reader, accelerator)
        accelerator.wait_for_everyone()
        seen["step"] = trainer.step
        seen["masters"] = sum(w.numel() for w in trainer.model.weights.tensors.values())
        seen["moments"] = sum(
            moment.numel()
            for state in trainer.model.update.optimizer.state.values()
            for moment in (state["exp_avg"], state["exp_avg_sq"])
        )
        seen["average"] = sum(w.numel() for w in trainer.model.average.weights.values())
        (folder / f"{name}-{rank}.json").write_text(json.dumps(seen))
    config = config_in(folder / "refused", data, global_batch_size=9)
    try:
        train(config, reader_of(config), accelerator)
    except UserError as error:
        (folder / f"refused-{rank}.txt").write_text(str(error))
    accelerator.end_training()


def trained_and_seen(folder: Path, data: str, until: int) -> dict[str, Any]:
    """Samples, timesteps and noise of this process's rows, by step, of a run up to `until`."""
    config = config_in(folder, data, max_steps=until)
    reader, drawn = reader_of(config), {}
    seen = record(reader, 0, lambda step: None)

    def recorded_draw(**arguments: Any) -> Draws:
        draws = draw(**arguments)
        first_numbers = draws.noise.flatten(1)[:, :3].tolist()
        drawn[arguments["step"]] = [draws.timesteps.tolist(), first_numbers]
        return draws

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.trainer.draw", recorded_draw)
        train(config, reader)
    samples = {step: rows for step, rows in seen["samples"].items() if step < until}
    return {"samples": samples, "drawn": drawn}


def handed_over(folder: Path, data: str, until: int) -> None:
    seen = trained_and_seen(folder, data, until)
    (folder / f"seen-{until}-{build_accelerator(TrainConfig()).process_index}.json").write_text(
        json.dumps(seen)
    )


# In the test --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, make_latent_dataset: Callable[..., Dataset]
) -> Path:
    """Folder with `alone` (one process), and what `two_processes` leaves.

    `continued` has 3 steps of one process, then the two processes' up to 8, then 4 of one again.
    """
    folder = tmp_path_factory.mktemp("processes")
    write_unet(folder / "unet.json")
    data = str(make_latent_dataset(folder / "latents", LENGTHS, dim=32, num_tokens=5).path)
    for name, max_steps in (("alone", 12), ("continued", 3)):
        config = config_in(folder / name, data, max_steps=max_steps)
        train(config, reader_of(config))
    shutil.copytree(folder / "continued", folder / "at-three")
    run_torchrun(Path(__file__), folder, data)
    shutil.copytree(folder / "continued", folder / "at-eight")
    config = config_in(folder / "continued", data, max_steps=12)
    train(config, reader_of(config))
    return folder


def losses_of(folder: Path) -> dict[int, float]:
    rows = read_metrics(folder / "run" / "metrics.jsonl")
    return {int(row["step"]): row["train/loss"] for row in rows}


def rank_files(runs: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((runs / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(("name", "first"), [("fresh", 0), ("continued", 3)])
def test_two_processes_see_the_same_samples_in_the_same_global_batches(runs, name, first):
    config = config_in(runs / name, str(runs / "latents"))
    reader = reader_of(config)
    ranks = [rank["samples"] for rank in rank_files(runs, name)]
    assert list(ranks[0]) == list(ranks[1]) == [str(step) for step in range(first, 8)]
    for step in range(first, 8):
        together = np.concatenate([samples[str(step)] for samples in ranks])
        shards, rows = reader.order.locate(step, range(8))
        expected = np.cumsum([0, *LENGTHS])[shards] + rows
        assert together.tolist() == expected.tolist()


def test_losses_of_two_processes_equal_those_of_one(runs):
    alone, fresh = losses_of(runs / "alone"), losses_of(runs / "fresh")
    assert list(fresh) == [2, 4, 6, 8]
    for step, loss in fresh.items():
        assert loss == pytest.approx(alone[step], rel=1e-4)


def test_batched_projections_of_two_processes_have_the_losses_of_one_without(runs):
    alone, batched = losses_of(runs / "alone"), losses_of(runs / "batched")
    assert batched == {step: pytest.approx(alone[step], rel=1e-4) for step in (2, 4, 6, 8)}


def test_one_then_two_then_one_process_continue_one_run(runs):
    alone, continued = losses_of(runs / "alone"), losses_of(runs / "continued")
    assert list(losses_of(runs / "at-three")) == [2, 3]
    assert list(continued) == [2, 3, 4, 6, 8, 10, 12]
    for step in (2, 6, 8, 10, 12):
        assert continued[step] == pytest.approx(alone[step], rel=1e-4)
    ours, theirs = (tensors_of(newest_checkpoint(runs / n / "run")) for n in ("continued", "alone"))
    assert ours.keys() == theirs.keys()
    for name in (name for name in ours if name.startswith("unet")):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-5)


def test_two_then_one_then_two_processes_see_the_samples_and_the_noise_of_one(runs):
    """Each row's samples, timesteps and noise, step by step, whoever serves them."""
    data, folder = str(runs / "latents"), runs / "handed-over"
    alone = json.loads(json.dumps(trained_and_seen(runs / "never-handed-over", data, 8)))
    run_torchrun(Path(__file__), folder, data, 3)
    one = json.loads(json.dumps(trained_and_seen(folder, data, 6)))
    run_torchrun(Path(__file__), folder, data, 8)
    halves = {
        until: [json.loads((folder / f"seen-{until}-{rank}.json").read_text()) for rank in (0, 1)]
        for until in (3, 8)
    }
    assert list(alone["samples"]) == [str(step) for step in range(8)]
    for step, samples in alone["samples"].items():
        served = [one] if 3 <= int(step) < 6 else halves[3 if int(step) < 3 else 8]
        assert [row for process in served for row in process["samples"][step]] == samples
        for kind in (0, 1):
            together = [row for process in served for row in process["drawn"][step][kind]]
            assert together == alone["drawn"][step][kind]


def test_a_row_that_two_processes_began_is_finished_by_one(runs):
    """A checkpoint between two logs carries the losses of all ranks, not of the one that writes."""
    begun = runs / "fresh" / "run" / "checkpoints" / "000003"
    shutil.copytree(begun, runs / "finished" / "run" / "checkpoints" / "000003")
    config = config_in(runs / "finished", str(runs / "latents"), max_steps=4)
    train(config, reader_of(config))
    expected = losses_of(runs / "alone")[4]
    assert losses_of(runs / "finished") == {4: pytest.approx(expected, rel=1e-4)}


def test_rates_are_not_multiplied_by_the_number_of_processes(runs):
    rows = read_metrics(runs / "fresh" / "run" / "metrics.jsonl")
    seconds = rank_files(runs, "fresh")[0]["seconds"]
    first_six_steps = sum(2 / row["perf/iters_per_sec"] for row in rows[:3])
    assert first_six_steps > seconds[5] - seconds[0]
    for row in rows:
        assert row["perf/images_per_sec"] == pytest.approx(8 * row["perf/iters_per_sec"])


def test_zero2_has_the_losses_of_one_process(runs):
    alone = losses_of(runs / "alone")
    for name in ("zero2", "pieces"):
        found = losses_of(runs / name)
        assert list(found) == [2, 4, 6, 8]
        assert found == {step: pytest.approx(alone[step], rel=1e-4) for step in found}


def test_zero2_halves_masters_optimizer_and_average(runs):
    (whole, *_), halves = rank_files(runs, "fresh"), rank_files(runs, "zero2")
    assert [rank["masters"] for rank in rank_files(runs, "fresh")] == [whole["masters"]] * 2
    for what in ("masters", "moments", "average"):
        assert sum(half[what] for half in halves) == whole[what]
        assert max(half[what] for half in halves) < 0.501 * whole[what]


def test_low_precision_weights_average_their_float32_sums(runs):
    """Accumulated gradients of two processes, against autocast's of one."""
    alone = losses_of(runs / "alone")
    for name in ("low", "low-zero2", "low-batched"):
        found = losses_of(runs / name)
        assert found == {step: pytest.approx(alone[step], rel=0.01) for step in found}


def test_what_two_processes_wrote_in_pieces_one_process_continues(runs):
    alone = losses_of(runs / "alone")
    for name in ("pieces", "zero2"):
        newest = newest_checkpoint(runs / name / "run")
        assert newest.name == "000008"
        shutil.copytree(runs / name, runs / f"{name}-then-one")
        config = config_in(runs / f"{name}-then-one", str(runs / "latents"), max_steps=12)
        train(config, reader_of(config))
        continued = losses_of(runs / f"{name}-then-one")
        assert list(continued) == [2, 4, 6, 8, 10, 12]
        for step in (10, 12):
            assert continued[step] == pytest.approx(alone[step], rel=1e-4)


def test_a_run_in_pieces_is_exported_whole(runs):
    whole, pieces = (
        load_file(runs / name / "run" / "unet" / "diffusion_pytorch_model.safetensors")
        for name in ("zero2", "pieces")
    )
    assert whole.keys() == pieces.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(weight, pieces[name], rtol=1e-5, atol=1e-7)


def test_a_signal_to_one_process_stops_all_after_the_same_step(runs):
    assert [rank["step"] for rank in rank_files(runs, "stopped")] == [4, 4]
    assert newest_checkpoint(runs / "stopped" / "run").name == "000004"


def test_a_batch_that_does_not_divide_among_processes_is_refused_with_the_nearest_that_do(runs):
    for rank in (0, 1):
        message = (runs / f"refused-{rank}.txt").read_text()
        assert "9 does not divide among 2 processes" in message
        assert "--global-batch-size 8 or 10" in message


def test_the_sources_settings_do_not_depend_on_the_number_of_processes(runs):
    config = config_in(runs / "fresh", str(runs / "latents"))
    assert reader_of(config).identity == reader_of(replace(config, micro_batch_size=1)).identity
    fresh = (newest_checkpoint(runs / "fresh" / "run") / "state.json").read_text()
    at_eight = (newest_checkpoint(runs / "at-eight" / "run") / "state.json").read_text()
    assert json.loads(fresh)["batches"] == json.loads(at_eight)["batches"]


if __name__ == "__main__":
    if sys.argv[3:]:
        handed_over(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    else:
        two_processes(Path(sys.argv[1]), sys.argv[2])
