"""Images for prompts: one seed per image, so that none depends on its batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from shards.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are sampled, beside the pipeline and its scheduler.

    Args:
        num_steps: of the sampler.
        guidance_scale: of classifier-free guidance; 1 is off.
        guidance_rescale: share of the guided prediction whose deviation is brought back to that of
            the conditional one (arXiv:2305.08891, section 3.4).
        negative_prompt: what images are guided away from; by default the null condition.
        width: in pixels; 0: the U-Net's own.
        height: in pixels; 0: the U-Net's own.

    Raises:
        UserError: a value that cannot be meant, or a negative prompt without guidance, which would
            do nothing.
    """

    num_steps: int = 20
    guidance_scale: float = 3.0
    guidance_rescale: float = 0.0
    negative_prompt: str = ""
    width: int = 0
    height: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("num_steps", 1, math.inf),
            ("guidance_scale", 0, 1e4),
            ("guidance_rescale", 0, 1),
            ("width", 0, math.inf),
            ("height", 0, math.inf),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                wanted = f"at least {least}" if most == math.inf else f"{least} to {most:g}"
                raise UserError(f"--{name.replace('_', '-')}", f"{value}", wanted=wanted)
        if self.negative_prompt and self.guidance_scale <= 1:
            found = f"has no effect at a guidance scale of {self.guidance_scale}"
            raise UserError("negative prompt", found, wanted="more than 1")

    def check_fits(self, pipeline: Any) -> None:
        """Refuse what a pipeline cannot do.

        Raises:
            UserError: more steps than its schedule has timesteps, or a size without latents.
        """
        self.size_for(pipeline)
        most = pipeline.scheduler.config.num_train_timesteps
        if self.num_steps > most:
            raise UserError("--num-steps", f"{self.num_steps}", wanted=f"at most {most}")

    def size_for(self, pipeline: Any) -> tuple[int, int]:
        """Height and width in pixels.

        Raises:
            UserError: the VAE has no latents of this size.
        """
        factor = pipeline.vae_scale_factor
        own = pipeline.unet.config.sample_size
        own_height, own_width = (own, own) if isinstance(own, int) else own
        size = self.height or own_height * factor, self.width or own_width * factor
        step = max(factor, 8)  # diffusers asks for multiples of 8 whatever the VAE
        for name, side in zip(("--height", "--width"), size, strict=True):
            if side % step:
                raise UserError(name, f"{side}", wanted=f"a multiple of {step}")
        return size


def sample_batch(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling
) -> list[np.ndarray]:
    """Images [H, W, 3] uint8 of one batch, the n-th from the noise of the n-th seed.

    The noise is drawn in float32 on the CPU whatever the pipeline runs in, so that another device
    or precision changes an image by its rounding alone.

    Args:
        pipeline: from `load_pipeline`.
        prompts: one for each image.
        seeds: likewise.
        sampling: how.

    Raises:
        UserError: an image is not finite, or the pipeline cannot do it.
    """
    import torch

    sampling.check_fits(pipeline)
    height, width = sampling.size_for(pipeline)
    factor = pipeline.vae_scale_factor
    shape = (1, pipeline.unet.config.in_channels, height // factor, width // factor)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    # SDXL's own null condition is no text at all, zeros; for the others None is the empty prompt.
    negative = [sampling.negative_prompt] * len(prompts) if sampling.negative_prompt else None
    output = pipeline(
        list(prompts),
        negative_prompt=negative,
        height=height,
        width=width,
        latents=noise.to(pipeline.unet.dtype),
        generator=generators,  # of samplers that draw noise at every step
        num_inference_steps=sampling.num_steps,
        guidance_scale=sampling.guidance_scale,
        guidance_rescale=sampling.guidance_rescale,
        output_type="np",
    )
    return [_to_uint8(*pair) for pair in zip(output.images, prompts, strict=True)]


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    batch_size: int = 50,
    **sampling: Any,
) -> list[np.ndarray]:
    """Images [H, W, 3] uint8, one for each prompt; all of them in memory, see `generate_folder`.

    Args:
        pipeline: from `load_pipeline`.
        prompts: one for each image.
        seed: the n-th image starts from the noise of seed + n.
        batch_size: images at a time.
        sampling: fields of `Sampling`.

    Raises:
        UserError: see `sample_batch`.
    """
    how = Sampling(**sampling)
    images: list[np.ndarray] = []
    with tqdm(total=len(prompts), unit="img", desc="sampling", disable=None) as bar:
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            seeds = range(seed + start, seed + start + len(part))
            images += sample_batch(pipeline, part, seeds, how)
            bar.update(len(part))
    return images


def _to_uint8(pixels: np.ndarray, prompt: str) -> np.ndarray:
    """From [0, 1]; what is not a number would come out as black."""
    if not np.isfinite(pixels).all():
        raise UserError(
            f"prompt {prompt!r}",
            "its image has pixels that are not numbers",
            remedy="the weights have diverged: sample an earlier checkpoint; or, in half "
            "precision, they overflow: --dtype float32",
        )
    return (pixels * 255).round().astype(np.uint8)
