import sys
import warnings
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from functorch.compile import make_boxed_func
from helpers_train import DIM, LATENT_SHAPE, NUM_TOKENS, write_unet
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from shards.errors import UserError
from train import attention, attention_processors
from train.attention import (
    Trial,
    apply_attention,
    describe,
    find_layers,
    kernel_of,
    milliseconds_on_gpu,
    pin_fastest,
)
from train.attention_processors import BatchedProcessor
from train.projections import batch_projections
from train.unet import build_unet, load_unet_config

CPU = torch.device("cpu")
FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
SOFTMAX = "aten::_safe_softmax"  # what torch's plain attention calls


def build(folder: Path, *, batched: bool = False, **changes: Any) -> Any:
    unet = build_unet(load_unet_config(write_unet(folder / "unet.json", **changes)), 8, 0)
    if batched:
        assert batch_projections(unet)
    return unet


@pytest.fixture(params=[False, True], ids=["as built", "batched"])
def batched(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def unet(tmp_path: Path, batched: bool) -> Any:
    """Self- and cross-attention at 4x4 in a down, a middle and an up block."""
    return build(tmp_path, batched=batched)


def apply(unet: Any, choice: Any, dtype: torch.dtype = torch.float32) -> str:
    return apply_attention(
        unet, choice, device=CPU, dtype=dtype, latent_shape=LATENT_SHAPE, num_tokens=NUM_TOKENS
    )


def trials_of(unet: Any) -> list[Trial]:
    shapes = find_layers(unet, LATENT_SHAPE, NUM_TOKENS)
    return [Trial(shape, CPU, torch.float32, batch_size=1) for shape in shapes]


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def predict(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, *LATENT_SHAPE, generator=generator)
    states = torch.randn(2, NUM_TOKENS, DIM, generator=generator)
    return unet(sample, torch.tensor([10, 900]), states).sample


def operators_of(unet: Any) -> Counter[str]:
    with Operators() as operators:
        predict(unet)
    return operators.calls


def num_layers(unet: Any) -> int:
    return sum(isinstance(module, Attention) for module in unet.modules())


# What was asked for is what runs ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("choice", "said"),
    [("auto", "sdpa flash"), ("sdpa", "sdpa flash"), ("flash", "flash"), ("math", "math")],
)
def test_the_choice_is_what_the_unet_runs_and_what_the_log_says(unet, choice, said, dtype):
    assert apply(unet, choice, dtype) == said
    calls = operators_of(unet)
    expected = {FLASH: 0, SOFTMAX: num_layers(unet)} if choice == "math" else {FLASH: 4 + 4}
    assert num_layers(unet) == 8
    assert {name: calls[name] for name in (FLASH, SOFTMAX) if name in expected} == expected


def test_low_precision_weights_are_tried_as_they_are(unet):
    assert apply(unet.to(torch.bfloat16), "flash", torch.bfloat16) == "flash"


