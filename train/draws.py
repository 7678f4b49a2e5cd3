"""Everything random in a step, as a pure function of (seed, step, position in the global batch).

One generator per step draws for the *whole* global batch and each rank keeps its rows, so noise,
timesteps, posterior draws and **caption dropout** are the same on any number of processes and for
any split into micro-batches, and a resumed run needs no generator state. Equal draws hold on one
kind of device; CPU and CUDA generators differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Draws:
    """One rank's draws of one step; B is the number of its rows.

    Args:
        posterior_noise: [B, C, h, w], picks the latents from the VAE's posterior.
        noise: [B, C, h, w], what is added to the latents; offset noise included.
        timesteps: [B] int64 in [0, num_train_timesteps).
        drop_caption: [B] bool, whose caption becomes the empty one in this step.
    """

    posterior_noise: Tensor
    noise: Tensor
    timesteps: Tensor
    drop_caption: Tensor


def draw(
    *,
    seed: int,
    step: int,
    positions: range,
    global_batch_size: int,
    latent_shape: tuple[int, int, int],
    num_train_timesteps: int,
    caption_drop_prob: float,
    device: torch.device,
    timestep_sampling: str = "uniform",
    offset_noise: float = 0.0,
) -> Draws:
    """Draw for one step.

    Args:
        seed: of the run.
        step: number of the update, from 0.
        positions: the rows of the global batch to keep.
        global_batch_size: rows over all processes.
        latent_shape: [C, h, w].
        num_train_timesteps: of the noise schedule.
        caption_drop_prob: probability of dropping a caption.
        device: where the tensors are drawn.
        timestep_sampling: `uniform`; `sobol`, see `_sobol_timesteps`; or `logit-normal`, the
            sigmoid of a standard normal (arXiv:2403.03206, section 3.1).
        offset_noise: deviation of the part of the noise that is constant over each channel.
    """
    generator = torch.Generator(device)
    (state,) = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
    generator.manual_seed(int(state >> np.uint64(1)))  # torch takes 63 bits without a sign
    rows = slice(positions.start, positions.stop)
    full = (global_batch_size, *latent_shape)
    # Always drawn in this order, all of it: switching one feature on must not move the others.
    posterior_noise = torch.randn(full, generator=generator, device=device)
    noise = torch.randn(full, generator=generator, device=device)
    timesteps = torch.randint(
        num_train_timesteps, (global_batch_size,), generator=generator, device=device
    )
    uniform = torch.rand(global_batch_size, generator=generator, device=device)
    offset = torch.randn((*full[:2], 1, 1), generator=generator, device=device)
    normal = torch.randn(global_batch_size, generator=generator, device=device)
    order = torch.randperm(global_batch_size, generator=generator, device=device)
    if timestep_sampling == "sobol":
        first = step * global_batch_size
        timesteps = _sobol_timesteps(seed, first + order, num_train_timesteps)
    elif timestep_sampling == "logit-normal":
        timesteps = (normal.sigmoid() * num_train_timesteps).long()
    else:
        assert timestep_sampling == "uniform"
    return Draws(
        posterior_noise=posterior_noise[rows],
        noise=noise[rows] + offset_noise * offset[rows],
        timesteps=timesteps[rows],
        drop_caption=uniform[rows] < caption_drop_prob,
    )


def _sobol_timesteps(seed: int, index: Tensor, num_train_timesteps: int) -> Tensor:
    """Points of one quasi-random sequence over the whole run, as timesteps.

    The first dimension of Sobol's sequence, which is van der Corput's: the 32 bits of the index
    mirrored at the point; then a digital shift that depends on the seed. Any consecutive points
    spread evenly, so each batch does, and each block of steps. The points repeat after 2**32.

    Args:
        seed: of the run.
        index: [G] int64, places in the sequence.
        num_train_timesteps: of the noise schedule.

    Returns:
        [G] int64.
    """
    # A spawned sequence, because SeedSequence(seed) is the one that step 0 draws from.
    (shift,) = np.random.SeedSequence(seed, spawn_key=(0,)).generate_state(1, np.uint32)
    bit = torch.arange(32, device=index.device)
    fraction = (((index[:, None] >> bit) & 1) << (31 - bit)).sum(dim=1)
    return ((fraction ^ int(shift)) * num_train_timesteps) >> 32
