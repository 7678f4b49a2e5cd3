import pytest
import torch
from helpers_train import MemoryBatches, small_config
from torch import nn

from train.ema import WeightAverage
from train.trainer import Trainer, build_accelerator


class Walk(nn.Module):
    """Two weights that a test moves by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.second = nn.Parameter(torch.tensor([[3.0]]))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
def test_the_average_equals_the_closed_form(decay):
    module = Walk()
    average = WeightAverage({name: p.detach() for name, p in module.named_parameters()}, decay)
    start = module.first.detach().double().clone()
    path = [torch.tensor([1.0 + t, t**1.5]) for t in range(1, 31)]
    for weight in path:
        module.first.data.copy_(weight)
        average.update()
    expected = decay**30 * start
    for turn, weight in enumerate(path, start=1):
        expected += (1 - decay) * decay ** (30 - turn) * weight.double()
    torch.testing.assert_close(average.weights["first"].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(average.weights["second"], module.second)


def test_the_average_is_a_copy_of_its_own():
    module = Walk()
    average = WeightAverage({name: p.detach() for name, p in module.named_parameters()}, 0.5)
    module.first.data.zero_()
    assert torch.equal(average.weights["first"], torch.tensor([1.0, -2.0]))
    module.first.sum().backward()
    average.update()
    assert torch.equal(average.weights["first"], torch.tensor([0.5, -1.0]))
    assert torch.equal(module.first.detach(), torch.zeros(2)), "updates leave the weights alone"
    assert torch.equal(module.first.grad, torch.ones(2))
    assert not average.weights["first"].requires_grad


def trainer_of(folder, **settings) -> Trainer:
    config = small_config(folder, **settings)
    return Trainer(config, MemoryBatches(), build_accelerator(config))


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.unet.named_parameters()}


def test_the_average_starts_at_its_step_as_a_copy_and_follows_from_there(tmp_path):
    trainer = trainer_of(tmp_path, ema_decay=0.75, ema_start_step=3)
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, 6):
        trainer.run(step)
        now = weights_of(trainer)
        if step < 3:
            assert trainer.model.average is None
            continue
        if step == 3:
            expected = now
        else:
            expected = {name: 0.75 * expected[name] + 0.25 * now[name] for name in now}
        assert trainer.model.average is not None
        for name, weight in trainer.model.average.weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-7)


def test_a_run_without_decay_never_keeps_an_average(tmp_path):
    trainer = trainer_of(tmp_path, ema_decay=0.0)
    trainer.run(2)
    assert trainer.model.average is None
