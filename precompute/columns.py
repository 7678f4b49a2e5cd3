"""Which columns a job writes: specs from the model folder and the command, without torch."""

from __future__ import annotations

import hashlib
import itertools
from typing import Literal

from precompute.model_folder import ModelFolder
from precompute.transform import build_buckets, transform_spec
from shards.column import ImageColumn, TextColumn
from shards.errors import UserError

LatentStorage = Literal["auto", "moments", "mean", "moments-int8", "mean-int8"]
TextStorage = Literal["fp16", "int8", "ids", "none"]

# What int8 text states take their static channel scales from: captions of many kinds and lengths.
CALIBRATION_CAPTIONS = (
    "a photo of a cat",
    "An oil painting of a ship in a storm, dramatic light, highly detailed",
    "two people riding bicycles down a narrow street in the rain",
    "Amazon.com: Stainless Steel Water Bottle 750 ml, Leak Proof, BPA Free (Blue)",
    "red circle above a small blue square on a yellow background",
    "Portrait of an old man with a white beard, black and white photograph, 85mm f/1.8",
    "IMG_2041.JPG",
    "wedding invitation template, floral watercolor, vector illustration EPS 10",
    "A bowl of ramen with a soft-boiled egg, green onions, nori and slices of pork, seen from "
    "above on a wooden table next to chopsticks and a glass of iced tea, natural window light",
    "map of the world 1842",
    "Футбол: финал кубка, 2019",
    "日本の庭園",
    "the quick brown fox jumps over the lazy dog!!! #fox #dog ❤",
    "logo",
    "3D render of a futuristic city with flying cars at night, neon signs, unreal engine",
    "mountain lake reflecting snow-covered peaks at sunrise, panorama",
)


def image_columns(
    model: ModelFolder,
    resolutions: list[int],
    compute_dtype: str,
    storage: LatentStorage = "auto",
    *,
    bucket_step: int = 0,
    flip: bool = False,
) -> list[ImageColumn]:
    """One column of latents per resolution; with `flip`, one more of the mirrored images.

    Args:
        model: the model folder.
        resolutions: in pixels.
        compute_dtype: precision that the encoder runs in.
        storage: what is stored.
        bucket_step: sides of aspect-ratio buckets are multiples of it; 0 makes squares.
        flip: whether there are flipped columns beside the others.

    Raises:
        UserError: a resolution or a step that the VAE cannot encode, or moments of one that has
            none.
    """
    factor = model.downsample_factor
    latents, dtype = _latent_storage(model, storage)
    weights, config = model.weights_sha256("vae"), model.vae_config
    if bucket_step and (bucket_step % factor or bucket_step > min(resolutions)):
        wanted = f"a multiple of {factor} (the VAE's factor) up to the least of --resolutions"
        raise UserError("--bucket-step", f"{bucket_step}", wanted=wanted)
    columns = []
    for resolution, flipped in itertools.product(resolutions, [False, True][: 1 + flip]):
        if resolution < factor or resolution % factor:
            raise UserError(
                "--resolutions", f"{resolution}", wanted=f"multiples of {factor} (the VAE's factor)"
            )
        columns.append(
            ImageColumn(
                weights_sha256=weights,
                encoder_config=config,
                compute_dtype=compute_dtype,
                storage_dtype=dtype or "float16",
                quantization={"scale": "maximum of sample and channel"} if dtype else {},
                latents=latents,
                resolution=resolution,
                latent_channels=config["latent_channels"],
                latent_size=resolution // factor,
                scaling_factor=config["scaling_factor"],
                transform=transform_spec(flipped),
                buckets=build_buckets(resolution, bucket_step) if bucket_step else [],
            )
        )
    return columns


def _latent_storage(model: ModelFolder, storage: LatentStorage) -> tuple[str, str]:
    """What is stored, `moments` or `mean`, and `int8` or nothing."""
    if storage == "auto":
        return "moments" if model.has_posterior else "mean", ""
    latents, _, dtype = storage.partition("-")
    if latents == "moments" and not model.has_posterior:
        raise UserError(
            "--latents",
            f"{storage} of an {model.vae_class}, which is deterministic",
            wanted="mean or mean-int8: its latents, which have no log-variance",
        )
    return latents, dtype


def text_columns(
    model: ModelFolder, compute_dtype: str, storage: TextStorage = "fp16"
) -> list[TextColumn]:
    """One column of token ids and states for each text encoder; none for `none`.

    Raises:
        UserError: a text encoder of a class that is not supported.
    """
    if storage == "none":
        return []
    return [_text_column(model, part, compute_dtype, storage) for part in model.text_parts]


def _text_column(
    model: ModelFolder, part: str, compute_dtype: str, storage: TextStorage
) -> TextColumn:
    config = model.text_config(part)
    quantization = {}
    if storage == "int8":
        captions = hashlib.sha256("\n".join(CALIBRATION_CAPTIONS).encode()).hexdigest()
        quantization = {
            "scale": "maximum of token, after a static scale of channel",
            "channel_scale": "maximum over the calibration captions but their first tokens",
            "calibration_captions_sha256": captions,
        }
    return TextColumn(
        weights_sha256=model.weights_sha256(part),
        encoder_config=config,
        compute_dtype=compute_dtype,
        storage_dtype={"fp16": "float16", "int8": "int8", "ids": "none"}[storage],
        quantization=quantization,
        part=part,
        hidden_state=model.hidden_state,
        num_tokens=config["max_position_embeddings"],
        dim=config["hidden_size"],
        pooled_dim=model.pooled_dim(part),
        tokenizer_sha256=model.tokenizer_sha256(part),
    )
