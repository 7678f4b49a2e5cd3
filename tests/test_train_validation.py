from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers_train import LATENT_SHAPE, MemoryBatches, write_unet
from torch import Tensor, nn

from shards.batch import LatentBatch
from train.config import TrainConfig
from train.diffusion_loss import DiffusionLoss
from train.objective import Objective
from train.unet import build_unet, load_unet_config
from train.validation import NUM_BINS, Validation, draw_held_out

NUM_SAMPLES = 7
CPU = torch.device("cpu")
SOURCE = MemoryBatches(NUM_SAMPLES)


def held_out(first: int, last: int, batch_size: int) -> Iterator[LatentBatch]:
    assert 0 <= first < last <= NUM_SAMPLES
    for start in range(first, last, batch_size):
        samples = np.arange(start, min(start + batch_size, last))
        yield LatentBatch(
            step=0, samples=samples, moments=SOURCE.moments[samples], states=SOURCE.states[samples]
        )


class Calls(nn.Module):
    """Stands in the place of `DiffusionLoss`; each sample's loss says which sample it is."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = nn.Module()
        self.inputs: list[tuple[Tensor, ...]] = []

    def forward(self, moments: Tensor, *others: Tensor) -> Tensor:
        self.inputs.append((moments, *others))
        numbers = [
            np.flatnonzero((SOURCE.moments == row.numpy()).all((1, 2, 3)))[0] for row in moments
        ]
        return 10.0 ** torch.tensor(numbers)  # a digit for each sample: sums tell who was counted


@pytest.fixture(scope="module")
def unet_path(tmp_path_factory) -> str:
    return write_unet(tmp_path_factory.mktemp("unet") / "unet.json")


@pytest.fixture
def loss_module(unet_path) -> DiffusionLoss:
    unet = build_unet(load_unet_config(unet_path), 8, seed=0)
    objective = Objective(TrainConfig(), CPU)
    return DiffusionLoss(unet, objective, torch.from_numpy(SOURCE.null_states), 0.2)


def trainer_of(module: nn.Module, *, process: int = 0, of: int = 1, **facts: Any) -> Any:
    accelerator = SimpleNamespace(
        process_index=process, num_processes=of, reduce=lambda sums, how: sums, print=print
    )
    given: dict[str, Any] = {
        "step": 30,
        "accelerator": accelerator,
        "loss_module": module,
        "objective": Objective(TrainConfig(), CPU),
        "device": CPU,
        "config": TrainConfig(),
        "unet_config": {"in_channels": LATENT_SHAPE[0]},
        "average": None,
    }
    given |= facts
    in_model = ("loss_module", "objective", "unet_config", "average")
    model = SimpleNamespace(**{name: given[name] for name in in_model})
    own = {name: p.detach() for name, p in module.unet.named_parameters()}
    model.weights = SimpleNamespace(in_module=own)
    return SimpleNamespace(**given, model=model)


def figures_of(trainer: Any, micro_batch_size: int = 4) -> dict[str, float]:
    trainer.micro_batch_size = micro_batch_size
    validation = Validation(held_out, NUM_SAMPLES, every=5)
    return validation.observe(trainer)


def reduced(module: nn.Module, of: int, micro_batch_size: int) -> dict[str, float]:
    """Figures of several processes, one after the other: they are sums over each one's share."""
    parts = [
        figures_of(trainer_of(module, process=process, of=of), micro_batch_size)
        for process in range(of)
    ]
    return {name: sum(part[name] for part in parts) for name in parts[0]}


NAMES = {"val/loss"} | {f"val/loss_t{100 * b:03d}-{100 * b + 99:03d}" for b in range(NUM_BINS)}


@pytest.mark.parametrize("of", [1, 2, 3, 4, 5, 7, 9])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 7, 10])
def test_every_sample_counts_once_in_every_bin(of, micro_batch_size):
    figures = reduced(Calls(), of, micro_batch_size)
    assert figures.keys() == NAMES
    for name, mean in figures.items():
        assert mean * NUM_SAMPLES == pytest.approx(1_111_111), name


