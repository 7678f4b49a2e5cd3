"""Calls of a pipeline, timed whole and by part."""

from __future__ import annotations

import io
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.latency.arms import Arm

PARTS = ("text_sec", "denoise_sec", "vae_sec", "png_sec")
PNG_LEVEL = 1  # as the server has it
_PROMPTS = ("a large red circle above a small blue square", "a lion", "a boat at dawn", "a leaf")


@dataclass(frozen=True, kw_only=True)
class Call:
    """What every arm is asked for.

    Args:
        batch: images.
        height: pixels.
        width: pixels.
        steps: of the sampler.
        guidance: scale.
    """

    batch: int
    height: int
    width: int
    steps: int
    guidance: float

    @property
    def prompts(self) -> list[str]:
        """One for each image."""
        return [_PROMPTS[number % len(_PROMPTS)] for number in range(self.batch)]

    def arguments(self) -> dict[str, Any]:
        """Of the pipeline, but for prompts and what comes out; seed n for the n-th image."""
        import torch

        return {
            "generator": [torch.Generator("cpu").manual_seed(n) for n in range(self.batch)],
            "height": self.height,
            "width": self.width,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
        }


def time_call(arm: Arm, call: Call) -> tuple[float, list[np.ndarray]]:
    """Seconds from prompts to pixels in the host's memory, and the images [H, W, 3] uint8."""
    from serve.image_diff import to_uint8

    with arm.settings():
        _synchronise(arm)
        began = perf_counter()
        output = arm.pipeline(
            call.prompts,
            negative_prompt=[""] * call.batch,
            output_type="pt",
            **call.arguments(),
        )
        images = to_uint8(output.images)  # waits for the device
        return perf_counter() - began, images


def time_parts(arm: Arm, call: Call) -> dict[str, float]:
    """Seconds of each of `PARTS`, the device waited for after each; all images of the call."""
    import torch

    from serve.image_diff import to_uint8

    pipeline, times = arm.pipeline, [_now(arm)]
    with arm.settings(), torch.no_grad():
        states, negative = pipeline.encode_prompt(
            call.prompts, pipeline.device, 1, call.guidance > 1, [""] * call.batch
        )
        times.append(_now(arm))
        latents = pipeline(
            prompt_embeds=states,
            negative_prompt_embeds=negative,
            output_type="latent",
            **call.arguments(),
        ).images
        times.append(_now(arm))
        latents = latents / pipeline.vae.config.scaling_factor
        pixels = pipeline.vae.decode(latents, return_dict=False)[0]
        images = to_uint8((pixels / 2 + 0.5).clamp(0, 1))
        times.append(_now(arm))
    for image in images:
        _png(image)
    times.append(_now(arm))
    return {name: end - start for name, start, end in zip(PARTS, times, times[1:], strict=False)}


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def _now(arm: Arm) -> float:
    _synchronise(arm)
    return perf_counter()


def _synchronise(arm: Arm) -> None:
    import torch

    if arm.pipeline.device.type == "cuda":
        torch.cuda.synchronize(arm.pipeline.device)
