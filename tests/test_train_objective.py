import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import REPOSITORY
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr
from diffusers.training_utils import compute_snr
from torch._dynamo.testing import CompileCounter

from shards.canonical import canonical_json
from shards.errors import UserError
from train.config import TrainConfig
from train.objective import Objective, sample_latents
from train.unet import load_unet_config

ALL_TIMESTEPS = torch.arange(1000)
DIFFUSION = ["epsilon", "v_prediction", "sample"]
# Every combination that a configuration allows.
SCHEDULES: list[dict[str, Any]] = [
    {"prediction_type": prediction_type, "zero_terminal_snr": terminal, "snr_shift": shift}
    for prediction_type in [*DIFFUSION, "flow"]
    for terminal in (False, True)
    for shift in (1.0, 0.25, 1 / 9, 4.0)
    if not (terminal and prediction_type in ("epsilon", "flow"))
]


def name_of(settings: dict[str, Any]) -> str:
    terminal = "-terminal" if settings["zero_terminal_snr"] else ""
    return f"{settings['prediction_type']}{terminal}-{settings['snr_shift']:.2g}"


def objective_of(**settings: Any) -> Objective:
    return Objective(TrainConfig(**settings), torch.device("cpu"))


def stable_diffusion_scheduler(**settings: Any) -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        num_train_timesteps=1000,
        clip_sample=False,
        **settings,
    )


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def signal_and_sigma(objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    one, nothing = torch.ones(1000, 1, 1, 1), torch.zeros(1000, 1, 1, 1)
    signal = objective.add_noise(one, nothing, ALL_TIMESTEPS).flatten()
    sigma = objective.add_noise(nothing, one, ALL_TIMESTEPS).flatten()
    return signal, sigma


def weights_by_timestep(objective: Objective) -> torch.Tensor:
    """The loss of a prediction that is off by one everywhere, at each timestep."""
    wrong, right = torch.ones(1000, 4, 2, 2), torch.zeros(1000, 4, 2, 2)
    return objective.loss(wrong, right, ALL_TIMESTEPS)


def exact_signal_power(*, zero_terminal_snr: bool = False, snr_shift: float = 1.0) -> torch.Tensor:
    """The squared signal of each timestep, by the papers' formulas in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    power = (1 - betas).cumprod(0)
    if zero_terminal_snr:  # arXiv:2305.08891, Algorithm 1, on the square roots
        first, last = power[0].sqrt(), power[-1].sqrt()
        power = ((power.sqrt() - last) * first / (first - last)) ** 2
    # arXiv:2301.11093: logSNR + log(shift), and alpha² = sigmoid(logSNR)
    return torch.sigmoid(torch.logit(power) + torch.tensor(snr_shift).double().log())


# Latents -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_latents_equal_diffusers_posterior_sample_times_the_scale(dtype):
    moments = (randn(5, 8, 6, 6, seed=0) * 3).to(dtype)
    theirs = DiagonalGaussianDistribution(moments.float())
    sample = theirs.sample(generator=torch.Generator().manual_seed(1))
    noise = randn(5, 4, 6, 6, seed=1)
    assert torch.equal(sample_latents(moments, noise, 0.18215), sample * 0.18215)


@pytest.mark.parametrize("logvar", [-100.0, -31.0, 19.0, 25.0, 1000.0])
def test_extreme_variances_are_clamped_as_diffusers_clamps_them(logvar):
    moments = torch.cat([randn(2, 4, 3, 3, seed=0), torch.full((2, 4, 3, 3), logvar)], dim=1)
    sample = DiagonalGaussianDistribution(moments).sample(torch.Generator().manual_seed(1))
    latents = sample_latents(moments, randn(2, 4, 3, 3, seed=1), 1.0)
    assert torch.isfinite(latents).all()
    assert torch.equal(latents, sample)


@pytest.mark.parametrize("mean", [-65504.0, -6e-8, 0.0, 65504.0])
@pytest.mark.parametrize("logvar", [-65504.0, 65504.0])
def test_the_largest_and_smallest_fp16_moments_are_computed_in_float32(mean, logvar):
    moments = torch.tensor([mean, logvar], dtype=torch.float16).view(1, 2, 1, 1)
    latents = sample_latents(moments, torch.full((1, 1, 1, 1), 2.0), 0.18215)
    exact_mean = moments[0, 0].double().item()
    deviation = 2.718281828459045 ** (0.5 * (20 if logvar > 0 else -30))
    assert latents.dtype == torch.float32
    assert latents.item() == pytest.approx((exact_mean + 2 * deviation) * 0.18215, rel=1e-5)


def test_means_alone_are_taken_as_they_are_whatever_the_noise():
    means = randn(3, 4, 5, 5, seed=0).half()
    latents = sample_latents(means, randn(3, 4, 5, 5, seed=1), 0.5)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, means.float() * 0.5)


# Schedules ---------------------------------------------------------------------------------------


def test_the_noise_schedule_is_stable_diffusions():
    theirs = stable_diffusion_scheduler().alphas_cumprod
    signal, sigma = signal_and_sigma(objective_of())
    assert torch.equal(signal, theirs.sqrt())
    assert torch.equal(sigma, (1 - theirs).sqrt())
    torch.testing.assert_close(signal.double() ** 2, exact_signal_power(), rtol=1e-4, atol=0)


def test_zero_terminal_snr_is_diffusers_rescaling_and_the_papers():
    betas = rescale_zero_terminal_snr(stable_diffusion_scheduler().betas)
    signal, sigma = signal_and_sigma(
        objective_of(prediction_type="v_prediction", zero_terminal_snr=True)
    )
    assert torch.equal(signal, (1 - betas).cumprod(0).sqrt())
    exact = exact_signal_power(zero_terminal_snr=True)
    torch.testing.assert_close(signal.double() ** 2, exact, rtol=1e-3, atol=1e-9)
    assert (signal[-1], sigma[-1]) == (0, 1)
    assert (signal[:-1] > 0).all()


def test_at_zero_terminal_snr_the_last_timestep_shows_nothing_but_noise():
    latents, noise = randn(1, 4, 3, 3, seed=0), randn(1, 4, 3, 3, seed=1)
    objective = objective_of(prediction_type="v_prediction", zero_terminal_snr=True)
    last = ALL_TIMESTEPS[-1:]
    assert torch.equal(objective.add_noise(latents, noise, last), noise)
    assert torch.equal(objective.target(latents, noise, last), -latents)


@pytest.mark.parametrize("settings", SCHEDULES, ids=name_of)
def test_the_shift_multiplies_the_snr_of_every_timestep(settings):
    shift = settings["snr_shift"]
    signal, sigma = signal_and_sigma(objective_of(**settings))
    unshifted = signal_and_sigma(objective_of(**settings | {"snr_shift": 1.0}))
    expected = shift * (unshifted[0].double() / unshifted[1].double()) ** 2
    torch.testing.assert_close((signal / sigma).double() ** 2, expected, rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("snr_shift", [0.25, 1 / 9, 4.0])
def test_the_shifted_schedule_is_the_papers_and_keeps_the_variance(zero_terminal_snr, snr_shift):
    changes = {"zero_terminal_snr": zero_terminal_snr, "snr_shift": snr_shift}
    signal, sigma = signal_and_sigma(objective_of(prediction_type="v_prediction", **changes))
    exact = exact_signal_power(**changes)
    torch.testing.assert_close(signal.double() ** 2, exact, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(signal**2 + sigma**2, torch.ones(1000))


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow"])
@pytest.mark.parametrize("snr_shift", [1e-300, 1e-20, 1e100, 1e300])
def test_a_shift_beyond_float32_is_refused(prediction_type, snr_shift):
    with pytest.raises(UserError, match="--snr-shift"):
        objective_of(prediction_type=prediction_type, snr_shift=snr_shift)


# Noising and targets -----------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", DIFFUSION)
def test_noising_and_target_equal_diffusers(prediction_type):
    terminal = prediction_type != "epsilon"
    latents, noise = randn(1000, 4, 2, 2, seed=2), randn(1000, 4, 2, 2, seed=3)
    objective = objective_of(prediction_type=prediction_type, zero_terminal_snr=terminal)
    theirs = stable_diffusion_scheduler(rescale_betas_zero_snr=terminal)
    noisy = theirs.add_noise(latents, noise, ALL_TIMESTEPS)
    velocity = theirs.get_velocity(latents, noise, ALL_TIMESTEPS)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[prediction_type]
    assert torch.equal(objective.add_noise(latents, noise, ALL_TIMESTEPS), noisy)
    assert torch.equal(objective.target(latents, noise, ALL_TIMESTEPS), target)
    assert torch.equal(objective.model_timesteps(ALL_TIMESTEPS), ALL_TIMESTEPS)


@pytest.mark.parametrize(("snr_shift", "flow_shift"), [(1.0, 1.0), (0.25, 2.0), (1 / 9, 3.0)])
def test_flow_is_diffusers_flow_matching_with_its_shift(snr_shift, flow_shift):
    latents, noise = randn(1000, 4, 2, 2, seed=2), randn(1000, 4, 2, 2, seed=3)
    objective = objective_of(prediction_type="flow", snr_shift=snr_shift)
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=flow_shift)
    model_timesteps = objective.model_timesteps(ALL_TIMESTEPS)
    torch.testing.assert_close(model_timesteps, theirs.timesteps.flip(0), rtol=1e-6, atol=0)
    expected = theirs.scale_noise(latents, theirs.timesteps.flip(0), noise)
    torch.testing.assert_close(objective.add_noise(latents, noise, ALL_TIMESTEPS), expected)


def test_flows_target_is_the_slope_of_the_line_from_latents_to_noise():
    latents, noise = randn(1, 4, 2, 2, seed=4).double(), randn(1, 4, 2, 2, seed=5).double()
    objective = objective_of(prediction_type="flow", snr_shift=0.25)
    for start, end in ((0, 1), (3, 700), (998, 999)):
        times = torch.tensor([start, end])
        before, after = (objective.add_noise(latents, noise, time[None]) for time in times)
        span = objective.model_timesteps(times).double().diff() / 1000
        target = objective.target(latents, noise, times[:1])
        torch.testing.assert_close(target, (after - before) / span, rtol=1e-3, atol=1e-3)


def test_flows_timesteps_say_sigma_in_thousandths_and_end_in_noise():
    objective = objective_of(prediction_type="flow", snr_shift=0.25)
    signal, sigma = signal_and_sigma(objective)
    torch.testing.assert_close(objective.model_timesteps(ALL_TIMESTEPS), 1000 * sigma)
    assert (signal[-1], sigma[-1]) == (0, 1)
    assert (sigma.diff() > 0).all()


# The loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", DIFFUSION)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("snr_shift", [1.0, 0.25])
def test_min_snr_weights_are_the_papers(prediction_type, gamma, snr_shift):
    snr = compute_snr(stable_diffusion_scheduler(), ALL_TIMESTEPS).double() * snr_shift
    # arXiv:2303.09556, section 3.4: min(SNR, gamma) on the error of x0, rewritten for the error of
    # epsilon (x0's is 1/SNR of it) and of v (x0's is 1/(SNR + 1) of it).
    on_x0 = torch.minimum(snr, torch.tensor(gamma, dtype=torch.float64))
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    objective = objective_of(
        prediction_type=prediction_type, min_snr_gamma=gamma, snr_shift=snr_shift
    )
    torch.testing.assert_close(
        weights_by_timestep(objective).double(), on_x0 / divisor[prediction_type], rtol=2e-3, atol=0
    )


def test_min_snr_weights_by_hand_at_the_first_and_the_last_timestep():
    first, last = 0.99915 / 0.00085, 0.0046601 / (1 - 0.0046601)  # SNR of SD's schedule
    for prediction_type, expected in (
        ("epsilon", (5 / first, 1.0)),
        ("v_prediction", (5 / (first + 1), last / (last + 1))),
        ("sample", (5.0, last)),
    ):
        weights = weights_by_timestep(
            objective_of(prediction_type=prediction_type, min_snr_gamma=5.0)
        )
        assert weights[[0, -1]].tolist() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("snr_shift", [1.0, 0.25])
def test_min_snr_weights_are_finite_at_zero_terminal_snr(prediction_type, snr_shift):
    objective = objective_of(
        prediction_type=prediction_type,
        min_snr_gamma=5.0,
        zero_terminal_snr=True,
        snr_shift=snr_shift,
    )
    weights = weights_by_timestep(objective)
    assert torch.isfinite(weights).all()
    assert (weights[:-1] > 0).all()
    assert weights[-1] == 0


@pytest.mark.parametrize("settings", SCHEDULES, ids=name_of)
def test_without_min_snr_all_timesteps_weigh_alike(settings):
    assert torch.equal(weights_by_timestep(objective_of(**settings)), torch.ones(1000))


def test_the_loss_weighs_each_sample_by_its_own_timestep_in_float32():
    objective = objective_of(prediction_type="v_prediction", min_snr_gamma=5.0)
    weights = weights_by_timestep(objective)
    prediction, target = randn(3, 4, 2, 2, seed=6).bfloat16(), randn(3, 4, 2, 2, seed=7)
    timesteps = torch.tensor([0, 400, 999])
    per_sample = (prediction.double() - target.double()).square().mean(dim=(1, 2, 3))
    loss = objective.loss(prediction, target, timesteps)
    assert loss.dtype == torch.float32
    expected = weights[timesteps].double() * per_sample
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


# The export --------------------------------------------------------------------------------------


def export(folder: Path, objective: Objective) -> Path:
    """Writes the scheduler folder as a checkpoint has it."""
    (folder / "scheduler").mkdir(parents=True)
    text = canonical_json(objective.scheduler_config())
    (folder / "scheduler" / "scheduler_config.json").write_text(text, encoding="utf-8")
    return folder / "scheduler"


@pytest.mark.parametrize(
    "settings", [s for s in SCHEDULES if s["prediction_type"] != "flow"], ids=name_of
)
def test_the_exported_scheduler_is_the_schedule_of_training(tmp_path, settings):
    objective = objective_of(**settings)
    signal, _ = signal_and_sigma(objective)
    folder = export(tmp_path, objective)
    trained = DDPMScheduler.from_pretrained(folder)
    sampler = DPMSolverMultistepScheduler.from_config(
        json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))
    )
    twice_shaped = settings["zero_terminal_snr"] and settings["snr_shift"] != 1
    tolerance = 2e-5 if twice_shaped else 0  # diffusers rescales once more what is rescaled
    for scheduler in (trained, sampler):
        assert scheduler.config.prediction_type == settings["prediction_type"]
        alphas_cumprod = scheduler.alphas_cumprod
        torch.testing.assert_close(
            alphas_cumprod[:-1].sqrt(), signal[:-1], rtol=tolerance, atol=tolerance / 100
        )
    assert trained.alphas_cumprod[-1].sqrt() == signal[-1]
    # DPM-Solver divides by the signal, and sets 2**-24 for what diffusers knows to be zero.
    last = 2**-12 if settings["zero_terminal_snr"] else signal[-1]
    assert sampler.alphas_cumprod[-1].sqrt() == last


@pytest.mark.parametrize("snr_shift", [1.0, 0.25, 1 / 9, 4.0])
@pytest.mark.parametrize("num_steps", [27, 999])
def test_the_exported_flow_sampler_steps_on_the_sigmas_of_training(tmp_path, snr_shift, num_steps):
    objective = objective_of(prediction_type="flow", snr_shift=snr_shift)
    sampler = DPMSolverMultistepScheduler.from_pretrained(export(tmp_path, objective))
    sampler.set_timesteps(num_steps)
    _, trained = signal_and_sigma(objective)
    *sigmas, end = sampler.sigmas
    off = (torch.stack(sigmas)[:, None] - trained).abs().amin(dim=1)
    assert end == 0
    assert off.max() < 1e-6
    # It tells the U-Net what was trained, cut off to an integer.
    assert ((1000 * torch.stack(sigmas) - sampler.timesteps).abs() < 1.001).all()


Stub = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def perfect_unet(objective: Objective, latents: torch.Tensor) -> Stub:
    """What a U-Net predicts that has learned one image by heart."""
    signal, sigma = signal_and_sigma(objective)
    model_timesteps = objective.model_timesteps(ALL_TIMESTEPS)

    def predict(noisy_latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        nearest = (model_timesteps - timestep).abs().argmin()[None]
        noise = (noisy_latents - signal[nearest] * latents) / sigma[nearest]
        return objective.target(latents, noise, nearest)

    return predict


@pytest.mark.parametrize("settings", SCHEDULES, ids=name_of)
def test_the_exported_sampler_understands_what_was_trained(tmp_path, settings):
    """At each of its steps it must read the latents out of an exact prediction."""
    objective = objective_of(**settings)
    config = DPMSolverMultistepScheduler.load_config(export(tmp_path, objective))
    sampler = DPMSolverMultistepScheduler.from_config(config)
    sampler.set_timesteps(20)
    latents, sample = randn(1, 4, 4, 4, seed=0), randn(1, 4, 4, 4, seed=1)
    predict = perfect_unet(objective, latents)
    # The scheduler cuts flow's timesteps off to integers.
    tolerance = 0.01 if settings["prediction_type"] == "flow" else 0.001
    for timestep in sampler.timesteps:
        sample = sampler.step(predict(sample, timestep), timestep, sample).prev_sample
        torch.testing.assert_close(sampler.model_outputs[-1], latents, rtol=0, atol=tolerance)
    torch.testing.assert_close(sample, latents, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        {"prediction_type": "flow", "snr_shift": 0.25},
        {"prediction_type": "v_prediction", "snr_shift": 0.25, "zero_terminal_snr": True},
    ],
    ids=["flow", "diffusion"],
)
def test_a_stable_diffusion_pipeline_runs_on_the_exported_scheduler(tmp_path, settings):
    objective = objective_of(**settings)
    named = getattr(diffusers, objective.scheduler_config()["_class_name"])
    sampler = named.from_pretrained(export(tmp_path, objective))
    unet = UNet2DConditionModel.from_config(load_unet_config("tiny"))
    pipeline = StableDiffusionPipeline.from_pretrained(
        REPOSITORY / "examples" / "tiny-model", unet=unet, scheduler=sampler
    )
    pipeline.set_progress_bar_config(disable=True)
    told: list[torch.Tensor] = []
    unet.register_forward_pre_hook(lambda _, inputs: told.append(inputs[1]))
    images = pipeline(
        "a red circle", num_inference_steps=4, output_type="pt", guidance_scale=2.0
    ).images
    assert torch.isfinite(images).all()
    assert images.std() > 0
    trained = objective.model_timesteps(ALL_TIMESTEPS)
    assert len(told) == 4
    assert all(trained.min() <= timestep <= trained.max() for timestep in told)
    assert told[0] > 998


# Compilation -------------------------------------------------------------------------------------


class Step(torch.nn.Module):
    """The objective around a model, as train/diffusion_loss.py has it."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self.model = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(
        self, moments: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        latents = sample_latents(moments, noise, 0.18215)
        noisy_latents = self.objective.add_noise(latents, noise, timesteps)
        scale = self.objective.model_timesteps(timesteps).view(-1, 1, 1, 1) / 1000
        target = self.objective.target(latents, noise, timesteps)
        return self.objective.loss(self.model(noisy_latents) * scale, target, timesteps)


@pytest.mark.parametrize("prediction_type", [*DIFFUSION, "flow"])
def test_the_objective_compiles_to_one_graph_once(prediction_type):
    torch._dynamo.reset()
    counter = CompileCounter()
    step = Step(objective_of(prediction_type=prediction_type, snr_shift=0.25))
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=False)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        timesteps = torch.randint(1000, (6,), generator=generator)
        inputs = randn(6, 8, 4, 4, seed=seed), randn(6, 4, 4, 4, seed=seed + 9), timesteps
        compiled(*inputs).mean().backward()
        assert torch.equal(compiled(*inputs), step(*inputs))
    assert counter.frame_count == 1
