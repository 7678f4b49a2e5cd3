"""Operators per training step: without a GPU they stand in for the time that the host takes.

A host that hands out operators one by one is what holds a fast GPU back, so a step of ours has a
budget of them, and is held against the plain loop that most people start from.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL
from diffusers import AutoencoderKL
from helpers_train import MemoryBatches
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextModel

from benchmarks.train_step.diffusers_loop import DiffusersLoop, accelerate_in, build_plain_unet
from train.config import TrainConfig
from train.presets import preset
from train.trainer import Trainer, build_accelerator

BATCH, NUM_TOKENS, DIM = 4, 77, 128
WARM_UP_STEPS = 2  # the optimizer makes its state, the average starts

# As counted, and 3% for what another release of torch or diffusers takes apart differently. All but
# about a hundred are the U-Net's own, forward and backward.
STEP_BUDGETS = {"no": 1571 * 1.03, "bf16-weights": 1578 * 1.03, "bf16": 1876 * 1.03}
BATCHED_BUDGET = 1316 * 1.03


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def count(run: Callable[[], object]) -> int:
    with Operators() as operators:
        run()
    return operators.calls.total()


# Ours ---------------------------------------------------------------------------------------------


class TinyBatches(MemoryBatches):
    """Random samples in the shapes of the tiny preset, which are handed out between two counts."""

    def __init__(self, before_batch: Callable[[int], None]) -> None:
        super().__init__(before_batch=before_batch)
        rng = np.random.default_rng(1)
        self.null_states = rng.standard_normal((NUM_TOKENS, DIM)).astype(np.float16)
        self.states = rng.standard_normal((64, NUM_TOKENS, DIM)).astype(np.float16)


def steps_of_ours(tmp_path: Path, **changes: Any) -> list[int]:
    """Operators of each of a few steady steps of the tiny preset."""
    config: TrainConfig = replace(
        preset("tiny"),
        output_dir=str(tmp_path / "run"),
        global_batch_size=BATCH,
        warmup_steps=0,
        log_every=1000,
        validation_samples=0,
        num_samples=0,
        **changes,
    )
    operators = Operators()
    totals: list[int] = []
    batches = TinyBatches(before_batch=lambda step: totals.append(operators.calls.total()))
    trainer = Trainer(config, batches, build_accelerator(config))
    with operators:
        trainer.run(WARM_UP_STEPS + 4)
    trainer.close()
    return [after - before for before, after in pairwise(totals[WARM_UP_STEPS:])]


# The plain loop -----------------------------------------------------------------------------------


@pytest.fixture
def build_plain_loop() -> Iterator[Callable[..., DiffusersLoop]]:
    """`build_plain_loop(...)`: in float32, as ours above, with --use_ema, past its first steps."""
    with accelerate_in("no") as accelerator:

        def build(**settings: Any) -> DiffusersLoop:
            config = TrainConfig(unet="tiny", ema_decay=0.9999)
            loop = DiffusersLoop(build_plain_unet(config, 8), config, accelerator, 0.2, **settings)
            for _ in range(WARM_UP_STEPS):
                loop.step_on_latents(*latents_and_states())
            return loop

        yield build


class Encoders:
    """The models that ship with us, run as the plain loop does in every step."""

    def __init__(self) -> None:
        text_encoder = CLIPTextModel.from_pretrained(TINY_MODEL / "text_encoder")
        self._text_encoder = text_encoder.requires_grad_(False)
        self._vae = AutoencoderKL.from_pretrained(TINY_MODEL / "vae").requires_grad_(False)

    def __call__(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> list[torch.Tensor]:
        latents = self._vae.encode(pixel_values).latent_dist.sample()
        latents = latents * self._vae.config.scaling_factor
        return [latents, self._text_encoder(input_ids, return_dict=False)[0]]


def pixels_and_captions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.rand(BATCH, 3, 64, 64, generator=generator) * 2 - 1
    return pixel_values, torch.randint(99, (BATCH, NUM_TOKENS), generator=generator)


def latents_and_states() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(BATCH, 4, 8, 8, generator=generator)
    return latents, torch.randn(BATCH, NUM_TOKENS, DIM, generator=generator)


# The counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", list(STEP_BUDGETS))
def test_a_step_keeps_to_its_budget_of_operators(tmp_path, precision):
    steps, budget = steps_of_ours(tmp_path, mixed_precision=precision), STEP_BUDGETS[precision]
    assert len(set(steps)) == 1, "the same work in every step"
    assert 0.9 * budget < steps[0] <= budget, "a budget that is far off guards nothing"


def test_batched_projections_keep_to_a_smaller_one(tmp_path):
    steps = steps_of_ours(tmp_path, batched_projections="on")
    assert 0.9 * BATCHED_BUDGET < steps[0] <= BATCHED_BUDGET


def test_a_step_takes_at_most_half_the_operators_of_the_plain_loops(tmp_path, build_plain_loop):
    """Both at their defaults on this device, where torch's AdamW goes weight by weight."""
    plain, encode, (ours, *_) = build_plain_loop(), Encoders(), steps_of_ours(tmp_path)
    theirs = count(lambda: plain.step_on_latents(*encode(*pixels_and_captions())))
    assert ours <= 0.5 * theirs


@pytest.mark.parametrize(("foreach_ema", "times"), [(False, 8), (True, 4)])
def test_what_a_step_adds_to_the_unet_is_a_fraction_of_what_the_plain_loop_adds(
    tmp_path, build_plain_loop, foreach_ema, times
):
    """Without its encoders, and with AdamW on all weights at once, as torch's default on a GPU."""
    plain = build_plain_loop(foreach=True, foreach_ema=foreach_ema)
    ours, *_ = steps_of_ours(tmp_path)
    latents, states = latents_and_states()

    def forward_and_backward() -> None:
        timesteps = torch.zeros(BATCH, dtype=torch.long)
        plain.unet(latents, timesteps, states, return_dict=False)[0].mean().backward()

    theirs = count(lambda: plain.step_on_latents(latents, states))
    unet = count(forward_and_backward)
    assert unet < ours < theirs
    assert (ours - unet) * times <= theirs - unet
