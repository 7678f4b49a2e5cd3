"""Sample grids of a run in progress: the same prompts from the same noise, step after step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluate.assemble import assemble
from evaluate.grid import draw_grid, write_png
from evaluate.sample import generate, read_prompts
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
        self._config, self._model = config, model
        self._prompts = _prompts_in_turn(config, captions)
        self._pipeline: Any = None  # without a U-Net, on the CPU, between two grids
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
        """The grid of one set of weights; whatever draws random numbers leaves training's alone."""
        import torch

        config, device = self._config, trainer.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            unet = _build_unet(trainer.model.unet_config, weights)
            if self._pipeline is None:
                self._pipeline = assemble(unet, trainer.model.scheduler_config, self._model)
            self._pipeline.unet = unet
            try:
                images = generate(
                    self._pipeline.to(device),
                    self._prompts,
                    seed=config.seed,
                    num_steps=config.sample_steps,
                    guidance_scale=config.sample_guidance,
                    guidance_rescale=config.sample_rescale,
                    negative_prompt=config.sample_negative_prompt,
                    batch_size=_BATCH_SIZE,
                )
            finally:  # the memory is training's
                self._pipeline.unet = None
                self._pipeline.to("cpu")
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


def _build_unet(config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """A U-Net around tensors that are there: none is initialised, none copied."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    unet.load_state_dict(weights, assign=True)
    return unet.eval()


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
