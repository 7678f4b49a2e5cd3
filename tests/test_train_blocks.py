"""diffusers' U-Net with our blocks: the same function, the same weights, another memory layout."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers_train import DIM, LATENT_SHAPE, NUM_TOKENS, write_unet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.blocks import (
    FusedGroupNorm,
    PlainResnetBlock,
    keep_channels_last,
    use_fused_geglu,
    use_fused_norms,
)
from train.norms import LowPrecisionLayerNorm, use_low_precision_norms
from train.unet import build_unet, load_unet_config

Change = Callable[[Any], int]
CHANGES: tuple[Change, ...] = (keep_channels_last, use_fused_norms, use_fused_geglu)
# As SD1.5: projections are convolutions, two blocks in a row; and as SD2: they are linear.
LIKE = {
    "sd15": {"layers_per_block": 2},
    "sd2": {"use_linear_projection": True, "attention_head_dim": [2, 4]},
}


@pytest.fixture(params=LIKE)
def unet(request, tmp_path) -> Any:
    return small_unet(tmp_path, **LIKE[request.param])


def small_unet(folder: Any, **changes: Any) -> Any:
    unet = build_unet(load_unet_config(write_unet(folder / "unet.json", **changes)), 8, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in unet.named_parameters():  # norms start as ones and zeros
            if "norm" in name:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return unet


def predict(unet: Any, size: tuple[int, int] = (8, 8), batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(batch, LATENT_SHAPE[0], *size, generator=generator)
    states = torch.randn(batch, NUM_TOKENS, DIM, generator=generator)
    timesteps = torch.randint(0, 1000, (batch,), generator=generator)
    return unet(sample, timesteps, states).sample


def learn(unet: Any, **kind: Any) -> dict[str, Tensor]:
    """The prediction, and the gradient of every weight."""
    unet.zero_grad()
    prediction = predict(unet, **kind)
    prediction.square().mean().backward()
    gradients = {name: weight.grad.clone() for name, weight in unet.named_parameters()}
    return {"prediction": prediction.detach(), **gradients}


def assert_same_function(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        error = (found[name] - wanted).norm()
        assert error <= 1e-5 * wanted.norm() + 1e-7, (name, float(error), float(wanted.norm()))


# The same function --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [*((change,) for change in CHANGES), CHANGES, CHANGES[::-1]],
    ids=lambda changes: "+".join(change.__name__ for change in changes),
)
def test_the_prediction_and_every_gradient_are_those_of_diffusers(unet, changes):
    expected = learn(unet)
    assert all(change(unet) > 0 for change in changes)
    assert_same_function(learn(unet), expected)


def test_the_shipped_tiny_unet_is_the_same_function():
    unet = build_unet(load_unet_config("tiny"), 8, 0)
    states = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def learn_tiny() -> dict[str, Tensor]:
        unet.zero_grad()
        prediction = unet(sample, torch.tensor([3, 900]), states).sample
        prediction.square().mean().backward()
        gradients = {name: weight.grad.clone() for name, weight in unet.named_parameters()}
        return {"prediction": prediction.detach(), **gradients}

    expected = learn_tiny()
    assert [change(unet) for change in CHANGES] == [13, 21, 4]
    assert_same_function(learn_tiny(), expected)


@pytest.mark.parametrize("size", [(9, 7), (10, 6), (8, 11)])
def test_sizes_that_do_not_halve_are_upsampled_as_diffusers_does(unet, size):
    expected = learn(unet, size=size)
    keep_channels_last(unet)
    assert_same_function(learn(unet, size=size), expected)


def test_channels_first_weights_work_as_well(unet):
    unet.to(memory_format=torch.contiguous_format)
    expected = learn(unet)
    use_fused_norms(unet)
    assert_same_function(learn(unet), expected)
    keep_channels_last(unet)
    assert_same_function(learn(unet), expected)


def test_without_gradients_it_predicts_the_same(unet):
    unet.eval()
    with torch.no_grad():
        expected = predict(unet)
        for change in CHANGES:
            change(unet)
        torch.testing.assert_close(predict(unet), expected, rtol=1e-5, atol=1e-6)


def test_in_bfloat16_it_is_no_further_from_float32_than_diffusers(unet):
    exact = predict(unet).detach()
    low = copy.deepcopy(unet).bfloat16()
    plain = predict_low(low)
    for change in CHANGES:
        change(low)
    fused = predict_low(low)
    assert fused.dtype == torch.bfloat16
    error, usual = ((one.float() - exact).norm() for one in (fused, plain))
    assert error <= 1.2 * usual
    assert error < 0.05 * exact.norm()


def predict_low(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, *LATENT_SHAPE, generator=generator).bfloat16()
    states = torch.randn(2, NUM_TOKENS, DIM, generator=generator).bfloat16()
    timesteps = torch.randint(0, 1000, (2,), generator=generator)
    with torch.no_grad():
        return unet(sample, timesteps, states).sample


def test_under_autocast_fused_norms_keep_the_low_dtype_and_weights_stay_float32(unet):
    use_fused_norms(unet)
    dtypes = set()
    for norm in fused_norms(unet):
        norm.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        prediction = predict(unet)
    prediction.float().square().mean().backward()
    assert dtypes == {torch.bfloat16}
    assert {norm.weight.grad.dtype for norm in fused_norms(unet)} == {torch.float32}


def fused_norms(unet: nn.Module) -> list[FusedGroupNorm]:
    return [module for module in unet.modules() if isinstance(module, FusedGroupNorm)]


def test_a_time_embedding_that_is_projected_elsewhere_is_taken_as_it_is(unet):
    class Slice(nn.Module):
        """The columns of one block in the product of all blocks' projections."""

        def __init__(self, start: int, stop: int) -> None:
            super().__init__()
            self.columns = slice(start, stop)

        def forward(self, product: Tensor) -> Tensor:
            return product[:, self.columns]

    blocks = [module for module in unet.modules() if hasattr(module, "time_emb_proj")]
    expected = predict(unet)
    weight = torch.cat([block.time_emb_proj.weight for block in blocks])
    bias = torch.cat([block.time_emb_proj.bias for block in blocks])
    stops = list(itertools.accumulate(block.time_emb_proj.out_features for block in blocks))
    for block, start, stop in zip(blocks, [0, *stops], stops, strict=False):
        block.time_emb_proj, block.skip_time_act = Slice(start, stop), True
    unet.time_embedding.register_forward_hook(
        lambda module, inputs, output: nn.functional.linear(
            nn.functional.silu(output), weight, bias
        )
    )
    for change in CHANGES:
        change(unet)
    torch.testing.assert_close(predict(unet), expected, rtol=1e-4, atol=1e-5)


