"""One update: AdamW, clipping, loss scale, and nothing at all once something was not finite."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from train.config import TrainConfig
from train.master_weights import MasterWeights
from train.precision import resolve_precision
from train.update import Update

CPU = torch.device("cpu")
ONE = torch.tensor(1.0)


class Run:
    """A linear layer whose gradients are given, not computed."""

    def __init__(self, precision: str = "no", **settings: Any) -> None:
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3)
        self.config = TrainConfig(learning_rate=0.1, **settings)
        self.weights = MasterWeights(self.net)
        self.update = Update(self.config, self.weights, resolve_precision(precision, CPU), CPU)
        self.step = 0

    def apply(self, gradient: float | Tensor, loss: Tensor = ONE) -> tuple[float, bool]:
        """The norm, and whether the update was left out."""
        scale = float(self.update.scaled(ONE))
        for parameter in self.net.parameters():
            parameter.grad = torch.ones_like(parameter) * gradient * scale
        norm, left_out = self.update.apply(self.step, loss, accumulated=False)
        self.step += 1
        return norm.item(), bool(left_out)

    def numbers(self) -> list[float]:
        return [x for p in self.net.parameters() for x in p.flatten().tolist()]


def reference(gradients: list[float], max_norm: float = 0.0, **options: Any) -> list[float]:
    """The same by torch's plain AdamW and `clip_grad_norm_`."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, foreach=False, **options)
    for gradient in gradients:
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter) * gradient
        if max_norm:
            nn.utils.clip_grad_norm_(net.parameters(), max_norm)
        optimizer.step()
    return [x for p in net.parameters() for x in p.flatten().tolist()]


@pytest.mark.parametrize("precision", ["no", "fp16"])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0])
def test_an_update_is_adamw_on_clipped_gradients(precision, max_norm):
    gradients = [1.0, -0.3, 0.02, 2.0]
    run = Run(precision, max_grad_norm=max_norm, adam_eps=1e-3, weight_decay=0.1)
    for gradient in gradients:
        norm, left_out = run.apply(gradient)
        assert norm == pytest.approx(abs(gradient) * 15**0.5, rel=1e-5)
        assert not left_out
    expected = reference(gradients, max_norm, eps=1e-3, weight_decay=0.1)
    assert run.numbers() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing_then_or_later(poison):
    run = Run(ema_decay=0.5)
    run.apply(1.0)
    before = run.numbers()
    state = [t.clone() for s in run.update.optimizer.state.values() for t in s.values()]
    assert run.apply(poison)[1]
    assert run.apply(1.0)[1], "the step after it must not go on from what was left out"
    assert run.numbers() == before
    after = [t for s in run.update.optimizer.state.values() for t in s.values()]
    assert all(torch.equal(one, other) for one, other in zip(state, after, strict=True))
    assert run.update.broken_step.item() == 1


def test_one_element_that_is_not_finite_is_enough():
    run = Run()
    gradient = torch.zeros(3, 4)
    gradient[2, 1] = torch.nan
    for parameter in run.net.parameters():
        parameter.grad = torch.ones_like(parameter)
    run.net.weight.grad = gradient
    before = run.numbers()
    run.update.apply(0, ONE, accumulated=False)
    assert run.numbers() == before
    assert run.update.broken_step.item() == 0


def test_a_float16_overflow_halves_the_scale_and_costs_one_update():
    run = Run("fp16")
    first = run.update.loss_scale.item()
    before = run.numbers()
    assert run.apply(float("inf"))[1]
    assert run.numbers() == before
    assert run.update.loss_scale.item() == first / 2
    assert not run.apply(1.0)[1]
    assert run.numbers() == pytest.approx(reference([1.0], 1.0), rel=1e-5)
    assert run.update.broken_step.item() == -1


def test_the_scale_doubles_after_two_thousand_good_steps():
    run = Run("fp16")
    first = run.update.loss_scale.item()
    for _ in range(1999):
        run.apply(0.0)
    assert run.update.loss_scale.item() == first
    run.apply(0.0)
    assert run.update.loss_scale.item() == 2 * first
    run.apply(0.0)
    assert run.update.loss_scale.item() == 2 * first


def test_what_overflows_at_every_scale_is_broken():
    run = Run("fp16")
    while run.update.broken_step.item() < 0:
        run.apply(float("nan"))
        assert run.step < 40
    assert run.update.loss_scale.item() == 1.0


def test_after_a_float16_loss_that_is_not_finite_nothing_changes():
    run = Run("fp16")
    run.apply(1.0)
    before = run.numbers()
    run.apply(float("nan"), loss=torch.tensor(float("nan")))
    assert run.apply(1.0)[1], "the step after it must not go on from what was left out"
    assert run.numbers() == before


def test_a_float16_loss_that_is_not_finite_is_no_overflow():
    run = Run("fp16")
    run.apply(float("nan"), loss=torch.tensor(float("nan")))
    assert run.update.broken_step.item() == 0


def test_the_average_starts_late_as_a_copy_and_takes_no_memory_before():
    run = Run(ema_decay=0.5, ema_start_step=3)
    for _ in range(2):
        run.apply(1.0)
        assert run.update.average is None
    run.apply(1.0)
    assert run.update.average is not None
    assert torch.equal(run.update.average.weights["bias"], run.net.bias)


def test_an_average_of_every_third_step_decays_as_three_steps_do():
    run = Run(ema_decay=0.9, ema_every=3, ema_start_step=1)
    run.apply(1.0)
    average = run.net.bias.detach().clone()
    for step in range(2, 10):
        run.apply(1.0)
        if step % 3 == 0:
            average.lerp_(run.net.bias.detach(), 1 - 0.9**3)
        assert run.update.average is not None
        torch.testing.assert_close(run.update.average.weights["bias"], average)


def test_no_decay_no_average():
    run = Run(ema_decay=0.0, ema_start_step=0)
    run.apply(1.0)
    assert run.update.average is None
