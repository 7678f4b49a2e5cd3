"""Which columns a job writes: specs from the model folder and the command, without torch."""

from __future__ import annotations

from precompute.model_folder import ModelFolder
from precompute.pixels import transform_spec
from shards.column import ImageColumn, TextColumn
from shards.errors import UserError


def image_columns(
    model: ModelFolder, resolutions: list[int], compute_dtype: str
) -> list[ImageColumn]:
    """One column of moments per resolution.

    Raises:
        UserError: a resolution that the VAE cannot encode.
    """
    factor = model.downsample_factor
    weights, config = model.weights_sha256("vae"), model.vae_config
    columns = []
    for resolution in resolutions:
        if resolution < factor or resolution % factor:
            raise UserError(
                "--resolutions", f"{resolution}", wanted=f"multiples of {factor} (the VAE's factor)"
            )
        columns.append(
            ImageColumn(
                weights_sha256=weights,
                encoder_config=config,
                compute_dtype=compute_dtype,
                storage_dtype="float16",
                resolution=resolution,
                latent_channels=config["latent_channels"],
                latent_size=resolution // factor,
                scaling_factor=config["scaling_factor"],
                transform=transform_spec(),
            )
        )
    return columns


def text_column(model: ModelFolder, compute_dtype: str) -> TextColumn:
    """The column of token ids and text encoder states."""
    config = model.text_config
    return TextColumn(
        weights_sha256=model.weights_sha256("text_encoder"),
        encoder_config=config,
        compute_dtype=compute_dtype,
        storage_dtype="float16",
        num_tokens=config["max_position_embeddings"],
        dim=config["hidden_size"],
        tokenizer_sha256=model.tokenizer_sha256(),
    )