def test_all_kernels_predict_alike(unet):
    apply(unet, "math")
    exact = predict(unet)
    apply(unet, "flash")
    torch.testing.assert_close(predict(unet), exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("choice", ["cudnn", "xformers"])
def test_a_choice_that_does_not_run_here_is_refused_with_those_that_do(unet, choice):
    with pytest.raises(UserError) as refusal:
        apply(unet, choice)
    message = str(refusal.value)
    assert message.startswith(f"--attention: {choice} does not run here: 4x4 self: ")
    assert message.endswith("Remedy: --attention sdpa or flash or math")


def test_a_pin_that_has_no_effect_is_found_out(unet, monkeypatch):
    monkeypatch.setattr(
        attention_processors, "sdpa_kernel", lambda backend: warnings.catch_warnings()
    )
    with pytest.raises(UserError, match=r"4x4 self: flash ran in its place.*sdpa or flash$"):
        apply(unet, "math")


def test_torchs_own_reason_is_told_not_which_kernels_were_off(unet, monkeypatch):
    def refuse(*_: object) -> None:
        warnings.warn("Flash attention has been runtime disabled.", stacklevel=1)
        warnings.warn("cuDNN attention kernel not used because:", stacklevel=1)
        warnings.warn("head_dim should be 128 (Triggered internally at x.h:1)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(attention_processors, "sdpa_kernel", refuse)
    with pytest.raises(UserError, match=r"4x4 self: head_dim should be 128\. Remedy"):
        apply(unet, "cudnn")


def test_layers_are_grouped_by_shape_and_named_by_their_sides(tmp_path, batched):
    changes = {
        "down_block_types": ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2,
        "attention_head_dim": [4, 8],
    }
    unet = build(tmp_path, batched=batched, **changes)
    shapes = find_layers(unet, (4, 9, 12), NUM_TOKENS)
    names = ["9x12 self", "9x12 cross", "5x6 self", "5x6 cross"]
    assert [shape.name for shape in shapes] == names
    grouped = [layer for shape in shapes for layer in shape.layers]
    assert len(set(grouped)) == len(grouped) == num_layers(unet)
    tokens = [(shape.hidden_shape[0], (shape.context_shape or [0])[0]) for shape in shapes]
    assert tokens == [(108, 0), (108, NUM_TOKENS), (30, 0), (30, NUM_TOKENS)]


# xFormers, which has no CPU kernel ----------------------------------------------------------------


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The package's two modules; `ops.memory_efficient_attention` is the test's to give."""
    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    package.ops = ops
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(attention_processor, "xformers", package, raising=False)
    return ops


@torch.library.custom_op("xformers_stub::attention", mutates_args=())
def stub_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return attend(query, key, value)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[B, tokens, width] or [B, tokens, heads, width], as xFormers takes it; plain operators."""
    if query.dim() == 4:
        heads = zip(query.unbind(2), key.unbind(2), value.unbind(2), strict=True)
        return torch.stack([attend(*head) for head in heads], 2)
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value


@stub_attention.register_fake
def _(query, key, value):
    return query.new_empty(query.shape)


def _stub_backward(ctx, gradient):
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        return torch.autograd.grad(attend(*inputs), inputs, gradient)


stub_attention.register_autograd(
    _stub_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


def test_xformers_is_known_by_its_own_operators(unet, xformers):
    apply(unet, "math")
    exact = predict(unet)

    def memory_efficient_attention(query, key, value, attn_bias=None, op=None, scale=None):
        assert attn_bias is op is None
        assert scale in (None, query.shape[-1] ** -0.5)
        return stub_attention(query, key, value)

    xformers.memory_efficient_attention = memory_efficient_attention
    assert apply(unet, "xformers") == "xformers"
    assert operators_of(unet)["xformers_stub::attention"] == num_layers(unet)
    torch.testing.assert_close(predict(unet), exact, rtol=1e-3, atol=1e-5)


def test_xformers_that_runs_something_else_is_refused(unet, xformers):
    def memory_efficient_attention(query, key, value, **_):
        query, key, value = (tensor.flatten(2)[:, None] for tensor in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value)[:, 0]

    xformers.memory_efficient_attention = memory_efficient_attention
    with pytest.raises(UserError, match="4x4 self: flash ran in its place"):
        apply(unet, "xformers")


def test_xformers_that_fails_in_the_backward_pass_alone_is_refused(unet, xformers):
    class ForwardAlone(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value):
            return stub_attention(query, key, value)

        @staticmethod
        def backward(ctx, gradient):
            raise NotImplementedError("No operator found for the backward pass\nof this shape")

    xformers.memory_efficient_attention = lambda query, key, value, **_: ForwardAlone.apply(
        query, key, value
    )
    with pytest.raises(UserError, match=r"No operator found for the backward pass\. Remedy"):
        apply(unet, "xformers")


# Measuring ----------------------------------------------------------------------------------------


def timer(times: dict[tuple[str, str], float]) -> Any:
    """Times by shape and kernel; a run that has none must not be timed."""
    return lambda trial: times[trial.name, kernel_of(trial)]


def test_each_shape_keeps_the_kernel_that_is_fastest_for_it(unet):
    times = {
        ("4x4 self", "flash"): 2.0,
        ("4x4 self", "math"): 1.0,
        ("4x4 cross", "flash"): 1.0,
        ("4x4 cross", "math"): 2.0,
    }
    candidates = ("cudnn", "flash", "efficient", "xformers", "math")  # three that do not run here
    pinned = pin_fastest(trials_of(unet), candidates, timer(times))
    assert pinned == {"4x4 self": "math", "4x4 cross": "flash"}
    calls = operators_of(unet)
    assert (calls[FLASH], calls[SOFTMAX]) == (4, 4)


@pytest.mark.parametrize(("second", "kept"), [(0.97, "flash"), (0.9, "math")])
def test_a_later_candidate_must_be_clearly_faster(unet, second, kept):
    times = {(name, "flash"): 1.0 for name in ("4x4 self", "4x4 cross")}
    times |= {(name, "math"): second for name in ("4x4 self", "4x4 cross")}
    pinned = pin_fastest(trials_of(unet), ("flash", "math"), timer(times))
    assert set(pinned.values()) == {kept}


def test_where_no_candidate_runs_torch_chooses(unet, batched):
    pinned = pin_fastest(trials_of(unet), ("cudnn", "xformers"), timer({}))
    assert pinned == {"4x4 self": "flash", "4x4 cross": "flash"}
    expected = BatchedProcessor if batched else AttnProcessor2_0
    assert {type(processor) for processor in unet.attn_processors.values()} == {expected}


def test_on_a_cpu_auto_measures_nothing_and_changes_no_bit(unet, monkeypatch):
    before = predict(unet)
    monkeypatch.setattr(attention, "pin_fastest", None)
    apply(unet, "auto")
    assert torch.equal(predict(unet), before)


def test_a_gpus_time_is_the_median_of_warm_runs(monkeypatch):
    runs: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = len(runs)

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: "Event") -> float:
            assert end.at == self.at + 1
            return 1000.0 if self.at < 3 else float(self.at)

    naps: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", naps.append)
    assert milliseconds_on_gpu(lambda: runs.append(0)) == 7.0
    assert len(runs) == 12
    assert len(naps) == 9, "the host is ahead of the device in every run that is timed"


@pytest.mark.parametrize(
    ("kernels", "text"),
    [
        ({}, "none"),
        ({"8x8 self": "flash", "8x8 cross": "flash"}, "flash"),
        ({"8x8 self": "cudnn", "8x8 cross": "flash", "4x4 self": "flash"}, "flash; 8x8 self cudnn"),
        (
            {"8x8 self": "a", "8x8 cross": "a", "4x4 self": "b", "4x4 cross": "c"},
            "a; 4x4 self b, 4x4 cross c",
        ),
    ],
)
def test_the_log_names_the_common_kernel_and_then_the_exceptions(kernels, text):
    assert describe(kernels) == text


def test_a_unet_without_attention_has_none(tmp_path):
    changes = {
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
        "mid_block_type": None,
    }
    assert apply(build(tmp_path, **changes), "flash") == "none"


# What the trial leaves behind ---------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["auto", "flash", "math", "cudnn"])
def test_the_trial_leaves_no_trace(tmp_path, batched, choice):
    unet = build(tmp_path, batched=batched, dropout=0.5)
    hooks = hooks_of(unet)
    weights = {name: weight.clone() for name, weight in unet.state_dict().items()}
    generator = torch.random.get_rng_state()
    if choice == "cudnn":
        with pytest.raises(UserError):
            apply(unet, choice)
    else:
        apply(unet, choice)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert hooks_of(unet) == hooks
    assert unet.training
    assert all(torch.equal(weight, weights[name]) for name, weight in unet.state_dict().items())


def hooks_of(unet: Any) -> list[list[Any]]:
    return [list(module._forward_pre_hooks.values()) for module in unet.modules()]


def enabled() -> list[bool]:
    cuda = torch.backends.cuda
    return [cuda.flash_sdp_enabled(), cuda.math_sdp_enabled(), cuda.mem_efficient_sdp_enabled()]


@pytest.mark.parametrize("choice", ["flash", "math"])
def test_a_pin_holds_for_its_own_unet_alone(unet, choice):
    before = enabled()
    apply(unet, choice)
    predict(unet)
    assert enabled() == before
    query = torch.randn(1, 1, 4, 8)
    assert kernel_of(lambda: F.scaled_dot_product_attention(query, query, query)) == "flash"


# Batched projections ------------------------------------------------------------------------------


def test_a_batched_layer_is_tried_on_its_own_keys_and_values_out_of_the_whole_product(tmp_path):
    unet = build(tmp_path, batched=True)
    shapes = find_layers(unet, LATENT_SHAPE, NUM_TOKENS)
    cross = shapes[1]
    num_layers, width = 4, 64
    assert [shape.context_shape for shape in shapes] == [None, (NUM_TOKENS, 2 * num_layers * width)]
    assert [len(shape.layers) for shape in shapes] == [num_layers] * 2
    contexts: list[tuple[torch.Tensor, ...]] = []
    gradients: list[torch.Tensor] = []

    def note(layer: Any, inputs: Any, keywords: dict[str, Any]) -> None:
        context = keywords["encoder_hidden_states"]
        contexts.append(context)
        for piece in layer.to_kv(context):
            piece.register_hook(gradients.append)

    layer = cross.layers[-1]
    cross.layers = [layer]
    layer.register_forward_pre_hook(note, with_kwargs=True)
    Trial(cross, CPU, torch.float32, batch_size=3)()
    (context,) = contexts
    wants_gradient = [number for number, piece in enumerate(context) if piece.requires_grad]
    assert wants_gradient == list(range(2 * num_layers))[layer.to_kv.index] != [0, 1]
    assert [gradient.shape for gradient in gradients] == [(3, NUM_TOKENS, width)] * 2
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    whole = 2 * num_layers * width
    assert {piece.stride() for piece in context} == {(NUM_TOKENS * whole, whole, 1)}
    assert {piece.shape for piece in context} == {(3, NUM_TOKENS, width)}


@pytest.mark.parametrize("kernel", ["sdpa", "xformers"])
def test_the_kernel_gets_views_of_the_products_not_copies(tmp_path, xformers, monkeypatch, kernel):
    products: set[int] = set()
    num_calls = 0

    def attend_here(query, key, value, **_):
        nonlocal num_calls
        num_calls += 1
        storages = {tensor.untyped_storage().data_ptr() for tensor in (query, key, value)}
        assert len(storages) == (1 if query.shape == key.shape else 2)
        assert storages <= products
        assert {tensor.stride(-1) for tensor in (query, key, value)} == {1}
        return real(query, key, value)

    def note(module: Any, inputs: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        products.update(tensor.untyped_storage().data_ptr() for tensor in tensors)

    unet = build(tmp_path, batched=True)
    xformers.memory_efficient_attention = stub_attention
    apply(unet, kernel)
    for name, module in unet.named_modules():
        if name.endswith(("to_q", "to_qkv", "to_all_kv")):
            module.register_forward_hook(note)
    if kernel == "xformers":
        real, xformers.memory_efficient_attention = stub_attention, attend_here
    else:
        real = F.scaled_dot_product_attention
        monkeypatch.setattr(attention_processors.F, "scaled_dot_product_attention", attend_here)
    with torch.no_grad():
        predict(unet)
    assert num_calls == num_layers(unet)


def test_the_pin_of_each_shape_stays_in_a_compiled_graph(tmp_path):
    unet = build(tmp_path, batched=True)
    for trial, kernel in zip(trials_of(unet), ("math", "flash"), strict=True):
        assert trial.use(kernel) == kernel
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    hidden_states = torch.randn(2, 16, 64)
    states = unet.to_all_kv(torch.randn(2, NUM_TOKENS, DIM))
    expected = block(hidden_states, encoder_hidden_states=states)
    calls: Counter[str] = Counter()

    def note(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        calls.update(target.name() for target in targets if hasattr(target, "name"))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    block.compile(fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=note))
    actual = block(hidden_states, encoder_hidden_states=states)
    torch._dynamo.reset()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (calls[FLASH], calls[SOFTMAX]) == (1, 1)
