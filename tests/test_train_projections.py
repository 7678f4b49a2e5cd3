"""A U-Net with batched projections computes what diffusers' own computes, under the same names."""

from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from helpers_train import DIM, LATENT_SHAPE, NUM_TOKENS, assert_same_bits, write_unet
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from train.compilation import compile_model
from train.config import TrainConfig
from train.diffusion_loss import DiffusionLoss
from train.objective import Objective
from train.projections import Part, SplitLinear, batch_projections, original_parameters
from train.unet import build_unet, load_unet_config

TOLERANCE = 1e-5
ALL = frozenset({"self", "cross", "time"})


def build(folder: Path, name: str = "", **changes: Any) -> Any:
    """A shipped U-Net, or a small one like SD 1.5: convolutions around attention, heads by number.

    Biases and the weights that start at zero get random values, so that none is left out.
    """
    unet = build_unet(load_unet_config(name or write_unet(folder / "unet.json", **changes)), 8, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
    return unet


SD2_LIKE = {
    "attention_head_dim": [2, 4],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "layers_per_block": 2,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "use_linear_projection": True,
}


@pytest.fixture(params=["tiny", "like SD 1.5", "like SD 2"])
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "tiny":
        return build(tmp_path, "tiny")
    return build(tmp_path, **(SD2_LIKE if request.param == "like SD 2" else {}))


def batched(plain: Any) -> tuple[Any, dict[str, Part]]:
    unet = deepcopy(plain)
    return unet, batch_projections(unet)


def inputs(
    unet: Any, seed: int, rows: int = 3, tokens: int = NUM_TOKENS, side: int = 8, dim: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dim = dim or unet.config.cross_attention_dim
    return [
        torch.randn(rows, 4, side, side, generator=generator),
        torch.randint(1000, (rows,), generator=generator),
        torch.randn(rows, tokens, dim, generator=generator),
    ]


def predict(unet: Any, *args: Any, **keywords: Any) -> Tensor:
    return unet(*args, **keywords, return_dict=False)[0]


def backward(unet: Any, *args: Any, **keywords: Any) -> Tensor:
    """Adds to the gradients; returns the prediction."""
    output = predict(unet, *args, **keywords)
    generator = torch.Generator().manual_seed(9)
    (output * torch.randn(output.shape, generator=generator)).sum().backward()
    return output.detach()


def original_gradients(unet: Any, parts: dict[str, Part]) -> dict[str, Tensor]:
    """Gradients by diffusers' names."""
    whole = {name: parameter.grad for name, parameter in unet.named_parameters()}
    rows = {n: whole[part.parameter][part.start : part.stop] for n, part in parts.items()}
    return {name: rows.get(name, whole.get(name)) for name in original_parameters(unet, parts)}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """By their norms, which are from 1 to 1000; those of the biases of keys are rounding alone."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (actual[name] - tensor).norm() / max(tensor.norm(), 1)
        assert error <= TOLERANCE, (name, error)


# The same function --------------------------------------------------------------------------------


def test_outputs_and_all_gradients_are_those_of_diffusers(plain):
    unet, parts = batched(plain)
    for seed, (rows, tokens, side) in enumerate([(3, NUM_TOKENS, 8), (1, 2, 16), (5, 11, 8)]):
        batch = inputs(plain, seed, rows, tokens, side)
        output, expected = (backward(model, *batch) for model in (unet, plain))
        torch.testing.assert_close(output, expected, rtol=TOLERANCE, atol=TOLERANCE)
        with torch.no_grad():  # between the steps, as validation does
            assert torch.equal(predict(unet, *batch), output)
    assert_close(original_gradients(unet, parts), gradients_of(plain))


def gradients_of(unet: Any) -> dict[str, Tensor]:
    gradients = {name: parameter.grad for name, parameter in unet.named_parameters()}
    assert all(gradient.any() for gradient in gradients.values())
    return gradients


@pytest.mark.parametrize("autocast", [True, False])
def test_low_precision_comes_as_close_to_float32_as_diffusers_own(tmp_path, autocast):
    plain = build(tmp_path)
    batch = inputs(plain, seed=0)
    exact = predict(plain, *batch)
    errors: list[float] = []
    for unet in (plain, batched(plain)[0]):
        if not autocast:
            nn.Module.to(unet, torch.bfloat16)
            batch = [batch[0].bfloat16(), batch[1], batch[2].bfloat16()]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = backward(unet, *batch)
        assert output.dtype == torch.bfloat16
        expected = torch.float32 if autocast else torch.bfloat16
        assert {parameter.grad.dtype for parameter in unet.parameters()} == {expected}
        errors.append(((output.float() - exact).norm() / exact.norm()).item())
    assert 0 < errors[1] < 1.2 * errors[0] < 0.05


def test_text_states_may_come_by_name(plain):
    unet, _ = batched(plain)
    sample, timestep, states = inputs(plain, seed=0)
    by_name = predict(unet, sample, timestep=timestep, encoder_hidden_states=states)
    assert torch.equal(by_name, predict(unet, sample, timestep, states))


def test_a_copy_computes_with_its_own_weights(tmp_path):
    unet, _ = batched(build(tmp_path))
    batch = inputs(unet, seed=0)
    before = predict(unet, *batch)
    copy = deepcopy(unet)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
    assert torch.equal(predict(unet, *batch), before)
    assert not predict(copy, *batch).any()


def test_an_output_alone_leaves_no_gradient_in_the_rows_of_others():
    linears = [nn.Linear(3, width) for width in (2, 5, 1)]
    together = SplitLinear(linears)
    x = torch.randn(4, 7, 3)
    outputs = together(x)
    for output, linear in zip(outputs, linears, strict=True):
        torch.testing.assert_close(output, linear(x))
    outputs[1].square().sum().backward()
    rows = together.weight.grad.abs().sum(1) > 0
    assert rows.tolist() == [False] * 2 + [True] * 5 + [False]
    assert together.bias.grad[[0, 1, 7]].tolist() == [0.0] * 3


def test_masks_are_refused_not_ignored(tmp_path):
    unet, _ = batched(build(tmp_path))
    mask = torch.ones(3, NUM_TOKENS, dtype=torch.bool)
    with pytest.raises(AssertionError, match="masks nothing"):
        predict(unet, *inputs(unet, seed=0), encoder_attention_mask=mask)


# Names --------------------------------------------------------------------------------------------


def test_weights_by_diffusers_names_are_the_same_to_the_bit_and_in_order(plain):
    unet, parts = batched(plain)
    originals = original_parameters(unet, parts)
    assert list(originals) == [name for name, _ in plain.named_parameters()]
    assert_same_bits(originals, dict(plain.state_dict()))
    assert not any(tensor.requires_grad for tensor in originals.values())


def test_every_original_name_is_a_parameter_or_a_part_and_nothing_else_is(plain):
    unet, parts = batched(plain)
    originals, left = dict(plain.named_parameters()), dict(unet.named_parameters())
    new = {part.parameter for part in parts.values()}
    assert not parts.keys() & left.keys()
    assert parts.keys() | (left.keys() - new) == originals.keys()
    assert new <= left.keys()
    assert left.keys() == unet.state_dict().keys()


def test_parts_cover_every_row_of_what_they_are_parts_of_once(plain):
    unet, parts = batched(plain)
    rows: Counter[tuple[str, int]] = Counter()
    for part in parts.values():
        rows.update((part.parameter, row) for row in range(part.start, part.stop))
    shapes = {part.parameter: unet.get_parameter(part.parameter).shape for part in parts.values()}
    assert rows == Counter((name, row) for name, shape in shapes.items() for row in range(shape[0]))


def test_views_write_through_to_the_weights_that_compute(tmp_path):
    unet, parts = batched(build(tmp_path))
    other = build(tmp_path, "", sample_size=9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        for name, weight in original_parameters(unet, parts).items():
            weight.copy_(other.get_parameter(name))
    batch = inputs(unet, seed=0)
    torch.testing.assert_close(
        predict(unet, *batch), predict(other, *batch), rtol=TOLERANCE, atol=TOLERANCE
    )


def test_views_of_a_unet_that_is_not_batched_are_its_parameters(tmp_path):
    unet = build(tmp_path)
    views = original_parameters(unet, {})
    assert {name: view.data_ptr() for name, view in views.items()} == {
        name: parameter.data_ptr() for name, parameter in unet.named_parameters()
    }


def test_batching_draws_no_random_number_and_does_nothing_twice(tmp_path):
    unet = build(tmp_path)
    state = torch.get_rng_state()
    assert batch_projections(unet)
    assert torch.equal(torch.get_rng_state(), state)
    names = list(unet.state_dict())
    assert batch_projections(unet) == {}
    assert list(unet.state_dict()) == names


# What is not plain --------------------------------------------------------------------------------


def kinds(parts: dict[str, Part]) -> set[str]:
    def kind(parameter: str) -> str:
        return {"to_qkv": "self", "to_all_kv": "cross"}.get(parameter.split(".")[-2], "time")

    return {kind(part.parameter) for part in parts.values()}


UNUSUAL: dict[str, tuple[dict[str, Any], set[str], Callable[[], dict[str, Any]]]] = {
    "class embeddings": (
        {"num_class_embeds": 10},
        {"self", "cross"},
        lambda: {"class_labels": torch.tensor([1, 2, 3])},
    ),
    "concatenated class embeddings": (
        {"num_class_embeds": 10, "class_embeddings_concat": True},
        {"self", "cross"},
        lambda: {"class_labels": torch.tensor([1, 2, 3])},
    ),
    "a projection of the text states": ({"encoder_hid_dim": 16}, {"self", "time"}, dict),
    "text added to the time embedding": (
        {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
        {"self"},
        dict,
    ),
    "scale and shift": ({"resnet_time_scale_shift": "scale_shift"}, {"self", "cross"}, dict),
    "another activation": ({"act_fn": "gelu"}, {"self", "cross"}, dict),
    "time activated before": ({"time_embedding_act_fn": "silu"}, {"self", "cross"}, dict),
    "a condition inside the time embedding": (
        {"time_cond_proj_dim": 6},
        set(ALL),
        lambda: {"timestep_cond": torch.ones(3, 6)},
    ),
    "cross-attention alone": ({"only_cross_attention": True}, {"self", "time"}, dict),
    "attention without text": (
        {"down_block_types": ["AttnDownBlock2D", "CrossAttnDownBlock2D"]},
        {"self"},
        dict,
    ),
    "added keys and values": (
        {
            "down_block_types": ["DownBlock2D", "SimpleCrossAttnDownBlock2D"],
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ["SimpleCrossAttnUpBlock2D", "UpBlock2D"],
        },
        set(),
        dict,
    ),
    "no middle": ({"mid_block_type": None}, set(ALL), dict),
    "no attention": (
        {
            "down_block_types": ["DownBlock2D"] * 2,
            "mid_block_type": None,
            "up_block_types": ["UpBlock2D"] * 2,
        },
        {"time"},
        dict,
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_not_plain_is_left_as_it_is_and_computes_the_same(tmp_path, name):
    changes, expected_kinds, keywords = UNUSUAL[name]
    plain = build(tmp_path, **changes)
    unet, parts = batched(plain)
    assert kinds(parts) == expected_kinds
    batch = inputs(plain, seed=0, dim=changes.get("encoder_hid_dim", 0))
    output, expected = (backward(model, *batch, **keywords()) for model in (unet, plain))
    torch.testing.assert_close(output, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert_close(original_gradients(unet, parts), gradients_of(plain))


def test_blocks_that_take_the_time_without_activation_are_left_as_they_are(tmp_path):
    plain = build(tmp_path)
    plain.mid_block.resnets[0].skip_time_act = True
    unet, parts = batched(plain)
    assert kinds(parts) == {"self", "cross"}
    batch = inputs(plain, seed=0)
    torch.testing.assert_close(
        predict(unet, *batch), predict(plain, *batch), rtol=TOLERANCE, atol=TOLERANCE
    )


def test_two_text_encoders_cross_attentions_are_left_as_they_are(tmp_path):
    unet = build(tmp_path, dual_cross_attention=True)
    assert kinds(batch_projections(unet)) == {"self", "time"}


def layer_changes() -> Iterator[tuple[str, Callable[[Attention], None]]]:
    def set_attribute(name: str, value: Any, layer: Attention) -> None:
        setattr(layer, name, value)

    yield "a processor of one's own", lambda layer: layer.set_processor(AttnProcessor())
    yield "a norm of the keys", partial(set_attribute, "norm_k", nn.LayerNorm(8))
    yield "a group norm", partial(set_attribute, "group_norm", nn.GroupNorm(8, 64))
    yield "a residual", partial(set_attribute, "residual_connection", True)
    yield "another scale of the output", partial(set_attribute, "rescale_output_factor", 2.0)
    yield "more than a linear layer", partial(wrap, "to_v")


def wrap(name: str, layer: Attention) -> None:
    class Wrapped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    getattr(layer, name).__class__ = Wrapped


@pytest.mark.parametrize(("kind", "others"), [("attn1", ALL), ("attn2", ALL - {"cross"})])
@pytest.mark.parametrize(
    "change", [pytest.param(change, id=name) for name, change in layer_changes()]
)
def test_one_layer_that_is_not_plain_keeps_its_own_projections(tmp_path, kind, others, change):
    plain = build(tmp_path)
    layer = f"mid_block.attentions.0.transformer_blocks.0.{kind}"
    change(plain.get_submodule(layer))
    unet, parts = batched(plain)
    assert not any(name.startswith(f"{layer}.") for name in parts)
    assert kinds(parts) == others
    batch = inputs(plain, seed=0)
    torch.testing.assert_close(
        predict(unet, *batch), predict(plain, *batch), rtol=TOLERANCE, atol=TOLERANCE
    )


# What it is for -----------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Counts what computes; a view does not."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def count(unet: Any, device: str) -> Counter[str]:
    batch = [tensor.to(device) for tensor in inputs(unet, seed=0, side=unet.config.sample_size)]
    with Operators() as operators:
        predict(unet, *batch).sum().backward()
    return operators.calls


def build_on_meta(name: str) -> Any:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(load_unet_config(name))


@pytest.mark.parametrize(("name", "dim"), [("sd2-base", 1024), ("sd15", 768)])
def test_stable_diffusion_has_one_product_for_each_input(name, dim):
    unet, parts = batched(build_on_meta(name))
    shapes = {
        part.parameter: tuple(unet.get_parameter(part.parameter).shape) for part in parts.values()
    }
    self_attention = {n: shape for n, shape in shapes.items() if n.endswith("attn1.to_qkv.weight")}
    assert Counter(self_attention.values()) == {(960, 320): 5, (1920, 640): 5, (3840, 1280): 6}
    assert {n: shape for n, shape in shapes.items() if n not in self_attention} == {
        "to_all_kv.weight": (24960, dim),
        "time_embedding.to_all_blocks.weight": (20160, 1280),
        "time_embedding.to_all_blocks.bias": (20160,),
    }
    assert len(parts) == 3 * 16 + 2 * 16 + 2 * 22
    assert len(list(unet.parameters())) == 686 - len(parts) + 16 + 1 + 2


def test_stable_diffusion_dispatches_fewer_operators():
    plain = build_on_meta("sd2-base")
    unet, _ = batched(plain)
    before, after = (count(model, "meta") for model in (plain, unet))
    products = [calls["aten::mm"] + calls["aten::addmm"] for calls in (before, after)]
    forward = 2 * 16 + 31 + 21
    weights, text_has_no_gradient = forward, 31
    assert products[0] - products[1] == forward + weights + (forward - text_has_no_gradient)
    assert before.total() - after.total() >= 430  # 446 of 2530 as counted


def test_a_small_unet_dispatches_fewer_operators(tmp_path):
    plain = build(tmp_path, "tiny")
    unet, _ = batched(plain)
    before, after = (count(model, "cpu") for model in (plain, unet))
    assert before.total() - after.total() >= 110  # 120 of 567 as counted


def test_the_gradient_is_put_together_once_not_summed_up_layer_by_layer(tmp_path):
    unet, _ = batched(build(tmp_path))
    both = count(unet, "cpu")
    with Operators() as forward, torch.no_grad():
        predict(unet, *inputs(unet, seed=0))
    num_layers = 4  # each has queries, keys and values to put together, and a GEGLU
    assert both["aten::cat"] - forward.calls["aten::cat"] == 2 * num_layers + 2
    assert not any("slice_backward" in name for name in both)


# Compiled, and on several processes ---------------------------------------------------------------


def loss_module(unet: Any) -> DiffusionLoss:
    objective = Objective(
        TrainConfig(prediction_type="epsilon", min_snr_gamma=0.0), torch.device("cpu")
    )
    return DiffusionLoss(unet, objective, torch.zeros(NUM_TOKENS, DIM), 0.2)


def loss_batch(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    channels, *sides = LATENT_SHAPE
    randn = partial(torch.randn, generator=generator)
    return [
        randn(2, 2 * channels, *sides),
        randn(2, NUM_TOKENS, DIM),
        randn(2, *LATENT_SHAPE),
        randn(2, *LATENT_SHAPE),
        torch.randint(1000, (2,), generator=generator),
        torch.tensor([True, False]),
    ]


SMALLEST = {
    "block_out_channels": [32],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
}


@pytest.mark.parametrize("mode", ["full", "regional"])
def test_compiled_it_is_the_same_function_without_a_graph_break(tmp_path, mode):
    unet, _ = batched(build(tmp_path, **SMALLEST))
    eager, compiled = loss_module(unet), loss_module(deepcopy(unet))
    torch._dynamo.reset()
    compile_model(compiled, mode, "aot_eager")  # a break is an error
    for seed in range(2):
        losses = [eager(*loss_batch(seed))]
        with torch._dynamo.config.patch(error_on_recompile=mode == "full" or seed > 0):
            losses.append(compiled(*loss_batch(seed)))
        torch.testing.assert_close(losses[1], losses[0], rtol=TOLERANCE, atol=TOLERANCE)
        for loss in losses:
            loss.mean().backward()
    assert_close(gradients_of(compiled.unet), gradients_of(eager.unet))


def test_data_parallelism_finds_every_parameter_used(tmp_path):
    unet, _ = batched(build(tmp_path))
    alone = loss_module(deepcopy(unet))
    alone(*loss_batch(0)).mean().backward()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(loss_module(unet))
        for _ in range(2):  # the second finds out what the first left unused
            unet.zero_grad()
            wrapped(*loss_batch(0)).mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert_close(gradients_of(unet), gradients_of(alone.unet))
