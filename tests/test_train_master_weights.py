import math

import pytest
import torch
from torch import nn

from shards.errors import UserError
from train.ema import WeightAverage
from train.master_weights import MasterWeights
from train.precision import Precision, resolve_precision
from train.projections import Part

BF16, FLOAT = torch.bfloat16, torch.float32
CPU = torch.device("cpu")


def small_net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.Conv2d(6, 2, 1))
    return net.to(memory_format=torch.channels_last)


def backward(net: nn.Module, dtype: torch.dtype = FLOAT, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(2, 3, 8, 8, generator=generator).to(dtype)
    net(pixels).float().square().mean().backward()


def test_float32_parameters_are_their_own_masters():
    net = small_net()
    weights = MasterWeights(net)
    for name, parameter in net.named_parameters():
        assert weights.tensors[name].data_ptr() == parameter.data_ptr()
    weights.tensors["0.bias"].add_(1.0)
    assert torch.equal(weights.tensors["0.bias"], net[0].bias)


def test_masters_of_a_bfloat16_model_keep_what_rounding_would_lose():
    net = small_net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    weights = MasterWeights(net, BF16)
    assert {p.dtype for p in net.parameters()} == {BF16}
    for _ in range(100):
        weights.tensors["0.weight"].add_(1e-5)  # each one far below a step of bfloat16
    weights.publish()
    torch.testing.assert_close(weights.tensors["0.weight"], before["0.weight"] + 1e-3)
    assert torch.equal(net[0].weight, weights.tensors["0.weight"].to(BF16))
    assert not torch.equal(net[0].weight, before["0.weight"].to(BF16))
    assert torch.equal(weights.tensors["0.bias"], before["0.bias"])


def test_gradients_reach_the_masters_in_float32_and_in_their_places():
    net, low = small_net(), small_net()
    exact, rounded = MasterWeights(net), MasterWeights(low, BF16)
    backward(net)
    backward(low, BF16)
    gradients, others = (w.collect_gradients(accumulated=False) for w in (exact, rounded))
    for gradient, other, master in zip(gradients, others, exact.tensors.values(), strict=True):
        assert other.dtype == FLOAT
        assert other.stride() == master.stride(), "AdamW's kernel pairs them up in memory"
        torch.testing.assert_close(other, gradient, rtol=0.05, atol=0.02)
    expected = math.sqrt(sum(g.double().square().sum() for g in gradients))
    assert exact.norm_of(gradients).item() == pytest.approx(expected, rel=1e-5)
    assert rounded.norm_of(others).item() == pytest.approx(expected, rel=0.02)


def test_a_norm_of_bfloat16_gradients_is_summed_up_in_float32():
    low = small_net()
    weights = MasterWeights(low, BF16)
    backward(low, BF16)
    gradients = weights.collect_gradients(accumulated=False, in_float32=False)
    assert {gradient.dtype for gradient in gradients} == {BF16}
    expected = math.sqrt(sum(g.double().square().sum() for g in gradients))
    assert weights.norm_of(gradients).item() == pytest.approx(expected, rel=1e-6)


def test_many_small_gradients_add_up_in_float32():
    """In bfloat16 a sum stops growing once it is 256 times what is added."""
    low = small_net()
    weights = MasterWeights(low, BF16)
    assert weights.accumulates(2)
    assert not weights.accumulates(1)
    for step in range(2):
        for number in range(1000):
            for parameter in low.parameters():
                parameter.grad = torch.full_like(parameter, 0.5)
            weights.add_gradients(is_first=number == 0)
            assert all(p.grad is None for p in low.parameters())
        for gradient in weights.collect_gradients(accumulated=True):
            assert torch.equal(gradient, torch.full_like(gradient, 500.0)), step


def test_a_step_starts_without_the_gradients_of_the_one_before():
    for dtype in (FLOAT, BF16):
        net = small_net()
        weights = MasterWeights(net, dtype)
        backward(net, dtype)
        first = weights.norm_of(weights.collect_gradients(accumulated=False)).item()
        assert all(p.grad is None for p in net.parameters())
        backward(net, dtype)
        again = weights.norm_of(weights.collect_gradients(accumulated=False)).item()
        assert again == first > 0


def test_a_parameter_that_the_loss_does_not_reach_is_named():
    net = small_net()
    weights = MasterWeights(net)
    net[0].bias.requires_grad_(False)
    backward(net)
    with pytest.raises(UserError, match=r"0\.bias has no part in the loss"):
        weights.collect_gradients(accumulated=False)


def test_masters_of_rows_are_the_rows_of_the_module():
    """As `train.projections` has it: two of diffusers' weights in one of ours."""
    for dtype in (FLOAT, BF16):
        net = small_net()
        whole = net[2].weight.detach().clone()
        parts = {"first": Part("2.weight", 0, 1, 4), "second": Part("2.weight", 1, 2, 5)}
        weights = MasterWeights(net, dtype, parts=parts)
        assert "2.weight" not in weights.tensors
        assert torch.equal(torch.cat([weights.tensors[name] for name in parts]), whole)
        backward(net, dtype)
        expected = net[2].weight.grad.clone()
        found = dict(
            zip(weights.tensors, weights.collect_gradients(accumulated=False), strict=True)
        )
        assert torch.equal(torch.cat([found[name] for name in parts]), expected.float())
        weights.tensors["second"].fill_(7.0)
        weights.publish()
        assert torch.equal(net[2].weight[1:], torch.full_like(net[2].weight[1:], 7.0))
        assert torch.equal(net[2].weight[:1], whole[:1].to(dtype))


def test_loaded_weights_are_published():
    net = small_net()
    weights = MasterWeights(net, BF16)
    weights.load({name: torch.full_like(w, 0.1) for name, w in weights.tensors.items()})
    assert all(torch.equal(w, torch.full_like(w, 0.1)) for w in weights.tensors.values())
    assert torch.equal(net[0].weight, torch.full_like(net[0].weight, 0.1))


def test_weights_that_are_not_sharded_are_whole():
    weights = MasterWeights(small_net())
    assert weights.pieces() == {}
    assert weights.whole(weights.tensors) is weights.tensors


def test_the_average_follows_the_masters_not_the_rounded_weights():
    weights = MasterWeights(small_net(), BF16)
    average = WeightAverage(weights.tensors, decay=0.75)
    start = average.weights["0.bias"].clone()
    weights.tensors["0.bias"].add_(4e-4)
    average.update()
    torch.testing.assert_close(average.weights["0.bias"], start + 1e-4, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("choice", "dtype", "autocast"),
    [
        ("no", FLOAT, False),
        ("fp16", torch.float16, True),
        ("bf16", BF16, True),
        ("bf16-weights", BF16, False),
    ],
)
def test_a_precision_is_what_it_says(choice, dtype, autocast):
    precision = resolve_precision(choice, CPU)
    assert precision == Precision(choice, dtype, autocast)
    assert precision.scales_loss == (choice == "fp16")
    assert precision.has_low_weights == (choice == "bf16-weights")


def test_auto_precision_is_what_the_launcher_was_told(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert resolve_precision("auto", CPU).name == "no"
    for told, name in (("bf16", "bf16"), ("fp16", "fp16"), ("no", "no"), ("fp8", "no")):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
        assert resolve_precision("auto", CPU).name == name
    assert resolve_precision("no", CPU).name == "no"
