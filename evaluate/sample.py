"""Images for prompts: one seed per image, so that a grid does not depend on its batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from shards.dataset import Dataset
from shards.errors import UserError
from shards.layout import ledger_path
from shards.ledger import OK, read_ledger
from shards.storage import location, read_bytes


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    num_steps: int = 20,
    guidance_scale: float = 3.0,
    guidance_rescale: float = 0.0,
    negative_prompt: str = "",
    batch_size: int = 50,
) -> list[np.ndarray]:
    """Images [H, W, 3] uint8, one for each prompt, at the U-Net's own size.

    The unconditional branch is the negative prompt, which by default is the empty one: the null
    condition of training. The image of the n-th prompt starts from the noise of seed + n.

    Args:
        pipeline: diffusers `StableDiffusionPipeline`.
        prompts: one for each image.
        seed: see above.
        num_steps: of the sampler.
        guidance_scale: of classifier-free guidance; 1 is off.
        guidance_rescale: share of the guided prediction whose deviation is brought back to that of
            the conditional one (arXiv:2305.08891, section 3.4).
        negative_prompt: what images are guided away from.
        batch_size: images at a time.

    Raises:
        UserError: an image is not finite; or a negative prompt without guidance, which would do
            nothing.
    """
    import torch

    if negative_prompt and guidance_scale <= 1:
        found = f"has no effect at a guidance scale of {guidance_scale}"
        raise UserError("negative prompt", found, wanted="more than 1")
    images: list[np.ndarray] = []
    with tqdm(total=len(prompts), unit="img", desc="sampling", disable=None) as bar:
        for start in range(0, len(prompts), batch_size):
            part = list(prompts[start : start + batch_size])
            seeds = range(seed + start, seed + start + len(part))
            output = pipeline(
                part,
                negative_prompt=[negative_prompt] * len(part),
                generator=[torch.Generator("cpu").manual_seed(s) for s in seeds],
                num_inference_steps=num_steps,
                guidance_scale=guidance_scale,
                guidance_rescale=guidance_rescale,
                output_type="np",
            )
            images += [_to_uint8(*pair) for pair in zip(output.images, part, strict=True)]
            bar.update(len(part))
    return images


def _to_uint8(pixels: np.ndarray, prompt: str) -> np.ndarray:
    """From [0, 1]; what is not a number would come out as black."""
    if not np.isfinite(pixels).all():
        raise UserError(
            f"prompt {prompt!r}",
            "its image has pixels that are not numbers",
            remedy="the weights have diverged: sample an earlier checkpoint",
        )
    return (pixels * 255).round().astype(np.uint8)


def read_prompts(named: str, flag: str) -> list[str]:
    """Prompts from a text file, one in each line, or from a text with semicolons between them.

    Args:
        named: the file or the text. What ends in .txt, or is one word with a slash, is a file.
        flag: that it was given with, for errors.

    Raises:
        UserError: no such file, not a text, or no prompt in it.
    """
    is_path = named.endswith(".txt") or ("/" in named and len(named.split()) == 1)
    text = _read_text(named, flag) if is_path or _is_file(named) else named.replace(";", "\n")
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(flag, "no prompt given", wanted="text, or a file with text")
    return prompts


def _is_file(named: str) -> bool:
    """Of a name without ending; a long prompt would be no valid name at all."""
    return len(named.encode()) < 256 and Path(named).is_file()


def _read_text(named: str, flag: str) -> str:
    try:
        return read_bytes(location(named)).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        found = f"no file {named}"
    except UnicodeDecodeError:
        found = f"{named} is not UTF-8"
    raise UserError(flag, found, wanted="a text file with a prompt in each line")


def captions_of(dataset: Dataset, num_captions: int) -> list[str]:
    """Different captions, spread evenly over the dataset's first shards."""
    captions: dict[str, None] = {}
    for shard in sorted(dataset.ledger):
        for row in read_ledger(ledger_path(dataset.path, shard)):
            if row["status"] == OK:
                captions[row["caption"]] = None
        if len(captions) >= 20 * num_captions:
            break
    everything = list(captions)
    stride = max(1, len(everything) // num_captions)
    return everything[::stride][:num_captions]
