"""The model that is measured: its configurations, and a pipeline of it on the host."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.latency.config import RANDOM_MODELS
from benchmarks.model_configs import SD2_TEXT, SD2_VAE, SD15_TEXT
from train.unet import load_unet_config

_TINY = Path(__file__).parent.parent.parent / "examples" / "tiny-model"
_SD_SCALING_FACTOR = 0.18215
_SIZE = 64  # of latents: 512 pixels
_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    # Random weights predict about 0. As a velocity that leaves latents in range, as noise not.
    "prediction_type": "v_prediction",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """Configurations of a pipeline's models, without weights.

    Args:
        unet: of diffusers' `UNet2DConditionModel`.
        vae: of diffusers' `AutoencoderKL`.
        text: of transformers' `CLIPTextModel`.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]

    def build(self) -> tuple[Any, Any, Any]:
        """U-Net, VAE and text encoder on torch's default device, with random weights."""
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        return (
            UNet2DConditionModel.from_config(self.unet).eval(),
            AutoencoderKL.from_config(self.vae).eval(),
            CLIPTextModel(CLIPTextConfig(**self.text)).eval(),
        )

    @property
    def vae_scale_factor(self) -> int:
        """Pixels to a latent."""
        factor: int = 2 ** (len(self.vae["block_out_channels"]) - 1)
        return factor


def random_parts(model: str) -> ModelParts:
    """Those of a random model in full size."""
    unet, text = ("sd2-base", SD2_TEXT) if model == "random-sd2" else ("sd15", SD15_TEXT)
    return ModelParts(
        unet={**load_unet_config(unet), "sample_size": _SIZE},
        vae={**SD2_VAE, "scaling_factor": _SD_SCALING_FACTOR},
        text=text,
    )


def parts_of(pipeline: Any) -> ModelParts:
    """Those of a pipeline."""
    return ModelParts(
        unet=dict(pipeline.unet.config),
        vae=dict(pipeline.vae.config),
        text=pipeline.text_encoder.config.to_dict(),
    )


def open_pipeline(model: str) -> Any:
    """A float32 pipeline on the CPU.

    Args:
        model: see `LatencyConfig.model`.

    Raises:
        UserError: no such source.
    """
    from evaluate.pipeline import load_pipeline

    if model == "tiny":
        pipeline = _tiny_pipeline()
    elif model in RANDOM_MODELS:
        pipeline = _random_pipeline(random_parts(model))
    else:
        pipeline = load_pipeline(model, "", device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _tiny_pipeline() -> Any:
    """The tiny model's VAE and text encoder, which are trained, with a U-Net of random weights."""
    import torch
    from diffusers import UNet2DConditionModel

    from evaluate.assemble import assemble

    config = UNet2DConditionModel.load_config(_TINY / "unet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config(config).eval()
    return assemble(unet, _SCHEDULE, str(_TINY))


def _random_pipeline(parts: ModelParts) -> Any:
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet, vae, text_encoder = parts.build()
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(_TINY / "tokenizer"),
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(**_SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
