"""Graphs, breaks and recompilations are counted: they decide what compiling is worth."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from functorch.compile import make_boxed_func
from helpers_train import DIM, LATENT_SHAPE, NUM_TOKENS, write_unet
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.cpp_builder import cpp_compiler_search

from shards.errors import UserError
from train.attention import apply_attention
from train.compilation import compile_errors, compile_failure, compile_model
from train.config import TrainConfig
from train.diffusion_loss import DiffusionLoss
from train.norms import use_low_precision_norms
from train.objective import Objective
from train.precision import resolve_precision
from train.sharding import shard_unet
from train.unet import build_unet, load_unet_config

CPU = torch.device("cpu")
BATCH, MICRO_BATCH, STEPS = 4, 2, 5


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before, and the compiler's settings back afterwards."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


def build(
    unet: str,
    *,
    prediction_type: Any = "epsilon",
    precision: str = "no",
    attention: Any = "sdpa",
    low_precision_norm: bool = False,
) -> DiffusionLoss:
    """What the trainer puts together, for a U-Net configuration."""
    config = load_unet_config(unet)
    dim = config["cross_attention_dim"]
    dtype = torch.float32 if precision == "no" else torch.bfloat16
    model = build_unet(config, LATENT_SHAPE[-1], seed=0)
    apply_attention(
        model,
        attention,
        device=CPU,
        dtype=dtype,
        latent_shape=LATENT_SHAPE,
        num_tokens=NUM_TOKENS,
    )
    if low_precision_norm:
        use_low_precision_norms(model, dtype)
    if precision == "bf16-weights":
        nn.Module.to(model, dtype)
    return DiffusionLoss(
        model,
        Objective(TrainConfig(prediction_type=prediction_type, min_snr_gamma=0.0), CPU),
        torch.zeros(NUM_TOKENS, dim),
        0.2,
        dtype=dtype,
        autocast=precision == "bf16",
    )


def small(tmp_path: Path, **settings: Any) -> DiffusionLoss:
    """One block down and one up: traced in a second."""
    blocks = {
        "block_out_channels": [32],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
    }
    return build(write_unet(tmp_path / "unet.json", **blocks), **settings)


def batch_of(step: int, dim: int = DIM) -> list[Tensor]:
    """The arguments of `DiffusionLoss`."""
    generator = torch.Generator().manual_seed(step)
    randn = partial(torch.randn, generator=generator)
    channels, *sides = LATENT_SHAPE
    return [
        randn(BATCH, 2 * channels, *sides),
        randn(BATCH, NUM_TOKENS, dim).half(),
        randn(BATCH, *LATENT_SHAPE),
        randn(BATCH, *LATENT_SHAPE),
        torch.randint(1000, (BATCH,), generator=generator),
        torch.rand(BATCH, generator=generator) < 0.5,
    ]


def train_steps(model: nn.Module, steps: int = STEPS) -> list[float]:
    """Accumulate the gradients of a few steps of two micro-batches; returns the losses."""
    losses: list[float] = []
    for step in range(steps):
        for rows in micro_batches(model, step):
            per_sample = model(*rows)
            per_sample.mean().backward()
            losses += per_sample.tolist()
    return losses


def micro_batches(model: nn.Module, step: int) -> Iterator[list[Tensor]]:
    loss_module = getattr(model, "module", model)  # DDP's
    batch = batch_of(step, loss_module.null_states.shape[-1])
    for start in range(0, BATCH, MICRO_BATCH):
        yield [rows[start : start + MICRO_BATCH] for rows in batch]


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_one_graph(backend: CompileCounterWithBackend) -> None:
    assert backend.frame_count == 1
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


no_recompiles = partial(torch._dynamo.config.patch, error_on_recompile=True)


# The whole model as one graph ---------------------------------------------------------------------

SETTINGS: list[dict[str, Any]] = [
    {"prediction_type": "epsilon"},
    {"prediction_type": "sample", "precision": "bf16"},
    {"prediction_type": "v_prediction", "precision": "bf16", "low_precision_norm": True},
    {"prediction_type": "flow", "precision": "bf16", "attention": "flash"},
    {"precision": "bf16-weights", "attention": "math"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda case: "-".join(map(str, case.values())))
def test_full_is_one_graph_over_all_steps(tmp_path, settings):
    expected = train_steps(small(tmp_path, **settings))
    model, backend = small(tmp_path, **settings), CompileCounterWithBackend("eager")
    compile_model(model, "full", backend)
    with no_recompiles():
        losses = train_steps(model)
    assert_one_graph(backend)
    assert losses == pytest.approx(expected, rel=1e-4)


def test_the_shipped_tiny_unet_is_one_graph():
    model, backend = build("tiny"), CompileCounterWithBackend("eager")
    compile_model(model, "full", backend)
    with no_recompiles():
        train_steps(model)
    assert_one_graph(backend)


@pytest.mark.parametrize(("attention", "mode"), [("flash", "full"), ("math", "regional")])
def test_a_pinned_kernel_is_what_the_compiled_graphs_call(tmp_path, attention, mode):
    calls: Counter[str] = Counter()

    def note(graph: torch.fx.GraphModule, _: Any) -> Any:
        operators = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        calls.update(getattr(operator, "__name__", "") for operator in operators)
        return make_boxed_func(graph.forward)

    model = small(tmp_path, attention=attention)
    compile_model(model, mode, aot_autograd(fw_compiler=note))
    train_steps(model, steps=1)
    flash = calls["_scaled_dot_product_flash_attention_for_cpu.default"]
    flash_backward = calls["_scaled_dot_product_flash_attention_for_cpu_backward.default"]
    plain = calls["_safe_softmax.default"]
    assert (flash > 0, flash_backward > 0, plain > 0) == (
        (True, True, False) if attention == "flash" else (False, False, True)
    )


def test_a_real_compiler_gives_the_losses_and_gradients_of_eager(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    blocks = {  # the fewest that diffusers takes; each of their 19 kernels takes seconds to compile
        "block_out_channels": [32],
        "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"],
        "mid_block_type": None,
        "layers_per_block": 0,
    }
    eager, compiled = (build(write_unet(tmp_path / "unet.json", **blocks)) for _ in range(2))
    compile_model(compiled, "full")
    expected, losses = train_steps(eager, steps=2), train_steps(compiled, steps=2)
    assert counters["inductor"], "nothing was compiled"
    assert losses == pytest.approx(expected, rel=1e-4)
    gradients = gradients_of(compiled)
    for name, gradient in gradients_of(eager).items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4)


# One graph per kind of block ----------------------------------------------------------------------


def kinds_of_blocks(model: DiffusionLoss) -> tuple[int, int]:
    """How many blocks the U-Net repeats, and how many of them are distinct."""
    kinds: list[tuple[object, ...]] = []

    def note(block: nn.Module, inputs: tuple[Any, ...], *_: object) -> None:
        shapes = [tuple(parameter.shape) for parameter in block.parameters()]
        # 1 in the middle block and 1.0 elsewhere; to the compiler that is another constant.
        scale = repr(getattr(block, "output_scale_factor", None))
        kinds.append((type(block), scale, *shapes, *(tuple(tensor.shape) for tensor in inputs)))

    blocks = [
        module
        for module in model.unet.modules()
        if isinstance(module, BasicTransformerBlock | ResnetBlock2D)
    ]
    hooks = [block.register_forward_hook(note) for block in blocks]
    with torch.no_grad():
        model(*batch_of(0, model.null_states.shape[-1]))
    for hook in hooks:
        hook.remove()
    assert len(kinds) == len(blocks)
    return len(blocks), len(set(kinds))


@pytest.mark.parametrize(
    "settings", [{}, {"precision": "bf16", "low_precision_norm": True, "attention": "flash"}]
)
def test_regional_is_one_graph_per_distinct_block(settings):
    expected = train_steps(build("tiny", **settings))
    model, backend = build("tiny", **settings), CompileCounterWithBackend("eager")
    num_blocks, num_kinds = kinds_of_blocks(model)
    assert num_kinds < num_blocks
    compile_model(model, "regional", backend)
    losses = train_steps(model, steps=1)
    with no_recompiles():
        losses += train_steps(model, steps=STEPS)[len(losses) :]
    assert backend.frame_count == counters["stats"]["unique_graphs"] == num_kinds
    assert not counters["graph_break"]
    assert losses == pytest.approx(expected, rel=1e-4)


def test_more_kinds_of_blocks_than_the_compilers_default_limit_are_no_failure(tmp_path):
    model, backend = small(tmp_path), CompileCounterWithBackend("eager")
    _, num_kinds = kinds_of_blocks(model)
    assert num_kinds > 2
    with torch._dynamo.config.patch(recompile_limit=2):
        compile_model(model, "regional", backend)
        train_steps(model, steps=1)
        with torch.no_grad():
            model(*batch_of(0))  # as validation does
    assert backend.frame_count == 2 * num_kinds


def test_off_compiles_nothing(tmp_path):
    model, backend = small(tmp_path), CompileCounterWithBackend("eager")
    compile_model(model, "off", backend)
    train_steps(model, steps=1)
    assert backend.frame_count == 0


@pytest.mark.parametrize("mode", ["regional", "full"])
def test_compiling_renames_no_weight(tmp_path, mode):
    model = small(tmp_path)
    names = list(model.state_dict())
    compile_model(model, mode, "eager")
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_modules() if "_orig_mod" in name] == []


# Among several processes --------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A world of one process: wrappers and hooks are those of many."""
    store = (tmp_path / "store").as_uri()
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("mode", ["regional", "full"])
def test_a_compiled_model_trains_inside_of_ddp(tmp_path, mode):
    expected = small(tmp_path)
    train_steps(expected)
    model, backend = small(tmp_path), CompileCounterWithBackend("eager")
    compile_model(model, mode, backend)
    wrapped = nn.parallel.DistributedDataParallel(model)
    with wrapped.no_sync():
        train_steps(wrapped, steps=STEPS - 1)
    graphs = backend.frame_count
    with no_recompiles():
        for rows in micro_batches(model, STEPS - 1):
            wrapped(*rows).mean().backward()
    assert backend.frame_count == graphs
    assert not counters["graph_break"]
    gradients = gradients_of(model)
    for name, gradient in gradients_of(expected).items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("precision", ["no", "bf16-weights"])