# The same weights ---------------------------------------------------------------------------------


def test_weights_names_and_hooks_stay_the_very_same(unet):
    before = {name: id(weight) for name, weight in unet.named_parameters()}
    states = {name: weight.clone() for name, weight in unet.state_dict().items()}
    names = [name for name, _ in unet.named_modules()]
    called: list[str] = []
    for name, module in unet.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    predict(unet)
    expected = Counter(called)
    called.clear()
    for change in CHANGES:
        change(unet)
    assert {name: id(weight) for name, weight in unet.named_parameters()} == before
    assert list(unet.state_dict()) == list(states)
    assert all(torch.equal(weight, states[name]) for name, weight in unet.state_dict().items())
    assert [name for name, _ in unet.named_modules()] == names
    predict(unet)
    # A fused norm has the activation within itself; the time embedding's remains.
    missed = expected - Counter(called)
    assert not Counter(called) - expected
    assert {name.rpartition(".")[2] for name in missed} == {"nonlinearity"}


@pytest.mark.parametrize("first", [True, False])
def test_low_precision_norms_keep_the_layer_norms_in_either_order(unet, first):
    if first:
        use_low_precision_norms(unet, torch.bfloat16)
    assert use_fused_norms(unet) == len(fused_norms(unet)) > 15
    if not first:
        use_low_precision_norms(unet, torch.bfloat16)
    kinds = {type(module) for module in unet.modules() if "Norm" in type(module).__name__}
    assert kinds == {FusedGroupNorm, LowPrecisionLayerNorm}


def test_changing_twice_changes_nothing_more(unet):
    first = [change(unet) for change in CHANGES]
    expected = learn(unet)
    assert keep_channels_last(unet) == first[0]
    assert [use_fused_norms(unet), use_fused_geglu(unet)] == [0, 0]
    assert_same_function(learn(unet), expected)


