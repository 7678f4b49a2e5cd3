"""A `StableDiffusionPipeline` whose schedule stays on the host.

This module imports diffusers: import it where a pipeline is at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import StableDiffusionPipeline
from torch import Tensor


class FastPipeline(StableDiffusionPipeline):
    """The same pipeline, which computes float32 latents and never waits for a denoising step.

    diffusers keeps timesteps on the device and asks for them where its samplers look up their
    tables, which are on the host: three to thirteen waits a step with PNDM, DDIM and DDPM, two in
    the first step of the others. Here the timesteps are on the host as well. What remains is the
    noise that ancestral samplers draw from generators of the CPU, as the caller wants it.
    """

    def __call__(self, *args: Any, **settings: Any) -> Any:
        """See `StableDiffusionPipeline`; any scheduler, number of steps, size and batch."""
        with _schedule_on_host(self.scheduler):
            return super().__call__(*args, **settings)

    def encode_prompt(self, *args: Any, **settings: Any) -> tuple[Tensor | None, Tensor | None]:
        """In float32: it is the type of the states that latents and their noise have."""
        states, negative = super().encode_prompt(*args, **settings)
        return states.float(), None if negative is None else negative.float()


@contextmanager
def _schedule_on_host(scheduler: Any) -> Iterator[None]:
    own = scheduler.set_timesteps

    def set_timesteps(*args: Any, device: Any = None, **settings: Any) -> None:
        own(*args, device="cpu", **settings)

    scheduler.set_timesteps = set_timesteps
    try:
        yield
    finally:
        del scheduler.set_timesteps
