"""The pipeline of a run in progress: its weights of the moment, sampled beside the training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from evaluate.assemble import assemble

if TYPE_CHECKING:
    from torch import Tensor

    from train.trainer import Trainer


class RunPipeline:
    """Lends a pipeline around weights of a run; between two loans its encoders are on the CPU.

    Args:
        model: model folder or hub id of VAE and text encoder.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._pipeline: Any = None

    @contextmanager
    def around(self, trainer: Trainer, weights: dict[str, Tensor]) -> Iterator[Any]:
        """The pipeline with these weights, on the run's device.

        Whatever draws random numbers in here leaves training's alone.

        Raises:
            UserError: the model cannot be loaded, or does not fit the U-Net.
        """
        import torch

        device = trainer.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            unet = _build_unet(trainer.model.unet_config, weights)
            if self._pipeline is None:
                self._pipeline = assemble(unet, trainer.model.scheduler_config, self._model)
            self._pipeline.unet = unet
            try:
                yield self._pipeline.to(device)
            finally:  # the memory is training's
                self._pipeline.unet = None
                self._pipeline.to("cpu")


def _build_unet(config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """A U-Net around tensors that are there: none is initialised, none copied."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    unet.load_state_dict(weights, assign=True)
    return unet.eval()
