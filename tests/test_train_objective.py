import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import compute_snr

from train.checkpoint import save_scheduler
from train.objective import SCHEDULER_CONFIG, Objective, sample_latents

CPU = torch.device("cpu")
ALL_TIMESTEPS = torch.arange(1000)


def scheduler_of(prediction_type: str) -> DDPMScheduler:
    config = {**SCHEDULER_CONFIG, "prediction_type": prediction_type}
    return DDPMScheduler.from_config(config)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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


def test_the_noise_schedule_is_stable_diffusions():
    theirs = scheduler_of("epsilon").alphas_cumprod
    one, nothing = torch.ones(1000, 1, 1, 1), torch.zeros(1000, 1, 1, 1)
    objective = Objective("epsilon", 0.0, CPU)
    signal = objective.add_noise(one, nothing, ALL_TIMESTEPS).flatten()
    sigma = objective.add_noise(nothing, one, ALL_TIMESTEPS).flatten()
    assert torch.equal(signal, theirs.sqrt())
    assert torch.equal(sigma, (1 - theirs).sqrt())
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(theirs.double(), (1 - betas).cumprod(0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noising_and_target_equal_diffusers(prediction_type):
    latents, noise = randn(1000, 4, 2, 2, seed=2), randn(1000, 4, 2, 2, seed=3)
    objective, theirs = Objective(prediction_type, 0.0, CPU), scheduler_of(prediction_type)
    noisy = theirs.add_noise(latents, noise, ALL_TIMESTEPS)
    velocity = theirs.get_velocity(latents, noise, ALL_TIMESTEPS)
    target = noise if prediction_type == "epsilon" else velocity
    assert torch.equal(objective.add_noise(latents, noise, ALL_TIMESTEPS), noisy)
    assert torch.equal(objective.target(latents, noise, ALL_TIMESTEPS), target)


def weights_by_timestep(prediction_type: str, gamma: float) -> torch.Tensor:
    """The loss of a prediction that is off by one everywhere, one timestep at a time."""
    objective = Objective(prediction_type, gamma, CPU)
    wrong, right = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    return torch.stack([objective.loss(wrong, right, t[None]) for t in ALL_TIMESTEPS])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_the_papers(prediction_type, gamma):
    snr = compute_snr(scheduler_of(prediction_type), ALL_TIMESTEPS).double()
    # arXiv:2303.09556, section 3.4: min(SNR, gamma) on the error of x0, rewritten for the error of
    # epsilon (x0's is 1/SNR of it) and of v (x0's is 1/(SNR + 1) of it).
    on_x0 = torch.minimum(snr, torch.tensor(gamma, dtype=torch.float64))
    expected = on_x0 / (snr if prediction_type == "epsilon" else snr + 1)
    torch.testing.assert_close(
        weights_by_timestep(prediction_type, gamma).double(), expected, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_without_min_snr_all_timesteps_weigh_alike(prediction_type):
    assert torch.equal(weights_by_timestep(prediction_type, 0.0), torch.ones(1000))


def test_an_exact_v_prediction_recovers_the_latents_through_diffusers():
    latents, noise = randn(4, 4, 3, 3, seed=4), randn(4, 4, 3, 3, seed=5)
    objective, theirs = Objective("v_prediction", 0.0, CPU), scheduler_of("v_prediction")
    for timestep in (0, 500, 999):
        timesteps = torch.full((4,), timestep)
        noisy = objective.add_noise(latents, noise, timesteps)
        target = objective.target(latents, noise, timesteps)
        recovered = theirs.step(target, timestep, noisy).pred_original_sample
        torch.testing.assert_close(recovered, latents, rtol=1e-3, atol=1e-4)


def test_the_loss_weighs_each_sample_by_its_own_timestep_in_float32():
    objective = Objective("v_prediction", 5.0, CPU)
    weights = weights_by_timestep("v_prediction", 5.0)
    prediction, target = randn(3, 4, 2, 2, seed=6).bfloat16(), randn(3, 4, 2, 2, seed=7)
    timesteps = torch.tensor([0, 400, 999])
    per_sample = (prediction.double() - target.double()).square().mean(dim=(1, 2, 3))
    expected = (weights[timesteps].double() * per_sample).mean()
    loss = objective.loss(prediction, target, timesteps)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_saved_scheduler_is_the_schedule_of_training(tmp_path, prediction_type):
    save_scheduler(tmp_path / "scheduler", prediction_type)
    loaded = DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert loaded.config.prediction_type == prediction_type
    assert torch.equal(loaded.alphas_cumprod, scheduler_of("epsilon").alphas_cumprod)
