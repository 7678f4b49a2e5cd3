"""Sample grids of a run in progress: the same prompts from the same noise, step after step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from evaluate.grid import draw_grid, write_png
from evaluate.prompts import read_prompts
from evaluate.run_pipeline import RunPipeline
from evaluate.sample import generate
from shards.errors import StorageError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from train.config import TrainConfig
    from train.trainer import Trainer

_BATCH_SIZE = 8  # beside a model in training there is less memory than usual


class SampleGrids:
    """An `Observer` that draws a grid of images from the weights, and one from their average.

    Writes `<run>/samples/000300.png` and `000300-ema.png`, and at the end of the run the last of
    them as `<run>/samples.png` as well. A model that cannot be loaded here is no reason to stop a
    run: it is said once.

    Args:
        config: the run's: `num_samples` images, the n-th from the noise of seed + n.
        model: model folder or hub id of VAE and text encoder.
        captions: prompts where `config.sample_prompts` names none. Prompts are taken in turn.

    Raises:
        UserError: prompts that cannot be read, more of them than images, or none.
    """

    def __init__(self, config: TrainConfig, model: str, captions: Sequence[str]) -> None:
        self.every = config.sample_every
        self._config, self._pipeline = config, RunPipeline(model)
        self._prompts = _prompts_in_turn(config, captions)
        self._has_failed = False

    def observe(self, trainer: Trainer) -> dict[str, float]:
        """Draw, write and hand to the trackers; no figures."""
        newest: np.ndarray | None = None
        for kind, ending in (("raw", ""), ("ema", "-ema")):
            weights = trainer.model.weights_on_host(kind)
            grid = None if weights is None else self._try_to_draw(trainer, weights)
            if grid is not None:
                name = f"samples/{trainer.step:06d}{ending}.png"
                _try_to_write(trainer, name, grid)
                trainer.trackers.log_image(f"samples/{kind}", grid, trainer.step)
                newest = grid
        if newest is not None and trainer.step == trainer.config.max_steps:
            _try_to_write(trainer, "samples.png", newest)
        return {}

    def _try_to_draw(self, trainer: Trainer, weights: dict[str, Tensor]) -> np.ndarray | None:
        import torch

        if self._has_failed:
            return None
        try:
            return self._draw(trainer, weights)
        except (UserError, torch.OutOfMemoryError) as error:
            self._has_failed = True
            reason = str(error).splitlines()[0]
            trainer.accelerator.print(f"no sample grid: {reason}")
            return None

    def _draw(self, trainer: Trainer, weights: dict[str, Tensor]) -> np.ndarray:
        config = self._config
        with self._pipeline.around(trainer, weights) as pipeline:
            images = generate(
                pipeline,
                self._prompts,
                seed=config.seed,
                num_steps=config.sample_steps,
                guidance_scale=config.sample_guidance,
                guidance_rescale=config.sample_rescale,
                negative_prompt=config.sample_negative_prompt,
                batch_size=_BATCH_SIZE,
            )
        return draw_grid(images, self._prompts)


def _try_to_write(trainer: Trainer, name: str, grid: np.ndarray) -> None:
    """A full disk or a store that is down costs the picture, not the run."""
    path = trainer.run_dir / name
    try:
        write_png(path, grid)
    except StorageError as error:
        trainer.accelerator.print(f"warning: {error}. Training goes on")
    else:
        trainer.accelerator.print(f"samples: {path}")


def _prompts_in_turn(config: TrainConfig, captions: Sequence[str]) -> list[str]:
    prompts = list(captions)
    if config.sample_prompts:
        prompts = read_prompts(config.sample_prompts, "--sample-prompts")
        if len(prompts) > config.num_samples:
            raise UserError(
                "--sample-prompts",
                f"{len(prompts)} prompts",
                wanted=f"at most --num-samples {config.num_samples}",
                remedy=f"--num-samples {len(prompts)}",
            )
    if not prompts:
        raise UserError(
            "--sample-prompts",
            "none given, and no captions to take instead",
            remedy='--sample-prompts "a lion; a leaf", or --num-samples 0',
        )
    return [prompts[number % len(prompts)] for number in range(config.num_samples)]
