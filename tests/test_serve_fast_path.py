"""The fast path: the images of the plain pipeline, whatever is asked for in whatever order."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers_recorder import OperatorRecorder
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.latency.models import open_pipeline
from evaluate.schedulers import SCHEDULERS, build_scheduler
from serve.fast.apply import make_fast, rebuild, warm_up
from serve.fast.attention import PreferringProcessor
from serve.fast.parts import FastDecode, Machinery
from serve.fast.plan import FastPlan, Shape
from serve.fast_path import FastPath, apply_fast_path
from shards.errors import UserError
from train.attention_processors import PinnedProcessor

CPU = torch.device("cpu")
OWN_SIZE = Shape(batch=1, height=64, width=64)
PLAIN = FastPlan(shapes=(OWN_SIZE,))
# Prompts, height, width, steps, guidance: no two alike, some of them again after others.
REQUESTS = (
    (["a red circle"], 64, 64, 4, 5.0),
    (["a red circle", "a blue square"], 32, 96, 3, 5.0),
    (["a leaf"], 64, 64, 6, 1.0),
    (["a red circle", "a leaf", "a boat"], 64, 32, 2, 2.0),
    (["a red circle"], 64, 64, 5, 5.0),
    (["a red circle", "a blue square"], 32, 96, 5, 7.5),
)


@pytest.fixture(scope="module")
def base():
    """A pipeline whose U-Net heeds its inputs more than random weights do by themselves."""
    pipeline = open_pipeline("tiny")
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(20)
    return pipeline


@pytest.fixture
def pipeline(base):
    return copy.deepcopy(base)


def generate(pipeline, prompts, height=64, width=64, steps=3, guidance=5.0, *, seed=0, **asked):
    """Images [B, 3, H, W] in [0, 1], each from the noise of its own seed."""
    output = pipeline(
        list(prompts),
        negative_prompt=[""] * len(prompts),
        generator=[torch.Generator().manual_seed(seed + n) for n in range(len(prompts))],
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="pt",
        **asked,
    )
    return output.images


def recorded(pipeline, plan=PLAIN, recorder=None):
    """Made fast, with recordings on a CPU."""
    return rebuild(pipeline, plan, CPU, recorder or OperatorRecorder())[0]


def test_any_order_of_sizes_steps_and_batches_gives_the_plain_images(base, pipeline):
    machinery = recorded(pipeline)
    expected = [generate(base, *request) for request in REQUESTS]
    assert not torch.equal(expected[0], expected[4]), "steps must matter, or this shows nothing"
    for order in (range(6), (3, 0, 5, 1, 4, 2)):
        for number in order:
            found = generate(pipeline, *REQUESTS[number])
            assert torch.equal(found, expected[number]), REQUESTS[number]
    assert machinery.graphs.num_recorded > 6


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_sampler_gives_the_plain_images(base, pipeline, scheduler):
    recorded(pipeline)
    plain = copy.copy(base)
    for each in (plain, pipeline):
        each.scheduler = build_scheduler(scheduler, base.scheduler.config)
    # Without guidance a sampler gets the very prediction, and some keep it for the next step.
    asked = {"prompts": ["a leaf"], "steps": 5, "guidance": 1.0}
    assert torch.equal(generate(pipeline, **asked), generate(plain, **asked))


def test_images_of_a_batch_are_those_of_single_calls(pipeline):
    recorded(pipeline)
    prompts = ["a red circle", "a leaf", "a boat"]
    together = generate(pipeline, prompts, steps=4)
    for number, prompt in enumerate(prompts):
        (alone,) = generate(pipeline, [prompt], steps=4, seed=number)
        torch.testing.assert_close(together[number], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("plan", "at_most"),
    [
        (replace(PLAIN, channels_last=True), 1e-4),
        (replace(PLAIN, batched_projections=True), 1e-4),
        (replace(PLAIN, attention="math"), 1e-4),
        (replace(PLAIN, channels_last=True, batched_projections=True, attention="flash"), 1e-4),
        (replace(PLAIN, dtype=torch.bfloat16), 0.02),
    ],
)
def test_a_switch_changes_rounding_and_nothing_else(base, pipeline, plan, at_most):
    recorded(pipeline, plan)
    for request in REQUESTS[:2]:
        expected = generate(base, *request)
        found = generate(pipeline, *request)
        assert found.dtype == torch.float32
        assert (found - expected).abs().mean() < at_most
        assert (generate(base, *request, seed=9) - expected).abs().mean() > 0.1


def test_our_kernels_operators_give_the_plain_images(base, pipeline):
    """Their torch fallback, which stands in for Triton where there is none."""
    recorded(pipeline, replace(PLAIN, channels_last=True, fused_norms=True, fused_geglu=True))
    names = {type(module).__name__ for module in pipeline.unet.modules()}
    assert {"FusedGroupNorm", "FusedGEGLU", "ChannelsLastTransformer"} <= names
    for request in REQUESTS[:3]:
        expected = generate(base, *request)
        torch.testing.assert_close(generate(pipeline, *request), expected, atol=1e-3, rtol=0)


def test_latents_and_their_noise_stay_in_float32_in_low_precision(pipeline):
    """Noise drawn in bfloat16 is other noise."""
    recorded(pipeline, replace(PLAIN, dtype=torch.bfloat16))
    seen = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    generate(pipeline, ["a leaf"], guidance=1.0)
    assert {each.dtype for each in seen} == {torch.float32}
    assert torch.equal(seen[0], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert pipeline.unet.dtype == torch.bfloat16


def test_timesteps_are_not_rounded_to_the_low_precision(pipeline):
    """999 is 1000 in bfloat16."""
    recorded(pipeline, replace(PLAIN, dtype=torch.bfloat16))
    seen = []
    pipeline.unet.unet.register_forward_pre_hook(lambda module, args: seen.append(args[1].item()))
    generate(pipeline, ["a leaf"], steps=1)
    assert seen == [pipeline.scheduler.timesteps.item()]
    assert torch.tensor(seen).bfloat16().item() != seen[0]


# The host and the device --------------------------------------------------------------------------


class Transfers(TorchDispatchMode):
    """What goes from the host to the meta device; an answer from there would be an error."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        first = next((arg for arg in args if isinstance(arg, torch.Tensor)), None)
        if isinstance(output, torch.Tensor) and output.is_meta and first is not None:
            is_scalar_argument = first.dim() == 0 and "copy" not in func.name()
            if first.device.type == "cpu" and not is_scalar_argument:
                self.names.append(func.name())
        return output


