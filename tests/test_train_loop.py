import itertools
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from helpers_train import (
    MemoryBatches,
    assert_same_bits,
    newest_checkpoint,
    run_on_memory,
    small_config,
    tensors_of,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from shards.errors import UserError
from train.checkpoint import checkpoints_of
from train.config import TrainConfig
from train.draws import draw
from train.interval import Interval
from train.metrics import read_metrics
from train.trainer import Trainer, build_accelerator, train

EMA_FROM_SIX = {"ema_decay": 0.9, "ema_start_step": 6}


def trainer_of(config: TrainConfig, **source: Any) -> Trainer:
    return Trainer(config, MemoryBatches(**source), build_accelerator(config))


def losses_of(trainer: Trainer) -> list[float]:
    return [row["train/loss"] for row in read_metrics(trainer.run_dir / "metrics.jsonl")]


def gradients_at_updates(trainer: Trainer) -> list[list[torch.Tensor]]:
    """Fills, as the trainer runs, with what the optimizer makes of the gradients at each update.

    Its kernel divides them, to clip, as it reads them, and writes them back.
    """
    seen: list[list[torch.Tensor]] = []

    def remember(*_: Any) -> None:
        masters = trainer.model.weights.tensors.values()
        seen.append([w.grad.clone() for w in masters if w.grad is not None])

    trainer.model.update.optimizer.register_step_post_hook(remember)
    return seen


def norm_of(gradients: list[torch.Tensor]) -> float:
    return torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt().item()


def test_the_loss_falls_on_eight_memorised_samples(tmp_path):
    config = small_config(
        tmp_path, max_steps=100, learning_rate=2e-3, log_every=20, prediction_type="v_prediction"
    )
    losses = losses_of(run_on_memory(config, num_samples=8))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.65 * losses[0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_one_step_is_the_diffusers_recipe(tmp_path, prediction_type):
    """The U-Net's inputs and the loss, put together once more from diffusers' own parts."""
    config = small_config(
        tmp_path, prediction_type=prediction_type, caption_drop_prob=0.5, max_steps=1
    )
    trainer, source = trainer_of(config), MemoryBatches()
    calls: list[tuple[tuple[torch.Tensor, ...], torch.Tensor]] = []
    trainer.model.unet.register_forward_hook(
        lambda _, inputs, output: calls.append((inputs, output[0].detach()))
    )
    trainer.run(1)
    (noisy_latents, timesteps, encoder_hidden_states), model_pred = calls[0]

    batch = next(source.iter_batches(0, range(8)))
    draws = draw(
        seed=0,
        step=0,
        positions=range(8),
        global_batch_size=8,
        latent_shape=source.latent_shape,
        num_train_timesteps=1000,
        caption_drop_prob=0.5,
        device=torch.device("cpu"),
    )
    posterior = DiagonalGaussianDistribution(torch.from_numpy(batch.moments).float())
    latents = (posterior.mean + posterior.std * draws.posterior_noise) * source.scaling_factor
    scheduler = DDPMScheduler.from_config(trainer.model.scheduler_config)
    expected_states = torch.from_numpy(batch.states).float()
    expected_states[draws.drop_caption] = torch.from_numpy(source.null_states).float()
    velocity = scheduler.get_velocity(latents, draws.noise, draws.timesteps)
    target = draws.noise if prediction_type == "epsilon" else velocity

    assert 0 < draws.drop_caption.sum() < 8
    assert torch.equal(timesteps, draws.timesteps)
    assert torch.equal(encoder_hidden_states, expected_states)
    noised = scheduler.add_noise(latents, draws.noise, draws.timesteps)
    torch.testing.assert_close(noisy_latents, noised)
    loss = torch.nn.functional.mse_loss(model_pred, target).item()
    assert losses_of(trainer) == [pytest.approx(loss, rel=1e-5)]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_accumulated_gradients_equal_those_of_the_full_batch(tmp_path, micro_batch_size):
    settings = {"caption_drop_prob": 0.5, "min_snr_gamma": 5.0, "max_steps": 1}
    whole = trainer_of(small_config(tmp_path / "whole", **settings))
    parts = trainer_of(
        small_config(tmp_path / "parts", micro_batch_size=micro_batch_size, **settings)
    )
    (expected,), (found,) = (_run_for_gradients(trainer) for trainer in (whole, parts))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert losses_of(parts) == [pytest.approx(losses_of(whole)[0], rel=1e-5)]


def _run_for_gradients(trainer: Trainer) -> list[list[torch.Tensor]]:
    gradients = gradients_at_updates(trainer)
    trainer.run(trainer.config.max_steps)
    return gradients


def test_the_launchers_environment_does_not_scale_the_gradients(tmp_path, monkeypatch):
    plain = run_on_memory(small_config(tmp_path / "plain", max_steps=1))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    told = run_on_memory(small_config(tmp_path / "told", max_steps=1))
    first, second = (read_metrics(t.run_dir / "metrics.jsonl")[0] for t in (plain, told))
    assert first["train/grad_norm"] == second["train/grad_norm"]


def test_dropped_captions_become_the_sources_null_states(tmp_path):
    """With every caption dropped, captions mean nothing and the null states everything."""

    def losses(name: str, source: MemoryBatches, drop_prob: float) -> list[float]:
        config = small_config(tmp_path / name, caption_drop_prob=drop_prob, max_steps=3)
        return losses_of(train(config, source))

    plain, other_captions, other_null = MemoryBatches(), MemoryBatches(), MemoryBatches()
    other_captions.states = other_captions.states[::-1].copy()
    other_null.null_states = other_null.null_states + np.float16(1)
    all_dropped = losses("a", plain, 1.0)
    assert losses("b", other_captions, 1.0) == all_dropped
    assert losses("c", other_null, 1.0) != all_dropped
    none_dropped = losses("d", plain, 0.0)
    assert none_dropped != all_dropped
    assert losses("e", other_null, 0.0) == none_dropped
    assert losses("f", other_captions, 0.0) != none_dropped


def test_gradients_are_clipped_and_the_norm_before_is_logged(tmp_path):
    free = trainer_of(small_config(tmp_path / "free", max_grad_norm=0, max_steps=1))
    clipped = trainer_of(small_config(tmp_path / "clipped", max_grad_norm=1e-3, max_steps=1))
    (before,), (after,) = (_run_for_gradients(trainer) for trainer in (free, clipped))
    assert norm_of(before) > 1e-2
    assert norm_of(after) == pytest.approx(1e-3, rel=1e-2)
    for trainer in (free, clipped):
        (row,) = read_metrics(trainer.run_dir / "metrics.jsonl")
        assert row["train/grad_norm"] == pytest.approx(norm_of(before), rel=1e-4)


def test_the_optimizer_is_adamw_at_the_scheduled_rate(tmp_path):
    """Two updates by hand, from the gradients that the optimizer was given."""
    config = small_config(
        tmp_path, warmup_steps=4, learning_rate=1e-2, weight_decay=0.1, adam_betas=(0.8, 0.95)
    )
    trainer = trainer_of(config)
    expected = [p.detach().clone().requires_grad_() for p in trainer.model.unet.parameters()]
    gradients = gradients_at_updates(trainer)
    trainer.run(2)
    reference = torch.optim.AdamW(expected, betas=(0.8, 0.95), weight_decay=0.1)
    for step in range(2):
        reference.param_groups[0]["lr"] = 1e-2 * (step + 1) / 4
        for weight, gradient in zip(expected, gradients[step], strict=True):
            weight.grad = gradient
        reference.step()
    for weight, parameter in zip(expected, trainer.model.unet.parameters(), strict=True):
        torch.testing.assert_close(parameter, weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "bf16-weights", "fp16"])
@pytest.mark.parametrize("micro_batch_size", [0, 4])
def test_low_precision_stays_near_float32(tmp_path, precision, micro_batch_size):
    settings = {"max_steps": 3, "learning_rate": 1e-4, "micro_batch_size": micro_batch_size}
    exact = losses_of(run_on_memory(small_config(tmp_path / "exact", **settings)))
    config = small_config(tmp_path / "low", mixed_precision=precision, **settings)
    trainer = run_on_memory(config)
    rounded = losses_of(trainer)
    assert rounded != exact
    assert rounded == [pytest.approx(loss, rel=0.02) for loss in exact]
    masters = {w.dtype for w in trainer.model.weights.tensors.values()}
    parameters = {p.dtype for p in trainer.model.unet.parameters()}
    assert masters == {torch.float32}
    assert parameters == {torch.bfloat16 if precision == "bf16-weights" else torch.float32}


# What is not finite -------------------------------------------------------------------------------


class PoisonedBatches(MemoryBatches):
    """Latents turn infinite at one step, of all samples or one; a signal may come as well."""

    def __init__(self, poisoned_step: int, signal_number: int = 0, sample: int = -1) -> None:
        super().__init__(before_batch=self._poison)
        self._poisoned_step, self._signal_number = poisoned_step, signal_number
        self._samples = slice(sample, sample + 1) if sample >= 0 else slice(None)

    def _poison(self, step: int) -> None:
        if step == self._poisoned_step:
            self.moments = self.moments.copy()
            self.moments[self._samples] = np.inf
            os.kill(os.getpid(), self._signal_number)  # signal 0 only asks whether we are there


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_samples(tmp_path):
    config = small_config(tmp_path, max_steps=20, log_every=4, checkpoint_every=4)
    with pytest.raises(UserError, match=r"at step 5 the loss of .*--learning-rate") as end:
        train(config, PoisonedBatches(5))
    assert "memory/25, memory/26, memory/27, memory/28 and 4 more" in str(end.value)
    keys = [f"memory/{number}" for number in range(25, 33)]
    assert json.loads((tmp_path / "run" / "broken-batch.json").read_text()) == {
        "step": 5,
        "keys": keys,
        "keys_with_loss_not_finite": keys,
    }
    assert [found.step for found in checkpoints_of(tmp_path / "run")] == [4]
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [4]


def test_the_one_sample_to_blame_is_named(tmp_path):
    config = small_config(tmp_path, max_steps=8, log_every=8, micro_batch_size=2)
    with pytest.raises(UserError, match=r"at step 2 the loss of memory/13 is not finite"):
        train(config, PoisonedBatches(2, sample=13))
    document = json.loads((tmp_path / "run" / "broken-batch.json").read_text())
    assert document["keys"] == [f"memory/{number}" for number in range(10, 18)]
    assert document["keys_with_loss_not_finite"] == ["memory/13"]


def test_the_optimizer_never_sees_what_is_not_finite(tmp_path):
    """Weights, moments and counters at the end are those before the broken step."""
    config = small_config(tmp_path, max_steps=20, log_every=20, checkpoint_every=20)
    trainer = trainer_of(config)
    trainer.run(5)
    before = {name: weight.clone() for name, weight in trainer.model.weights.tensors.items()}
    broken = Trainer(config, PoisonedBatches(5), build_accelerator(config))
    with pytest.raises(UserError, match="at step 5"):
        broken.run(20)
    for name, weight in broken.model.weights.tensors.items():
        assert torch.equal(weight, before[name])
    counters = {state["step"].item() for state in broken.model.update.optimizer.state.values()}
    assert counters == {5.0}


@pytest.mark.parametrize("log_every", [50, 8])
def test_poisoned_weights_are_never_saved(tmp_path, log_every):
    config = small_config(tmp_path, max_steps=20, log_every=log_every, checkpoint_every=2)
    with pytest.raises(UserError, match="at step 5"):
        train(config, PoisonedBatches(5))
    assert [found.step for found in checkpoints_of(tmp_path / "run")] == [2, 4]
    assert not (tmp_path / "run" / "unet").exists()


def test_a_stop_after_poison_saves_nothing(tmp_path):
    with pytest.raises(UserError, match="at step 2"):
        train(small_config(tmp_path, log_every=50), PoisonedBatches(2, signal.SIGTERM))
    assert not checkpoints_of(tmp_path / "run")


def test_a_float16_overflow_is_left_out_counted_and_survived(tmp_path):
    config = small_config(tmp_path, mixed_precision="fp16", max_steps=6, log_every=3)
    trainer = trainer_of(config)
    trainer.model.update.loss_scale.fill_(2.0**60)
    trainer.run(6)
    first, second = read_metrics(trainer.run_dir / "metrics.jsonl")
    assert first["train/updates_left_out"] == 3
    assert first["train/grad_norm"] == 0
    assert first["train/loss_scale"] == 2.0**57
    assert np.isfinite([first["train/loss"], second["train/loss"]]).all()


# What is measured ---------------------------------------------------------------------------------


def test_rows_stand_at_every_interval_and_at_the_end(tmp_path):
    config = small_config(tmp_path, max_steps=7, log_every=3, warmup_steps=4)
    trainer = run_on_memory(config)
    rows = read_metrics(trainer.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 6, 7]
    rates = [row["train/learning_rate"] for row in rows]
    assert rates == [config.learning_rate_at(step) for step in (2, 5, 6)]
    assert [row["epoch"] for row in rows] == [0.3, 0.6, 0.7]
    for row in rows:
        assert row["perf/images_per_sec"] == pytest.approx(8 * row["perf/iters_per_sec"])
        assert 0 <= row["perf/data_wait_frac"] <= 1
        assert row["perf/peak_mem_gib"] > 0


def test_a_row_holds_the_mean_over_its_interval(tmp_path):
    single = losses_of(run_on_memory(small_config(tmp_path / "single", log_every=1)))
    triple = losses_of(run_on_memory(small_config(tmp_path / "triple", log_every=3)))
    means = [np.mean(single[:3]), np.mean(single[3:])]
    assert triple == [pytest.approx(mean, rel=1e-5) for mean in means]


def test_rates_follow_from_the_clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("train.interval.time.perf_counter", lambda: now[0])
    interval = Interval(10, torch.device("cpu"))
    with interval.waiting():
        now[0] += 1.0
    with interval.paused():
        now[0] += 50.0
    now[0] += 3.0
    row = interval.close(18, [4.0, 16.0, 0.0], global_batch_size=32)
    assert row["train/loss"] == 0.5
    assert row["train/grad_norm"] == 2.0
    assert row["perf/iters_per_sec"] == 2.0
    assert row["perf/images_per_sec"] == 64.0
    assert row["perf/data_wait_frac"] == 0.25


def test_mfu_is_counted_work_over_measured_speed(tmp_path):
    trainer = trainer_of(small_config(tmp_path, max_steps=2))
    trainer.run(2)
    record = json.loads((trainer.run_dir / "config.json").read_text())
    for row in read_metrics(trainer.run_dir / "metrics.jsonl"):
        achieved = row["perf/images_per_sec"] * record["flops_per_image"]
        assert row["perf/mfu"] == pytest.approx(achieved / record["matmul_flops_per_sec"])


def test_an_observer_sees_the_run_and_its_figures_are_kept(tmp_path):
    seen: list[int] = []

    class Observer:
        every = 4

        def observe(self, trainer: Trainer) -> dict[str, float]:
            seen.append(trainer.step)
            weights = trainer.model.weights_on_host("raw")
            assert weights is not None
            assert weights.keys() == trainer.model.weights.tensors.keys()
            assert (trainer.model.weights_on_host("ema") is None) == (trainer.step < 6)
            return {"val/figure": float(trainer.step)}

    plain = run_on_memory(small_config(tmp_path / "plain", max_steps=10, **EMA_FROM_SIX))
    config = small_config(tmp_path / "seen", max_steps=10, **EMA_FROM_SIX)
    watched = train(config, MemoryBatches(), observers=[Observer()])
    assert seen == [4, 8, 10]
    rows = read_metrics(watched.run_dir / "metrics.jsonl")
    assert [row["val/figure"] for row in rows if "val/figure" in row] == [4, 8, 10]
    assert_same_bits(*(tensors_of(newest_checkpoint(t.run_dir)) for t in (plain, watched)))


def test_data_that_ends_because_it_was_told_to_ends_the_run_politely(tmp_path, capsys):
    class Ending(MemoryBatches):
        def iter_batches(self, first_step: int, positions: range) -> Iterator[Any]:
            yield from itertools.islice(super().iter_batches(first_step, positions), 3)

    config = small_config(tmp_path, max_steps=6)
    trainer = train(config, Ending())
    assert trainer.step == 3
    assert "the same command continues" in capsys.readouterr().out
    assert run_on_memory(config).step == 6


# The host never waits -----------------------------------------------------------------------------

READS_ON_THE_HOST = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__"}
READS_IN_OPERATORS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
}


