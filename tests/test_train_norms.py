import copy
from typing import Any

import pytest
import torch
from helpers_train import DIM, LATENT_SHAPE, NUM_TOKENS, write_unet
from torch import Tensor, nn

from shards.errors import UserError
from train.norms import LowPrecisionGroupNorm, LowPrecisionLayerNorm, use_low_precision_norms
from train.unet import build_unet, load_unet_config

LOW = torch.bfloat16


@pytest.fixture
def unet(tmp_path) -> Any:
    return build_unet(load_unet_config(write_unet(tmp_path / "unet.json")), 8, 0)


def norms_of(model: nn.Module) -> dict[str, Any]:
    kinds = (nn.GroupNorm, nn.LayerNorm)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def predict(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, *LATENT_SHAPE, generator=generator)
    states = torch.randn(2, NUM_TOKENS, DIM, generator=generator)
    with torch.autocast("cpu", LOW):
        return unet(sample, torch.tensor([10, 900]), states).sample


def test_every_norm_of_the_unet_computes_in_low_precision(unet):
    assert use_low_precision_norms(unet, LOW) == len(norms_of(unet)) > 20
    dtypes: dict[str, set[torch.dtype]] = {}

    def note(name: str) -> Any:
        return lambda module, inputs, output: dtypes.setdefault(name, set()).add(output.dtype)

    for name, norm in norms_of(unet).items():
        norm.register_forward_hook(note(name))
    predict(unet)
    assert dtypes == {name: {LOW} for name in norms_of(unet)}


def norm_of(kind: str) -> nn.Module:
    norm = nn.GroupNorm(4, 16) if kind == "group" else nn.LayerNorm(16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16, generator=generator))
        norm.bias.copy_(torch.randn(16, generator=generator))
    return norm


@pytest.mark.parametrize("kind", ["group", "layer"])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("input_dtype", [torch.float32, LOW])
def test_numbers_and_gradients_stay_within_the_low_precisions_rounding(kind, autocast, input_dtype):
    exact, low = norm_of(kind), norm_of(kind)
    use_low_precision_norms(nn.Sequential(low), LOW)
    inputs = 3 * torch.randn(8, 16, 16, generator=torch.Generator().manual_seed(1)) + 1
    inputs = inputs.to(input_dtype)
    expected = exact(inputs.float())
    with torch.autocast("cpu", LOW, enabled=autocast):
        found = low(inputs)
    assert found.dtype == LOW
    assert not torch.equal(found.float(), expected)
    # bfloat16 has 8 bits; input, weight, bias and output are rounded once each.
    torch.testing.assert_close(found.float(), expected, rtol=4 * 2**-8, atol=6 * 2**-8)
    for norm, output in ((exact, expected), (low, found.float())):
        output.square().mean().backward()
        assert norm.weight.dtype == norm.weight.grad.dtype == torch.float32
    torch.testing.assert_close(low.weight.grad, exact.weight.grad, rtol=0.02, atol=0.01)
    torch.testing.assert_close(low.bias.grad, exact.bias.grad, rtol=0.02, atol=0.01)


def test_a_norm_without_weights_is_changed_as_well():
    model = nn.Sequential(
        nn.LayerNorm(8, elementwise_affine=False), nn.GroupNorm(2, 8, affine=False)
    )
    assert use_low_precision_norms(model, LOW) == 2
    assert model(torch.randn(4, 8, 8)).dtype == LOW


def test_the_whole_unet_stays_near_its_prediction_and_every_weight_has_a_gradient(unet):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for norm in norms_of(unet).values():  # ones and zeros would be cast without rounding
            norm.weight.add_(0.3 * torch.randn(norm.weight.shape, generator=generator))
    plain = copy.deepcopy(unet)
    use_low_precision_norms(unet, LOW)
    found, expected = predict(unet), predict(plain)
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert 0 < error < 0.02
    found.float().square().mean().backward()
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}
    assert all(parameter.grad.isfinite().all() for parameter in unet.parameters())
    assert all(norm.weight.grad.any() for norm in norms_of(unet).values())


def test_weights_names_hooks_and_settings_stay_the_very_same(unet):
    before = dict(unet.named_parameters())
    states = {name: weight.clone() for name, weight in unet.state_dict().items()}
    settings = {name: norm.extra_repr() for name, norm in norms_of(unet).items()}
    seen: list[nn.Module] = []
    unet.conv_norm_out.register_forward_hook(lambda module, *_: seen.append(module))
    use_low_precision_norms(unet, LOW)
    assert {name: id(p) for name, p in unet.named_parameters()} == {
        name: id(p) for name, p in before.items()
    }
    assert unet.state_dict().keys() == states.keys()
    assert all(torch.equal(weight, states[name]) for name, weight in unet.state_dict().items())
    assert {name: norm.extra_repr() for name, norm in norms_of(unet).items()} == settings
    predict(unet)
    assert seen == [unet.conv_norm_out]


def test_norms_of_another_kind_are_left_alone():
    class OwnNorm(nn.LayerNorm):
        pass

    model = nn.Sequential(OwnNorm(8), nn.BatchNorm1d(8), nn.LayerNorm(8), nn.GroupNorm(2, 8))
    assert use_low_precision_norms(model, LOW) == 2
    kinds = [OwnNorm, nn.BatchNorm1d, LowPrecisionLayerNorm, LowPrecisionGroupNorm]
    assert [type(module) for module in model] == kinds


def test_there_is_no_lower_precision_in_a_run_in_float32(unet):
    with pytest.raises(UserError, match=r"--low-precision-norm.*--mixed-precision bf16"):
        use_low_precision_norms(unet, torch.float32)
    assert {type(norm) for norm in norms_of(unet).values()} == {nn.GroupNorm, nn.LayerNorm}
