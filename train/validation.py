"""The loss of samples that are never trained on, by timestep.

The training loss hides what is learnt: most of its spread comes from which timesteps were drawn.
Here samples, timesteps and noise are the same each time, so that two figures can be compared, and
those of two runs as well (arXiv:2403.03206 ranks models by such a loss).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from shards.batch import LatentBatch
from train.draws import Draws
from train.transfer import to_device

if TYPE_CHECKING:
    from train.trainer import Trainer

NUM_BINS = 10  # equal parts of the schedule
_NAMES = ("val/loss", "val/ema_loss")
_SEED = 20_240_305  # not the run's: its samples, timesteps and noise are those of every run

HeldOut = Callable[[int, int, int], Iterator[LatentBatch]]


class Validation:
    """An `Observer` that measures the loss of held-out samples, once in each part of the schedule.

    Every sample is evaluated at one timestep of each bin. Timestep, noise and posterior draw are a
    function of the sample's index and the bin, captions stay, and the loss is the objective's own,
    weighted as in training. So the figures depend neither on the number of processes nor on the
    micro-batch, but for rounding. All forward passes have the shape of training's.

    Args:
        held_out: `held_out(first, last, batch_size)` yields samples `first` to `last - 1` of those
            held out, in a fixed order, in batches of `batch_size` but for the last.
        num_samples: held-out samples, over all processes.
        every: steps between two measurements; 0: at the end alone.
    """

    def __init__(self, held_out: HeldOut, num_samples: int, *, every: int) -> None:
        assert num_samples > 0
        self.every = every
        self._held_out, self._num_samples = held_out, num_samples

    def observe(self, trainer: Trainer) -> dict[str, float]:
        """`val/loss`, `val/loss_t000-099`, …; `val/ema_loss` and so on of averaged weights.

        Sharded weights are not swapped for their average: their pieces lie apart.
        """
        figures = self._figures(trainer, _NAMES[0])
        if trainer.model.average is not None and trainer.config.sharding == "off":
            with _swapped(trainer.model.weights.in_module, trainer.model.average.weights):
                figures |= self._figures(trainer, _NAMES[1])
        losses = [f"{name} {figures[name]:.4f}" for name in _NAMES if name in figures]
        trainer.accelerator.print(f"step {trainer.step} | {' | '.join(losses)}")
        return figures

    def _figures(self, trainer: Trainer, name: str) -> dict[str, float]:
        sums = trainer.accelerator.reduce(self._loss_sums(trainer), "sum")
        means: list[float] = (sums / self._num_samples).tolist()
        edges = _bin_edges(trainer.model.objective.num_train_timesteps)
        by_bin = {
            f"{name}_t{first:03d}-{last - 1:03d}": mean
            for first, last, mean in zip(edges[:-1], edges[1:], means, strict=True)
        }
        return {name: sum(means) / NUM_BINS, **by_bin}

    @torch.no_grad()
    def _loss_sums(self, trainer: Trainer) -> Tensor:
        """[NUM_BINS], sums over this process's samples."""
        sums = torch.zeros(NUM_BINS, device=trainer.device)
        with _evaluating(trainer.model.loss_module):
            for batch, numbers, counted_rows in self._batches(trainer):
                rows = torch.from_numpy(numbers - numbers[0]).to(trainer.device)
                counted = torch.from_numpy(counted_rows).to(trainer.device)
                moments = to_device(batch.moments, trainer.device)[rows]
                states = to_device(batch.states, trainer.device)[rows]
                shape = (trainer.model.unet_config["in_channels"], *moments.shape[2:])
                drawn = draw_held_out(numbers, shape, trainer.model.objective.num_train_timesteps)
                for number, draws in enumerate(drawn):
                    inputs = _in_order_of_forward(draws, trainer.device)
                    losses = trainer.model.loss_module(moments, states, *inputs)
                    sums[number] += losses[counted].sum()
        return sums

    def _batches(self, trainer: Trainer) -> Iterator[tuple[LatentBatch, np.ndarray, np.ndarray]]:
        """This process's batches, the samples of a forward pass's rows, and which rows count.

        All processes make as many passes (sharded weights are gathered together): the last shares
        begin earlier and a last batch repeats its rows, which then do not count.
        """
        accelerator = trainer.accelerator
        share = -(-self._num_samples // accelerator.num_processes)
        own = share * accelerator.process_index
        start = min(own, self._num_samples - share)
        place = np.arange(trainer.micro_batch_size)
        batches = self._held_out(start, start + share, trainer.micro_batch_size)
        for batch in batches:
            size = len(batch.samples)
            numbers = start + place % size
            yield batch, numbers, np.flatnonzero((place < size) & (numbers >= own))
            start += size


def draw_held_out(
    numbers: np.ndarray, latent_shape: tuple[int, ...], num_train_timesteps: int
) -> list[Draws]:
    """The fixed draws of held-out samples.

    Args:
        numbers: [B], their places among those held out.
        latent_shape: [C, h, w].
        num_train_timesteps: of the noise schedule.

    Returns:
        for each bin the draws of all B, on the CPU, whose generator is the same everywhere.
    """
    edges = _bin_edges(num_train_timesteps)
    width = edges[1]
    shape = (NUM_BINS, *latent_shape)
    noise, posterior_noise = torch.empty(2, len(numbers), *shape).unbind()
    offsets = torch.empty(len(numbers), NUM_BINS, dtype=torch.int64)
    for row, number in enumerate(numbers.tolist()):
        generator = torch.Generator().manual_seed(_SEED + number)
        offsets[row] = torch.randint(width, (NUM_BINS,), generator=generator)
        torch.randn(shape, generator=generator, out=noise[row])
        torch.randn(shape, generator=generator, out=posterior_noise[row])
    return [
        Draws(
            posterior_noise=posterior_noise[:, number],
            noise=noise[:, number],
            timesteps=edges[number] + offsets[:, number],
            drop_caption=torch.zeros(len(numbers), dtype=torch.bool),
        )
        for number in range(NUM_BINS)
    ]


def _bin_edges(num_train_timesteps: int) -> list[int]:
    assert num_train_timesteps % NUM_BINS == 0
    return list(range(0, num_train_timesteps + 1, num_train_timesteps // NUM_BINS))


def _in_order_of_forward(draws: Draws, device: torch.device) -> list[Tensor]:
    """As `DiffusionLoss.forward` takes them after moments and states."""
    tensors = (draws.posterior_noise, draws.noise, draws.timesteps, draws.drop_caption)
    return [tensor.contiguous().to(device) for tensor in tensors]


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout, if the U-Net has any."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


@contextmanager
def _swapped(own: dict[str, Tensor], weights: dict[str, Tensor]) -> Iterator[None]:
    """Other weights in the place of a U-Net's own.

    Copied in and out: another set of tensors would make compiled code compile once more, and a
    recorded step would not know of it.
    """
    kept = [weight.clone() for weight in own.values()]
    try:
        torch._foreach_copy_(list(own.values()), [weights[name] for name in own])
        yield
    finally:
        torch._foreach_copy_(list(own.values()), kept)
