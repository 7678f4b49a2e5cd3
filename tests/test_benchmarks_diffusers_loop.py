"""The plain diffusers loop: it trains as ours does, computes as the example does, and is a row."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from benchmarks.train_step import parity as train_step_parity
from benchmarks.train_step.case import Case, Timing, visit
from benchmarks.train_step.data import columns_for, write_latents
from benchmarks.train_step.diffusers_loop import DiffusersLoop, accelerate_in, build_plain_unet
from benchmarks.train_step.parity import check_parity, losses_of_both, parity_config
from benchmarks.train_step.train_step import TrainStepConfig, measure
from shards.errors import UserError
from train.config import TrainConfig
from train.presets import preset
from train.trainer import build_accelerator

CONFIG = TrainConfig(unet="tiny", ema_decay=0.999)
CASE = Case(
    preset="tiny",
    loop="diffusers",
    micro_batch=2,
    attention="sdpa",
    precision="no",
    compile="off",
    ema="on",
)
SHORT = TrainStepConfig(
    loops=("diffusers",),
    micro_batches=(2,),
    steps=1,
    warmup=1,
    blocks=1,
    rounds=1,
    num_samples=64,
    emas=("off",),
)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("diffusers-loop") / "latents"
    return write_latents(path, *columns_for(preset("tiny")), num_samples=64, num_shards=1)


def moments_and_states(batch_size: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(batch_size, 8, 8, 8, generator=generator).half()
    return moments, torch.randn(batch_size, 77, 128, generator=generator).half()


def weights_of(loop: DiffusersLoop) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in loop.unet.parameters()]


# It trains as ours does ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tiny", {}),  # v-prediction, min-SNR
        ("sd2-base-256", {}),  # epsilon
        ("sd2-base-256", {"min_snr_gamma": 5.0}),
        ("sd15-512", {"max_grad_norm": 1e-5}),  # so little that AdamW's epsilon tells
    ],
)
def test_both_loops_have_the_same_losses_from_the_same_weights_and_draws(tmp_path, name, changes):
    ours, theirs = losses_of_both(replace(parity_config(name, tmp_path), **changes))
    assert len(ours) == len(theirs) == train_step_parity.NUM_STEPS
    assert ours == pytest.approx(theirs, rel=2e-5)
    assert len(set(ours)) == len(ours)


def unweighted(self: DiffusersLoop, timesteps: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(timesteps))


def on_smaller_latents(self: DiffusersLoop, latents: torch.Tensor, *rest: Any) -> float:
    return update(self, latents / 2, *rest)


def on_a_frozen_unet(self: DiffusersLoop, *batch: torch.Tensor) -> float:
    before = weights_of(self)
    loss = update(self, *batch)
    with torch.no_grad():
        for weight, old in zip(self.unet.parameters(), before, strict=True):
            weight.copy_(old)
    return loss


update = DiffusersLoop.update


@pytest.mark.parametrize(
    ("method", "sabotage"),
    [
        ("_min_snr_weight", unweighted),
        ("update", on_smaller_latents),
        ("update", on_a_frozen_unet),
        ("_loss", lambda *_: torch.tensor(math.nan, requires_grad=True)),
    ],
)
def test_a_loop_that_trains_differently_is_refused(tmp_path, monkeypatch, method, sabotage):
    monkeypatch.setattr(DiffusersLoop, method, sabotage)
    with pytest.raises(UserError, match="tiny: the losses of the two loops: differ by up to"):
        check_parity("tiny", tmp_path)


# It computes as the example does ------------------------------------------------------------------


def test_the_layout_is_diffusers_own_unless_it_is_asked_for_channels_last():
    plain, last = build_plain_unet(CONFIG, 8), build_plain_unet(CONFIG, 8, channels_last=True)
    assert plain.conv_in.weight.is_contiguous()
    assert last.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert not last.conv_in.weight.is_contiguous()
    assert all(map(torch.equal, plain.parameters(), last.parameters()))


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_are_float32_and_products_are_of_the_precision(precision, dtype):
    seen = set()
    with accelerate_in(precision) as accelerator:
        unet = build_plain_unet(CONFIG, 8)
        unet.time_embedding.linear_2.register_forward_hook(lambda *call: seen.add(call[-1].dtype))
        loop = DiffusersLoop(unet, CONFIG, accelerator, 0.2)
        assert math.isfinite(loop.step(*moments_and_states()))
    assert seen == {dtype}
    assert {weight.dtype for weight in loop.unet.parameters()} == {torch.float32}
    assert {weight.dtype for weight in loop.average.shadow_params} == {torch.float32}


def test_the_first_step_of_a_warm_up_changes_nothing_and_the_next_ones_do():
    with accelerate_in("no") as accelerator:
        config = replace(CONFIG, warmup_steps=10)
        loop = DiffusersLoop(build_plain_unet(config, 8), config, accelerator, 0.2)
        before = weights_of(loop)
        loop.step(*moments_and_states())
        assert all(map(torch.equal, before, weights_of(loop)))
        loop.step(*moments_and_states())
        assert not any(map(torch.equal, before, weights_of(loop)))


@pytest.mark.parametrize("foreach_ema", [False, True])
def test_the_average_lags_behind_the_weights_and_is_diffusers_own(foreach_ema):
    with accelerate_in("no") as accelerator:
        unet = build_plain_unet(CONFIG, 8)
        loop = DiffusersLoop(unet, CONFIG, accelerator, 0.2, foreach_ema=foreach_ema)
        expected = EMAModel(unet.parameters(), decay=CONFIG.ema_decay)
        for _ in range(3):
            loop.step(*moments_and_states())
            expected.step(unet.parameters())
    averages = loop.average.shadow_params
    assert len(averages) == len(list(unet.parameters()))
    for average, own, weight in zip(
        averages, expected.shadow_params, unet.parameters(), strict=True
    ):
        torch.testing.assert_close(average, own)
        assert not torch.equal(average, weight)


def test_accelerate_has_no_precision_left_over_before_or_after():
    build_accelerator(CONFIG)
    with accelerate_in("bf16") as accelerator:
        assert accelerator.mixed_precision == "bf16"
    assert build_accelerator(CONFIG).mixed_precision == "no"
    with pytest.raises(RuntimeError, match="in the midst"), accelerate_in("bf16"):
        raise RuntimeError("in the midst")
    assert build_accelerator(CONFIG).mixed_precision == "no"
    assert Accelerator(mixed_precision="no").mixed_precision == "no"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there Accelerate has fp16")
def test_a_precision_that_accelerate_leaves_out_in_silence_is_a_row_with_its_reason(tmp_path):
    rows = measure(replace(SHORT, precisions=("fp16",), scratch=str(tmp_path)))["rows"]
    assert "Accelerate on cpu: leaves fp16 out without a word" in rows[0]["not_measured"]
    assert rows[0]["visits"] == []


# It is a row --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loop", "ema"), [("diffusers", "off"), ("diffusers+channels-last", "on")])
def test_a_visit_has_the_figures_that_ours_has(latents, tmp_path, loop, ema):
    case, timing = replace(CASE, loop=loop, ema=ema), Timing(warmup=1, steps=2, blocks=2)
    found = visit(case, latents, tmp_path / "theirs", timing)
    ours = visit(replace(case, loop="latentmill"), latents, tmp_path / "ours", timing)
    assert [block["step"] for block in found.blocks] == [3, 5]
    for block, other in zip(found.blocks, ours.blocks, strict=True):
        missing = {"train/grad_norm", "train/learning_rate", "epoch"}
        assert set(block) == set(other) - missing
        assert math.isfinite(block["train/loss"])
        assert block["perf/images_per_sec"] == pytest.approx(2 * block["perf/iters_per_sec"])
        achieved = block["perf/images_per_sec"] * found.flops_per_image
        assert block["perf/mfu"] == pytest.approx(achieved / found.matmul_flops_per_sec)
        assert 0 <= block["perf/data_wait_frac"] <= 1
        assert block["perf/peak_mem_gib"] > 0
    assert found.flops_per_image == ours.flops_per_image
    assert found.matmul_flops_per_sec == ours.matmul_flops_per_sec
    assert found.attention == ours.attention
    assert not (tmp_path / "theirs").exists()


def test_a_loss_that_is_not_finite_is_a_row_with_its_reason(tmp_path, monkeypatch):
    loss = DiffusersLoop._loss
    monkeypatch.setattr(DiffusersLoop, "_loss", lambda *batch: loss(*batch) * math.nan)
    rows = measure(replace(SHORT, scratch=str(tmp_path)))["rows"]
    plain, _, xformers = rows
    assert "the plain loop: the loss is not finite by step 1" in plain["not_measured"]
    assert "xformers does not run here" in xformers["not_measured"]
    assert [row["visits"] for row in rows] == [[], [], []]


def test_what_does_not_fit_is_a_row_and_its_memory_is_free_for_the_next(tmp_path, monkeypatch):
    unets: list[weakref.ref[Any]] = []

    def limited(loop: DiffusersLoop, *batch: torch.Tensor) -> float:
        gc.collect()
        assert all(unet() in (None, loop.unet) for unet in unets), "an earlier model is alive"
        unets.append(weakref.ref(loop.unet))
        if len(batch[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
        return update(loop, *batch)

    monkeypatch.setattr(DiffusersLoop, "update", limited)
    result = measure(replace(SHORT, micro_batches=(8, 4, 2), scratch=str(tmp_path)))
    found = [(row["loop"], row["micro_batch"], row["not_measured"]) for row in result["rows"]]
    assert found[:4] == [
        ("diffusers", 2, None),
        ("diffusers", 4, "out of memory"),
        ("diffusers", 8, "not tried: out of memory at 4"),
        ("diffusers+channels-last", 2, None),
    ]
    assert len(unets) > 4
    assert result["comparisons"] == []