def denoise_on_meta(pipeline, scheduler):
    """The denoising loop on a device that answers nothing."""
    pipeline.scheduler = build_scheduler(scheduler, pipeline.scheduler.config)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.to("meta")
    states = torch.empty(1, 77, pipeline.unet.config.cross_attention_dim, device="meta")
    with Transfers() as transfers:
        pipeline(
            prompt_embeds=states,
            negative_prompt_embeds=states,
            latents=torch.empty(1, 4, 8, 8, device="meta"),
            num_inference_steps=4,
            output_type="latent",
        )
    return transfers.names


@pytest.mark.parametrize("scheduler", ["dpm++", "ddim", "pndm"])
def test_no_denoising_step_waits_for_the_device_or_copies_to_it(pipeline, scheduler):
    rebuild(pipeline, replace(PLAIN, batched_projections=True), torch.device("meta"), None)
    assert denoise_on_meta(pipeline, scheduler) == []


@pytest.mark.parametrize("scheduler", ["dpm++", "ddim"])
def test_the_plain_pipeline_does_wait(pipeline, scheduler):
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        denoise_on_meta(pipeline, scheduler)


def test_the_scheduler_is_as_it_was_after_a_call_that_was_given_up(pipeline):
    recorded(pipeline)

    def give_up(*_):
        raise KeyboardInterrupt

    before = dict(vars(pipeline.scheduler))
    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, ["a leaf"], callback_on_step_end=give_up)
    assert vars(pipeline.scheduler).keys() == before.keys()
    assert generate(pipeline, ["a leaf"]).isfinite().all()


# VAE and text -------------------------------------------------------------------------------------


def test_a_float16_vae_that_overflows_becomes_a_float32_one_for_good(base):
    latents = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    vae = copy.deepcopy(base.vae)
    with torch.no_grad():
        (expected,) = vae.decode(latents, return_dict=False)
    decode = FastDecode(vae.half(), Machinery(CPU))
    torch.testing.assert_close(decode(latents).sample, expected, atol=0.02, rtol=0)
    assert vae.dtype == torch.float16
    with torch.no_grad():  # the next norm takes it back, but float16 does not hold it
        vae.decoder.conv_in.weight.mul_(3e4)
        vae.decoder.conv_in.bias.mul_(3e4)
    assert not vae.decode(latents.half()).sample.isfinite().all()
    for _ in range(2):
        (found,) = decode(latents, return_dict=False)
        assert found.isfinite().all()
        assert vae.dtype == torch.float32


def test_a_vae_known_to_overflow_is_never_float16(pipeline):
    assert pipeline.vae.config.force_upcast
    recorded(pipeline, replace(PLAIN, dtype=torch.float16))
    assert pipeline.vae.dtype == torch.float32
    assert pipeline.unet.dtype == torch.float16


def test_latents_that_are_not_numbers_make_pixels_that_are_none(pipeline):
    """Whoever serves them must see it."""
    recorded(pipeline, replace(PLAIN, dtype=torch.bfloat16))
    latents = torch.full((1, 4, 8, 8), float("nan"))
    (pixels,) = pipeline.vae.decode(latents, return_dict=False)
    assert pixels.isnan().any()


def test_other_outputs_of_the_text_encoder_can_still_be_asked_for(base, pipeline):
    recorded(pipeline)
    ids = torch.arange(1, 78)[None]
    found, expected = (
        each.text_encoder(ids, output_hidden_states=True) for each in (pipeline, base)
    )
    assert len(found.hidden_states) == len(expected.hidden_states) > 1
    assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
    with torch.no_grad():
        assert torch.equal(pipeline.text_encoder(ids)[0], base.text_encoder(ids)[0])


