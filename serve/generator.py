"""One device's pipeline: a batch of image tasks in, pictures out."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING, Any

from evaluate.schedulers import build_scheduler
from serve.job import ImageTask
from serve.pace import Pace, pace_of
from serve.refusal import RefusedError
from serve.tokens import cut_warning, max_tokens_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from serve.safety import SafetyChecker


@dataclass(frozen=True)
class ModelFacts:
    """What the model says about itself."""

    width: int
    height: int
    size_multiple: int
    max_tokens: int
    num_train_timesteps: int


@dataclass(frozen=True, eq=False)
class Picture:
    """What became of a task; `flagged` is None without a safety checker.

    Args:
        pixels: [H, W, 3] uint8; all zero where it is flagged.
    """

    pixels: np.ndarray
    flagged: bool | None
    warnings: tuple[str, ...]

    def to_png(self) -> bytes:
        """The file, at the lowest level of compression.

        At 512 pixels that took 34 to 79 percent of the default level's time, which is about 100 ms,
        for 9 to 25 percent more bytes.
        """
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


class AbandonedError(Exception):
    """Nobody waits for any image of the batch any more."""


class Generator:
    """Batches through one diffusers pipeline; used by one thread alone.

    Args:
        pipeline: diffusers `StableDiffusionPipeline`, on its device.
        checker: finds images that are not to be shown.
        device: where the pipeline is.
    """

    def __init__(
        self, pipeline: Any, checker: SafetyChecker | None = None, device: str = "cpu"
    ) -> None:
        self._pipeline, self._checker, self._device = pipeline, checker, device
        self._schedule = pipeline.scheduler.config

    @property
    def facts(self) -> ModelFacts:
        """Sizes and limits of the model."""
        pipeline = self._pipeline
        size = pipeline.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        factor = pipeline.vae_scale_factor
        return ModelFacts(
            width=width * factor,
            height=height * factor,
            size_multiple=lcm(8, factor),  # 8 is what the pipeline itself asks for
            max_tokens=max_tokens_of(pipeline),
            num_train_timesteps=self._schedule["num_train_timesteps"],
        )

    def generate(self, batch: Sequence[ImageTask]) -> list[Picture | RefusedError]:
        """The pictures of tasks of one kind, each from the noise of its own seed.

        The noise is drawn on the CPU and for each image alone, so that neither its company nor the
        device changes an image by more than rounding.

        Returns:
            for each task its picture, or why there is none.

        Raises:
            AbandonedError: at the end of the step after which nobody waited any more.
            torch.OutOfMemoryError: the batch is too large for the device.
        """
        import torch

        kind = batch[0].kind
        self._pipeline.scheduler = build_scheduler(kind.scheduler, self._schedule)
        pace = pace_of(self._device)
        output = self._pipeline(
            [task.prompt for task in batch],
            negative_prompt=[task.job.request.negative_prompt for task in batch],
            generator=[torch.Generator("cpu").manual_seed(task.seed) for task in batch],
            width=kind.width,
            height=kind.height,
            num_inference_steps=kind.steps,
            guidance_scale=kind.guidance,
            output_type="pt",
            callback_on_step_end=lambda *_: _go_on(batch, pace),
            callback_on_step_end_tensor_inputs=[],
        )
        return self._answers(batch, output.images)

    def _answers(self, batch: Sequence[ImageTask], images: Tensor) -> list[Picture | RefusedError]:
        """Pictures of images [B, 3, H, W] in [0, 1]."""
        import torch

        is_finite = torch.isfinite(images).flatten(1).all(1).tolist()
        pixels = (images.float().nan_to_num(0.0) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        pictures = pixels.contiguous().cpu().numpy()
        flags = None if self._checker is None else self._checker(pictures)
        answers: list[Picture | RefusedError] = []
        for row, task in enumerate(batch):
            if is_finite[row]:
                flagged = None if flags is None else bool(flags[row])
                shown = pictures[row] * (not flagged)
                answers.append(Picture(shown, flagged, self._warnings(task)))
            else:
                answers.append(_not_finite(task))
        return answers

    def _warnings(self, task: ImageTask) -> tuple[str, ...]:
        negative_prompt = task.job.request.negative_prompt
        name = "prompt" if len(task.job.request.prompts) == 1 else f"prompt[{task.index}]"
        texts = [(name, task.prompt), ("negative_prompt", negative_prompt)]
        warnings = [cut_warning(self._pipeline, *text) for text in texts]
        if negative_prompt and task.kind.guidance <= 1:
            warnings.append("negative_prompt has no effect without guidance (more than 1)")
        return tuple(warning for warning in warnings if warning)


def _go_on(batch: Sequence[ImageTask], pace: Pace | None) -> dict[str, Any]:
    """Called after each denoising step."""
    if pace:
        pace.step()
    if all(task.job.is_over for task in batch):
        raise AbandonedError
    return {}


def _not_finite(task: ImageTask) -> RefusedError:
    message = f"the image of seed {task.seed} has pixels that are not numbers"
    return RefusedError(500, "not_finite", message)
