"""The README.md of an exported pipeline: what it is, how it was made, how it is used."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from evaluate.training_run import TrainingRun
from shards.errors import UserError
from shards.storage import Location

_SETTINGS = (
    *("unet", "resolution", "prediction_type", "zero_terminal_snr", "snr_shift", "min_snr_gamma"),
    *("max_steps", "global_batch_size", "learning_rate", "lr_schedule", "warmup_steps"),
    *("weight_decay", "caption_drop_prob", "ema_decay", "seed", "init_from", "data", "online"),
)
_PACKAGES = ("torch", "diffusers", "transformers")

_CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
tags:
- stable-diffusion
- text-to-image
---

# {name}

A text-to-image pipeline whose U-Net was trained by latentmill from precomputed latents. It makes
images of {height} x {width} pixels.

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("<this folder>"{variant})
pipeline("{prompt}", guidance_scale=3.0).images[0].save("image.png")
```

There is no safety checker. No licence is stated here: the terms of the training data, of the VAE
and of the text encoder apply.

## How it was made

| | |
|---|---|
{rows}

`training.json` has all settings of the run.
"""


def model_card(
    pipeline: Any,
    training: TrainingRun,
    *,
    unet: Location,
    variant: str = "",
    notes: Sequence[str] = (),
) -> str:
    """The text of the card.

    Args:
        pipeline: what is exported.
        training: the run's records.
        unet: folder that the U-Net is from.
        variant: of the weight files' names.
        notes: what was compared with the training.
    """
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    factor = pipeline.vae_scale_factor
    rows = {
        "weights": f"{unet.name} of {unet.parent}",
        "parameters of the U-Net": f"{pipeline.unet.num_parameters():,}",
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "sampler": type(pipeline.scheduler).__name__,
        "encoders": _encoders_of(pipeline),
        **_settings_of(training),
        "compared with training": "; ".join(notes) or "nothing",
        "versions": ", ".join(f"{name} {version(name)}" for name in _PACKAGES),
    }
    return _CARD.format(
        name=_name_of(unet),
        height=height * factor,
        width=width * factor,
        variant=f', variant="{variant}"' if variant else "",
        prompt="a photograph of a lighthouse at dawn",
        rows="\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items()),
    )


def _name_of(unet: Location) -> str:
    """The run's name: the folder above `checkpoints/000300/unet`, or above `unet`."""
    is_checkpoint = unet.parent.parent.name == "checkpoints"
    run = unet.parent.parent.parent if is_checkpoint else unet.parent
    return run.name or "pipeline"


def _encoders_of(pipeline: Any) -> str:
    vae, text = pipeline.vae.config, pipeline.text_encoder.config
    return (
        f"{type(pipeline.vae).__name__} ({vae.latent_channels} channels, scaling_factor "
        f"{vae.scaling_factor}), {type(pipeline.text_encoder).__name__} (width {text.hidden_size})"
    )


def _settings_of(training: TrainingRun) -> dict[str, Any]:
    try:
        settings = training.settings
    except UserError:
        return {"training": "not known: the run has no config.json"}
    named = {name: getattr(settings, name) for name in _SETTINGS}
    return {f"`{name}`": value for name, value in named.items() if value not in ("", None)}


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