@pytest.mark.parametrize("of", [2, 3, 5])
def test_all_processes_make_the_same_forward_passes(of):
    shapes = []
    for process in range(of):
        calls = Calls()
        figures_of(trainer_of(calls, process=process, of=of), micro_batch_size=2)
        shapes.append([tuple(tensor.shape for tensor in inputs) for inputs in calls.inputs])
    assert all(other == shapes[0] for other in shapes)
    assert len(set(shapes[0])) == 1, "one shape, the micro-batch of training"
    assert shapes[0][0][0][0] == 2


def test_timesteps_cover_their_bins_and_nothing_else():
    drawn = draw_held_out(np.arange(2000), (1, 1, 1), 1000)
    for number, draws in enumerate(drawn):
        found = set(draws.timesteps.tolist())
        assert found == set(range(100 * number, 100 * number + 100))
        assert not draws.drop_caption.any()


def test_draws_depend_on_the_sample_and_the_bin_alone():
    torch.manual_seed(1)
    together = draw_held_out(np.array([3, 4, 5]), LATENT_SHAPE, 1000)
    torch.manual_seed(2)
    alone = draw_held_out(np.array([5]), LATENT_SHAPE, 1000)
    for one, other in zip(together, alone, strict=True):
        for name in ("posterior_noise", "noise", "timesteps"):
            assert torch.equal(getattr(one, name)[2:], getattr(other, name))
    noises = [noise for d in together for noise in (*d.noise, *d.posterior_noise)]
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == len(noises)
    everything = torch.stack(noises)
    assert abs(everything.mean()) < 0.02
    assert abs(everything.std() - 1) < 0.02


def test_what_the_model_is_given_is_what_was_drawn():
    calls = Calls()
    figures_of(trainer_of(calls), micro_batch_size=NUM_SAMPLES)
    drawn = draw_held_out(np.arange(NUM_SAMPLES), LATENT_SHAPE, 1000)
    for inputs, draws in zip(calls.inputs, drawn, strict=True):
        moments, states, posterior_noise, noise, timesteps, drop_caption = inputs
        assert np.array_equal(moments, SOURCE.moments)
        assert np.array_equal(states, SOURCE.states)
        assert torch.equal(posterior_noise, draws.posterior_noise)
        assert torch.equal(noise, draws.noise)
        assert torch.equal(timesteps, draws.timesteps)
        assert not drop_caption.any()


@pytest.mark.parametrize(("of", "micro_batch_size"), [(1, 1), (1, 3), (2, 2), (3, 7)])
def test_figures_do_not_depend_on_processes_and_micro_batch(loss_module, of, micro_batch_size):
    expected = figures_of(trainer_of(loss_module), NUM_SAMPLES)
    assert reduced(loss_module, of, micro_batch_size) == pytest.approx(expected, rel=1e-5)
    by_bin = [value for name, value in expected.items() if name != "val/loss"]
    assert expected["val/loss"] == pytest.approx(sum(by_bin) / NUM_BINS)
    assert max(by_bin) > 1.01 * min(by_bin), "bins differ"


def test_the_loss_is_weighted_as_in_training(unet_path, loss_module):
    plain = figures_of(trainer_of(loss_module))
    loss_module.objective = Objective(TrainConfig(min_snr_gamma=5.0), CPU)
    weighted = figures_of(trainer_of(loss_module))
    assert weighted["val/loss_t000-099"] < 0.5 * plain["val/loss_t000-099"]
    assert weighted["val/loss_t900-999"] == pytest.approx(plain["val/loss_t900-999"])