# Switches -----------------------------------------------------------------------------------------


def test_without_a_gpu_the_pipeline_stays_as_it_is(base, pipeline):
    before = type(pipeline), pipeline.unet, pipeline.vae.decode
    lines = apply_fast_path(pipeline, FastPath(), "cpu")
    assert (type(pipeline), pipeline.unet, pipeline.vae.decode) == before
    assert lines == ["fast path off: no switch is on"]


def test_what_was_asked_for_and_cannot_be_is_said(pipeline):
    asked = FastPath(cuda_graphs="on", fused_norms="on", channels_last="on", conv_search="on")
    lines = apply_fast_path(pipeline, asked, CPU)
    assert "channels_last on" in lines
    for name in ("cuda_graphs", "fused_norms", "conv_search"):
        assert f"{name} off: no CUDA device" in lines
    assert lines[-1] == "ready for 1x64x64"
    assert pipeline.unet.config.sample_size == 8


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (FastPath(compiled_shapes=("512x512",)), "512x512"),
        (FastPath(compiled_shapes=("1x512x100",)), "1x512x100"),
        (FastPath(compiled_shapes=("0x64x64",)), "0x64x64"),
        (FastPath(compiled_shapes=("1x-8x64",)), "1x-8x64"),
        (FastPath(compiled_shapes=("1x²x64",)), "1x²x64"),
        (FastPath(max_graphs=2), "2"),
        (FastPath(attention="cudnn"), "cudnn does not run here"),
    ],
)
def test_what_can_never_be_is_refused_at_the_start(pipeline, asked, found):
    with pytest.raises(UserError, match=found):
        apply_fast_path(pipeline, asked, CPU)


def test_a_pipeline_of_another_kind_is_left_alone(pipeline):
    pipeline.unet.register_to_config(time_cond_proj_dim=32)
    (line,) = make_fast(pipeline, FastPath(channels_last="on"), CPU)
    assert "reads more" in line
    pipeline.unet = torch.nn.Identity()
    (line,) = make_fast(pipeline, FastPath(channels_last="on"), CPU)
    assert "not Identity" in line


@pytest.mark.filterwarnings("ignore:Flash attention kernel not used")
def test_a_pinned_kernel_gives_way_where_it_cannot_run(pipeline):
    """A request's size must not become an error of the server."""
    _, lines = rebuild(pipeline, replace(PLAIN, attention="flash"), CPU, None)
    assert lines == ["attention flash"]
    processors = pipeline.unet.unet.attn_processors.values()
    assert all(isinstance(each, PreferringProcessor) for each in processors)
    query = torch.randn(1, 2, 5, 8, requires_grad=True)
    mask = torch.zeros(1, 2, 5, 5, requires_grad=True)  # flash takes none that has a gradient

    def attend(*_):
        return torch.nn.functional.scaled_dot_product_attention(query, query, query, mask)

    with pytest.raises(RuntimeError):
        PinnedProcessor(attend, SDPBackend.FLASH_ATTENTION)(None, query)
    found = PreferringProcessor(attend, SDPBackend.FLASH_ATTENTION)(None, query)
    assert torch.equal(found, attend())


def test_a_shape_is_compiled_at_the_start_and_no_request_adds_one(base, pipeline, monkeypatch):
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward  # traced, and the operators left as they are

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    plan = replace(
        PLAIN,
        compile=True,
        channels_last=True,
        batched_projections=True,
        fused_norms=True,
        fused_geglu=True,
        attention="flash",
    )
    machinery, _ = rebuild(pipeline, plan, CPU, None)
    assert warm_up(pipeline, (OWN_SIZE,), machinery) == ["ready for 1x64x64"]
    assert len(graphs) == 2, "U-Net and VAE, without a break"
    for request in (REQUESTS[1], REQUESTS[0], REQUESTS[3]):
        expected = generate(base, *request)
        torch.testing.assert_close(generate(pipeline, *request), expected, atol=1e-3, rtol=0)
    assert len(graphs) == 2


def test_a_compiler_that_fails_is_said_and_done_without(base, pipeline, monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    def compiled(*_, **__):
        raise TorchDynamoException("no such instruction")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: compiled)
    machinery, _ = rebuild(pipeline, replace(PLAIN, compile=True), CPU, None)
    failed, ready = warm_up(pipeline, (OWN_SIZE,), machinery)
    assert failed.startswith("compile off: ")
    assert "no such instruction" in failed
    assert ready == "ready for 1x64x64"
    assert torch.equal(generate(pipeline, ["a leaf"]), generate(base, ["a leaf"]))


def test_a_shape_that_does_not_fit_is_refused_at_the_start(pipeline, monkeypatch):
    def decode(self, *_, **__):
        raise torch.OutOfMemoryError("Tried to allocate 200 GiB\nand more")

    monkeypatch.setattr(type(pipeline.vae), "decode", decode)
    asked = FastPath(channels_last="on", compiled_shapes=("9x64x64",))
    with pytest.raises(UserError, match="9x64x64: Tried to allocate 200 GiB"):
        apply_fast_path(pipeline, asked, CPU)
