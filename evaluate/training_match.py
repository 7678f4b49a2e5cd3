"""Whether a pipeline samples as its U-Net was trained: the null condition and the latents' scale.

Guidance leads away from the null condition, so what the U-Net learnt as "no caption" must be what
it is given as that: the states of the empty caption, as the dataset stores them. Where they differ
every other caption is encoded otherwise as well, so such a pipeline is refused, not patched.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from evaluate.training_run import TrainingData, TrainingRun
from precompute.model_folder import find_model
from shards.errors import UserError

# What rounding may come to, by what stage 1 computed in. Measured: storage as float16 0.0002; that
# and SD 2's text encoder, of random weights, in float16 0.0016, in bfloat16 0.013.
_TOLERANCES = {"float32": 2e-3, "float16": 1e-2, "bfloat16": 5e-2}
_REMEDY = "--model <the folder or hub id that the dataset was encoded with>"


class MismatchError(UserError):
    """A pipeline would not sample as its U-Net was trained."""


def check_matches_training(pipeline: Any, training: TrainingRun) -> str:
    """Hold a pipeline against the dataset of its run.

    Args:
        pipeline: float32.
        training: of the run that its U-Net is from.

    Returns:
        what was compared, in one line; or why nothing could be.

    Raises:
        MismatchError: null condition or scale are not those of the training.
    """
    try:
        data = training.data
    except UserError as error:
        why = str(error).partition(". Remedy: ")[0]
        return f"null condition not compared with that of training: {why}"
    try:
        check_scale(pipeline, data)
        difference = check_null_condition(pipeline, data)
    except MismatchError as error:
        if training.is_trained_on(data):
            raise
        return f"warning: the dataset has changed since the training. {error}"
    where = f"{data.dataset.path}/{data.text.column_id}"
    if not data.text.spec.has_states:
        return f"null condition: that of {where}, of the same text encoder"
    said = f"null condition: that of {where} (relative difference {difference:.1g})"
    if training.settings.caption_drop_prob == 0:
        said += "; but no caption was dropped in training, so guidance has not been learnt"
    return said


def check_null_condition(pipeline: Any, data: TrainingData) -> float:
    """Hold the pipeline's encoding of the empty prompt against the dataset's null condition.

    A dataset of token ids alone names its text encoder by the hash of its weights instead.

    Returns:
        deviation of the states, relative to their size.

    Raises:
        MismatchError: they differ by more than storage and stage 1's precision explain.
    """
    text = data.text
    null = data.dataset.read_null(text)
    tokenizer = pipeline.tokenizer
    ids = tokenizer(
        "", padding="max_length", max_length=tokenizer.model_max_length, truncation=True
    ).input_ids
    if ids != null["input_ids"].tolist():
        raise _another_null(data, pipeline, "its tokenizer makes other token ids")
    if not text.spec.has_states:
        folder = find_model(pipeline.text_encoder.name_or_path)
        if folder.weights_sha256(text.spec.part) != text.spec.weights_sha256:
            raise _another_null(data, pipeline, "its text encoder has other weights")
        return 0.0
    wanted = null["states"].astype(np.float64)
    found = pipeline.encode_prompt("", pipeline.device, 1, False)[0][0].double().cpu().numpy()
    if found.shape != wanted.shape:
        raise _another_null(data, pipeline, f"its states are {found.shape}, not {wanted.shape}")
    difference = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    if not difference <= _TOLERANCES.get(text.spec.compute_dtype, 0.0):
        why = f"its states differ by {difference:.1%} of their size"
        raise _another_null(data, pipeline, why)
    return difference


def check_scale(pipeline: Any, data: TrainingData) -> None:
    """Latents are decoded by the scale that they were trained at.

    Raises:
        MismatchError: the VAE's `scaling_factor` is another.
    """
    found, wanted = pipeline.vae.config.scaling_factor, data.image.spec.scaling_factor
    if abs(found - wanted) > 1e-6 * wanted:
        raise MismatchError(
            pipeline.vae.config.get("_name_or_path", "VAE"),
            f"its VAE has scaling_factor {found}",
            wanted=f"{wanted}, which {data.dataset.path}/{data.image.column_id} was encoded with",
            remedy=_REMEDY,
        )


def _another_null(data: TrainingData, pipeline: Any, why: str) -> MismatchError:
    return MismatchError(
        pipeline.tokenizer.name_or_path,
        f"its empty prompt is not the null condition of the training ({why})",
        wanted=f"that of {data.dataset.path}/{data.text.column_id}, from {data.text.model}",
        remedy=_REMEDY,
    )