def state_of(module: nn.Module) -> dict[str, bytes]:
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    grads = {f"{n}.grad": p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {name: tensor.detach().numpy().tobytes() for name, tensor in (held | grads).items()}


@pytest.mark.parametrize("training", [True, False])
def test_the_run_is_left_as_it_was(loss_module, training):
    loss_module.train(training)
    for number, parameter in enumerate(loss_module.parameters()):
        parameter.grad = torch.full_like(parameter, number)
    average = {n: torch.zeros_like(p) for n, p in loss_module.unet.named_parameters()}
    before, pointers = state_of(loss_module), [p.data_ptr() for p in loss_module.parameters()]
    torch.manual_seed(5)
    rng = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    figures_of(trainer_of(loss_module, average=SimpleNamespace(weights=average)))
    assert state_of(loss_module) == before
    assert [p.data_ptr() for p in loss_module.parameters()] == pointers
    assert all(module.training == training for module in loss_module.modules())
    assert all(parameter.requires_grad for parameter in loss_module.parameters())
    assert torch.equal(torch.random.get_rng_state(), rng[0])
    assert np.array_equal(np.random.get_state()[1], rng[1])  # noqa: NPY002
    assert torch.is_grad_enabled()


def test_weights_are_put_back_when_a_measurement_fails(loss_module):
    before = state_of(loss_module)
    average = {n: torch.zeros_like(p) for n, p in loss_module.unet.named_parameters()}
    trainer = trainer_of(loss_module, average=SimpleNamespace(weights=average))
    answers = iter([lambda sums: sums, None])

    def reduce(sums: Tensor, how: str) -> Tensor:
        answer = next(answers)
        if answer is None:
            raise ConnectionError("another process died")
        return answer(sums)

    trainer.accelerator.reduce = reduce
    with pytest.raises(ConnectionError):
        figures_of(trainer)
    assert state_of(loss_module) == before
    assert loss_module.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_figures_of_the_average_are_those_of_a_model_with_these_weights(
    unet_path, loss_module, dtype
):
    loss_module.unet.to(dtype)
    loss_module.dtype = dtype
    other = build_unet(load_unet_config(unet_path), 8, seed=1)
    average = SimpleNamespace(weights={n: p.detach() for n, p in other.named_parameters()})
    figures = figures_of(trainer_of(loss_module, average=average))
    assert {name for name in figures if "ema" not in name} == NAMES
    loss_module.unet = other.to(dtype)
    expected = figures_of(trainer_of(loss_module))
    assert {name.replace("ema_", ""): v for name, v in figures.items() if "ema" in name} == expected
    assert expected["val/loss"] != pytest.approx(figures["val/loss"])


def test_the_means_are_said(capsys):
    figures = figures_of(trainer_of(Calls()))
    assert capsys.readouterr().out == f"step 30 | val/loss {figures['val/loss']:.4f}\n"


def test_sharded_weights_are_not_swapped(loss_module):
    average = SimpleNamespace(weights={})  # of pieces: nothing fits
    config = TrainConfig(sharding="zero2")
    figures = figures_of(trainer_of(loss_module, average=average, config=config))
    assert figures.keys() == NAMES


def test_the_loss_of_a_memorised_set_falls(loss_module):
    untrained = figures_of(trainer_of(loss_module))
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=2e-3)
    moments, states = torch.from_numpy(SOURCE.moments), torch.from_numpy(SOURCE.states)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        noise = torch.randn(2, NUM_SAMPLES, *LATENT_SHAPE, generator=generator)
        timesteps = torch.randint(1000, (NUM_SAMPLES,), generator=generator)
        kept = torch.zeros(NUM_SAMPLES, dtype=torch.bool)
        loss_module(moments, states, *noise, timesteps, kept).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = figures_of(trainer_of(loss_module))
    assert trained["val/loss"] < 0.7 * untrained["val/loss"]
    assert trained["val/loss_t900-999"] < trained["val/loss_t000-099"], "much noise is easy to see"
    assert figures_of(trainer_of(loss_module)) == trained


def test_weights_that_are_not_numbers_show(loss_module):
    with torch.no_grad():
        loss_module.unet.conv_out.bias.fill_(torch.nan)
    assert all(np.isnan(value) for value in figures_of(trainer_of(loss_module)).values())
