"""The classes of encoders that stage 1 runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AutoencoderClass:
    """What a class of autoencoders does not say in its configuration.

    Args:
        has_posterior: gives mean and log-variance; deterministic ones give latents.
        channels_field: of the configuration; one entry for each resolution that it goes through.
        scaling_factor: diffusers' default; configurations may be older than the field.
    """

    has_posterior: bool
    channels_field: str
    scaling_factor: float


AUTOENCODERS = {
    "AutoencoderKL": AutoencoderClass(True, "block_out_channels", 0.18215),
    "AutoencoderTiny": AutoencoderClass(False, "encoder_block_out_channels", 1.0),
    "AutoencoderDC": AutoencoderClass(False, "encoder_block_out_channels", 1.0),
}
PROJECTING_TEXT_ENCODER = "CLIPTextModelWithProjection"  # the one that has a pooled state
TEXT_ENCODERS = ("CLIPTextModel", PROJECTING_TEXT_ENCODER)