def test_regional_graphs_outlive_the_gathering_of_sharded_weights(tmp_path, precision):
    expected = small(tmp_path, precision=precision)
    model, backend = small(tmp_path), CompileCounterWithBackend("eager")
    num_blocks, _ = kinds_of_blocks(model)
    shard_unet(model.unet, resolve_precision(precision, CPU), CPU, num_processes=1)
    model.dtype = expected.dtype
    compile_model(model, "regional", backend)
    losses = train_steps(model, steps=1)
    with no_recompiles():
        losses += train_steps(model)[len(losses) :]
    assert backend.frame_count < num_blocks
    assert not counters["graph_break"]
    # Sharded weights have plain strides, and kernels of another layout round otherwise.
    rounding = 1e-4 if precision == "no" else 2e-3
    assert losses == pytest.approx(train_steps(expected), rel=rounding)


# What goes wrong in the compiler ------------------------------------------------------------------


def test_a_machine_without_a_compiler_is_told_to_turn_it_off(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    cpp_compiler_search.cache_clear()
    model = small(tmp_path)
    compile_model(model, "full")
    message = r"^--compile: .*compiler.*no-such-compiler.*Remedy: --compile off$"
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(UserError, match=message),
        compile_errors(),
    ):
        train_steps(model)


def test_whether_a_compiler_works_is_found_by_trying(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert compile_failure(CPU) is None
    torch.compiler.reset()
    cpp_compiler_search.cache_clear()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "empty"))
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert "no-such-compiler" in compile_failure(CPU)


def test_a_break_in_the_graph_is_an_error_and_not_a_slow_run(tmp_path):
    model = small(tmp_path)
    model.unet.conv_out.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    compile_model(model, "full", "eager")
    with (
        pytest.raises(UserError, match=r"^--compile: .*graph_break.*Remedy: --compile off$"),
        compile_errors(),
    ):
        train_steps(model, steps=1)


def test_a_compiler_that_fails_in_the_backward_pass_is_reported_as_well(tmp_path, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel for this")

    model = small(tmp_path)
    compile_model(model, "full")
    monkeypatch.setattr("torch._inductor.compile_fx.fx_codegen_and_compile", fail)
    with pytest.raises(UserError, match="no kernel for this"), compile_errors():
        train_steps(model, steps=1)


def test_errors_that_are_not_the_compilers_pass_through():
    with pytest.raises(RuntimeError, match=r"^out of memory$"), compile_errors():
        raise RuntimeError("out of memory")
