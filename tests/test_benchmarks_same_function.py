"""A rung must compute and learn what diffusers' U-Net does in float32: planted faults are found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.train_step import short_training
from benchmarks.train_step.case import ALL_OFF, Case, build_trainer
from benchmarks.train_step.checks import Checks, NotTheSameError, refuse_problems
from benchmarks.train_step.data import columns_for, write_latents
from benchmarks.train_step.same_function import Deviation, Reference, build_reference, compare
from benchmarks.train_step.short_training import ShortRun, judge, recompute_update
from train.diffusion_loss import DiffusionLoss
from train.ema import WeightAverage
from train.master_weights import MasterWeights
from train.presets import preset
from train.projections import Pick
from train.update import Update

PLAIN = Case(
    preset="tiny",
    loop="latentmill",
    micro_batch=4,
    attention="sdpa",
    precision="no",
    compile="off",
    ema="on",
    **ALL_OFF,
)
LOW = replace(PLAIN, precision="bf16-weights", channels_last="on", batched_projections="on")
NUM_STEPS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("same-function")
    write_latents(path / "latents", *columns_for(preset("tiny")), num_samples=64, num_shards=1)
    return path


@pytest.fixture
def make_trainer(folder: Path, tmp_path: Path) -> Iterator[Callable[[Case], Any]]:
    trainers = []

    def make(case: Case) -> Any:
        run_dir = tmp_path / f"run-{len(trainers)}"
        config = replace(
            case.train_config(folder / "latents", run_dir, 100),
            learning_rate=1e-3,
            warmup_steps=0,
            max_grad_norm=0.1,
            ema_decay=0.99,
        )
        trainers.append(trainer := build_trainer(config))
        return trainer

    yield make
    for trainer in trainers:
        trainer.close()


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    trainer = build_trainer(PLAIN.train_config(folder / "latents", folder / "run", 100))
    found = build_reference(trainer, seed=3)
    trainer.close()
    return found


# The function -------------------------------------------------------------------------------------


def test_no_weight_of_the_reference_is_zero_and_every_one_has_a_gradient(reference):
    for name, weight in reference.weights.items():
        assert weight.ne(0).all(), name
        assert torch.equal(weight, weight.bfloat16().float()), name
        assert reference.gradients[name].norm() > 0, name
    assert 0 < max(reference.bf16_frac.values()) < 0.1
    assert reference.draws.drop_caption.shape == (4,)


@pytest.mark.parametrize("case", [PLAIN, replace(PLAIN, precision="bf16"), LOW])
@pytest.mark.parametrize("poison", [False, True])
def test_what_computes_the_same_passes_by_far(make_trainer, reference, case, poison):
    found = compare(make_trainer(case), reference, poison=poison)
    assert found["problems"] == []
    bands = found["bands"]
    assert 1 - found["cosine"] < (1 - bands["cosine"]) / 5
    assert found["loss_frac"] < bands["loss_frac"] / 3
    assert found["poisoned"] == poison


def first_pick_is_the_second(pick: Pick, outputs: tuple[Tensor, ...]) -> Any:
    """Keys and values of one cross-attention are those of another."""
    if pick.index == slice(0, 2):
        return outputs[2:4]
    return outputs[pick.index]


take_gradients = MasterWeights._take_gradients


def without_a_slice(weights: MasterWeights) -> list[Tensor]:
    gradients = take_gradients(weights)
    gradients[40][:4] = 0
    return gradients


def with_one_twice_as_large(weights: MasterWeights) -> list[Tensor]:
    gradients = take_gradients(weights)
    gradients[7] = gradients[7] * 2
    return gradients


predict = DiffusionLoss._predict


def with_other_timesteps(
    module: DiffusionLoss, noisy: Tensor, timesteps: Tensor, *rest: Any
) -> Any:
    if module.dtype == torch.bfloat16:  # the reference is not
        timesteps = (timesteps + 20).clamp(max=999)
    return predict(module, noisy, timesteps, *rest)


@pytest.mark.parametrize(
    ("where", "method", "fault", "found_by"),
    [
        (Pick, "forward", first_pick_is_the_second, r"gradient of .*attn2.to"),
        (MasterWeights, "_take_gradients", without_a_slice, "gradient of "),
        (MasterWeights, "_take_gradients", with_one_twice_as_large, r"norm1.bias off by 10\d.\d%"),
        (DiffusionLoss, "_predict", with_other_timesteps, "loss|cosine"),
    ],
)
def test_a_wrong_step_is_refused_by_loss_or_gradients(
    make_trainer, reference, monkeypatch, where, method, fault, found_by
):
    trainer = make_trainer(LOW)
    monkeypatch.setattr(where, method, fault)
    found = compare(trainer, reference, poison=False)
    with pytest.raises(NotTheSameError, match=found_by):
        refuse_problems([found])


def test_memory_that_nothing_wrote_shows_once_it_is_poisoned(make_trainer, reference, monkeypatch):
    def left_as_it_was(weights: MasterWeights) -> list[Tensor]:
        gradients = take_gradients(weights)
        gradients[5] = torch.empty_like(gradients[5])
        return gradients

    trainer = make_trainer(PLAIN)
    monkeypatch.setattr(MasterWeights, "_take_gradients", left_as_it_was)
    found = compare(trainer, reference, poison=True)
    assert found["cosine"] is None
    assert found["worst_parameter_frac"] is None
    assert found["worst_parameter"] == list(reference.weights)[5]
    assert any("cosine of all gradients None" in problem for problem in found["problems"])


def test_settings_of_the_process_are_what_they_were_after_a_check(make_trainer, reference):
    def settings() -> tuple[Any, ...]:
        deterministic: Any = torch.utils.deterministic
        return (
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.allow_tf32,
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            deterministic.fill_uninitialized_memory,
        )

    before = settings()
    trainer = make_trainer(PLAIN)
    build_reference(trainer, seed=4)
    compare(trainer, reference, poison=True)
    assert settings() == before


def test_a_kernel_that_does_not_run_on_poisoned_memory_is_noted_and_no_fault(
    tmp_path, make_trainer, monkeypatch
):
    def refusing(trainer: Any, reference: Reference, *, poison: bool) -> Any:
        if poison:
            raise RuntimeError("No available kernel. Aborting execution.\nmore")
        return compare(trainer, reference, poison=poison)

    monkeypatch.setattr("benchmarks.train_step.checks.compare", refusing)
    plain, poisoned = Checks(tmp_path, NUM_STEPS).same_function(make_trainer(PLAIN))
    assert plain["cosine"] > 0.999
    assert poisoned["not_run"] == "No available kernel. Aborting execution."
    refuse_problems([plain, poisoned])


def test_a_deviation_adds_up_over_tensors_and_is_infinite_where_it_is_not_a_number():
    first = Deviation.of(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]))
    assert first.frac == pytest.approx(4 / 5)
    assert first.cosine == pytest.approx(3 / 5)
    both = first + Deviation.of(torch.tensor([1.0]), torch.tensor([1.0]))
    assert both.cosine == pytest.approx(10 / math.sqrt(10 * 26))
    assert Deviation.of(torch.tensor([math.nan]), torch.tensor([1.0])).frac == math.inf
    assert Deviation.of(torch.tensor([math.inf]), torch.tensor([1.0])).cosine is None
    assert Deviation.of(torch.tensor([1.0]), torch.tensor([0.0])).frac == math.inf


# What is learnt -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [PLAIN, LOW])
def test_an_update_is_what_was_computed_in_float64(make_trainer, case):
    trainer = make_trainer(case)
    trainer.run(3)
    found = recompute_update(trainer)
    assert trainer.step == 4
    assert max(found["weight"], found["average"]) < short_training._MOVED_BAND / 3
    assert max(found["exp_avg"], found["exp_avg_sq"]) < short_training._MOMENT_BAND / 30
    assert found["copy"] == 0


def never_clipped(update: Update, grad_norm: Tensor) -> Tensor:
    return torch.ones_like(grad_norm)


average_update = WeightAverage.update


def average_of_one_lags(average: WeightAverage) -> None:
    name = list(average.weights)[11]
    before = average.weights[name].clone()
    average_update(average)
    average.weights[name].copy_(before)


def average_moves_twice(average: WeightAverage) -> None:
    average_update(average)
    average_update(average)


publish = MasterWeights.publish


def publish_all_but_one(weights: MasterWeights) -> None:
    before = weights.published[3].clone()
    publish(weights)
    weights.published[3].copy_(before)


advance = Update.advance


def without_decay(update: Update, *batch: Any, **options: Any) -> Any:
    update.optimizer.param_groups[0]["weight_decay"] = 0.0
    return advance(update, *batch, **options)


@pytest.mark.parametrize(
    ("where", "method", "fault", "kind"),
    [
        (Update, "_divisor", never_clipped, "exp_avg"),
        (WeightAverage, "update", average_of_one_lags, "average"),
        (WeightAverage, "update", average_moves_twice, "average"),
        (MasterWeights, "publish", publish_all_but_one, "copy"),
        (Update, "advance", without_decay, "weight"),
    ],
)
def test_a_wrong_update_is_refused_by_its_own_numbers(
    make_trainer, monkeypatch, where, method, fault, kind
):
    trainer = make_trainer(LOW)
    monkeypatch.setattr(where, method, fault)
    trainer.run(3)
    worst = recompute_update(trainer)
    run = ShortRun([1.0] * NUM_STEPS, worst, is_exact=False)
    problems = judge(run, run)["problems"]
    assert any(problem.startswith(f"{kind} of an update") for problem in problems), problems


@pytest.mark.parametrize(
    ("first", "later", "is_exact", "refused"),
    [
        (0.004, 0.04, False, ""),
        (0.006, 0.0, False, "steps 0 to 20 differs by 0.60%"),
        (0.0, -0.06, False, "steps 20 to 40 differs by 6.00%"),
        (0.0002, 0.0, True, "steps 0 to 20"),
        (0.0, 0.01, True, "steps 20 to 40"),
        (math.nan, 0.0, False, "steps 0 to 20"),
    ],
)
def test_losses_that_drift_are_refused_by_the_bands_of_their_precision(
    first, later, is_exact, refused
):
    losses = [1.0 + first] * 20 + [1.0 + later] * 20
    plain = ShortRun([1.0] * 40, {"weight": 0.0}, is_exact=True)
    found = judge(ShortRun(losses, {"weight": 0.0}, is_exact=is_exact), plain)
    assert len(found["problems"]) == bool(refused)
    assert refused in "".join(found["problems"])


def with_smaller_predictions(module: DiffusionLoss, *batch: Any) -> Tensor:
    return predict(module, *batch) * (0.9 if module.dtype == torch.bfloat16 else 1.0)


@pytest.mark.parametrize("fault", [None, with_smaller_predictions])
def test_a_short_training_passes_and_one_with_a_fault_does_not(tmp_path, monkeypatch, fault):
    checks = Checks(tmp_path, NUM_STEPS)
    if fault:
        monkeypatch.setattr(DiffusionLoss, "_predict", fault)
    found = checks.short_training(replace(LOW, preset="sd2-base-512"))
    assert len(found["losses"]) == NUM_STEPS // short_training.WINDOW
    assert bool(found["problems"]) == bool(fault)
    again = checks.short_training(replace(LOW, preset="sd2-base-512", micro_batch=64))
    assert again == found
    assert len(list(tmp_path.glob("short-[0-9]"))) == 2, "another batch is no other short run"


def test_the_reference_is_made_once_for_each_batch_and_its_inputs_are_fresh(
    tmp_path, make_trainer, monkeypatch
):
    made = []

    def build(trainer: Any, seed: int) -> Reference:
        made.append((trainer.micro_batch_size, seed))
        return build_reference(trainer, seed)

    monkeypatch.setattr("benchmarks.train_step.checks.build_reference", build)
    checks = Checks(tmp_path, NUM_STEPS)
    for size in (1, 1, 2):
        found = checks.same_function(make_trainer(replace(PLAIN, micro_batch=size)))
        assert [each["poisoned"] for each in found] == [False, True]
        assert all(each["problems"] == [] for each in found)
    assert [size for size, _ in made] == [1, 2]
    assert Checks(tmp_path, NUM_STEPS)._seed != checks._seed