class OperatorReads(TorchDispatchMode):
    """Counts operators that on a GPU make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS_IN_OPERATORS:
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


class PythonReads(TorchFunctionMode):
    """Counts methods that hand a tensor's values to Python; some of them call no operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS_ON_THE_HOST:
            self.calls[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("micro_batch_size", [0, 4])
@pytest.mark.parametrize(
    "settings", [{}, {"mixed_precision": "bf16-weights"}, {"mixed_precision": "fp16"}], ids=str
)
def test_no_step_between_two_logs_reads_a_value_on_the_host(tmp_path, micro_batch_size, settings):
    config = small_config(
        tmp_path,
        max_steps=30,
        log_every=1000,
        ema_decay=0.9,
        min_snr_gamma=5.0,
        caption_drop_prob=0.5,
        offset_noise=0.1,
        timestep_sampling="sobol",
        micro_batch_size=micro_batch_size,
        **settings,
    )
    reads: list[tuple[Counter[str], Counter[str]]] = []
    operators, methods = OperatorReads(), PythonReads()

    def note(step: int) -> None:
        reads.append((operators.calls.copy(), methods.calls.copy()))

    trainer = trainer_of(config, before_batch=note)
    with operators, methods:
        trainer.run(8)
    assert reads[2:] == [reads[2]] * 6, reads[-1]
    assert reads[2] == (Counter(), Counter())
    assert sum(methods.calls.values()) > 0, "the log at the end reads, or nothing is counted"


def test_a_run_leaves_torchs_global_generator_alone(tmp_path: Path):
    before = torch.random.get_rng_state()
    run_on_memory(small_config(tmp_path, max_steps=2))
    assert torch.equal(torch.random.get_rng_state(), before)