OTHERS = {
    "a scale with the shift": {"resnet_time_scale_shift": "scale_shift"},
    "another activation": {"act_fn": "gelu"},
    "sizes changed within blocks": {
        "down_block_types": ["ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
    },
    "activated embedding": {"resnet_skip_time_act": True, "time_embedding_act_fn": "silu"},
    "scaled output": {"mid_block_scale_factor": 1.7},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_unet_are_the_same_function(tmp_path, kind):
    unet = small_unet(tmp_path, **OTHERS[kind])
    expected = learn(unet)
    for change in CHANGES:
        change(unet)
    assert_same_function(learn(unet), expected)


@pytest.mark.parametrize("kind", ["a scale with the shift", "another activation"])
def test_blocks_of_another_kind_are_left_alone(tmp_path, kind):
    unet = small_unet(tmp_path, **OTHERS[kind])
    for change in CHANGES:
        change(unet)
    assert not any(isinstance(module, PlainResnetBlock) for module in unet.modules())


# The memory layout --------------------------------------------------------------------------------


class LayoutWatch(TorchDispatchMode):
    """Counts the operators whose result is an activation in NCHW.

    Args:
        sizes: [H, W] of activations; they tell them from weights and from attention's tensors.
    """

    def __init__(self, sizes: set[tuple[int, int]]) -> None:
        super().__init__()
        self.sizes, self.num_activations = sizes, 0
        self.channels_first: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.dim() == 4 and self._is_activation(tensor):
                self.num_activations += 1
                if tensor.stride(1) != 1:  # a slice of channels is channels-last as well
                    self.channels_first[func.name()] += 1
        return result

    def _is_activation(self, tensor: Tensor) -> bool:
        return tuple(tensor.shape[2:]) in self.sizes and tensor.shape[1] > LATENT_SHAPE[0]


def watch(unet: Any, **kind: Any) -> LayoutWatch:
    with LayoutWatch({(12, 12), (6, 6)}) as layout:
        predict(unet, size=(12, 12), **kind).square().mean().backward()
    return layout


def test_diffusers_own_blocks_copy_activations_to_nchw(unet):
    """What is taken out; were there nothing, the tests below could not fail."""
    layout = watch(unet)
    assert layout.num_activations > 200
    assert layout.channels_first["aten::clone"] >= 9


# On a CPU torch's group norm keeps the layout. On a GPU it computes in NCHW: that is what remains
# of copies where norms are not fused.
@pytest.mark.parametrize("changes", [CHANGES[:1], CHANGES], ids=["plain norms", "fused norms"])
def test_no_activation_is_in_nchw_forward_or_backward(unet, changes):
    for change in changes:
        change(unet)
    layout = watch(unet)
    assert layout.num_activations > 100
    assert not layout.channels_first


@pytest.mark.parametrize("batch", [64, 65])
def test_nor_in_large_batches(tmp_path, batch):
    unet = small_unet(tmp_path, block_out_channels=[8, 16], norm_num_groups=4)
    for change in CHANGES:
        change(unet)
    assert not watch(unet, batch=batch).channels_first


def test_gradients_have_the_strides_of_their_weights(unet):
    for change in CHANGES:
        change(unet)
    predict(unet).square().mean().backward()
    assert all(weight.grad.stride() == weight.stride() for weight in unet.parameters())


# Stable Diffusion's U-Nets, and the compiler ------------------------------------------------------


@pytest.mark.parametrize("name", ["sd2-base", "sd15"])
def test_stable_diffusions_unets_are_changed_throughout(name):
    from diffusers import UNet2DConditionModel

    config = load_unet_config(name)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config).to(memory_format=torch.channels_last)
        # 22 residual blocks, 3 upsamplings, 16 transformers; two norms a block, one a transformer.
        assert [change(unet) for change in CHANGES] == [41, 61, 16]
        states = torch.randn(2, 77, config["cross_attention_dim"])
        prediction = unet(torch.randn(2, 4, 64, 64), torch.zeros(2), states).sample
    assert prediction.shape == (2, 4, 64, 64)
    prediction.sum().backward()
    assert all(weight.grad.shape == weight.shape for weight in unet.parameters())


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiler")
def test_the_whole_unet_is_one_graph_with_the_same_numbers(tmp_path):
    unet = small_unet(tmp_path)
    for change in CHANGES:
        change(unet)
    expected = learn(unet)
    unet.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    assert_same_function(learn(unet), expected)
