"""Images for prompts: one seed per image, so that a grid does not depend on its batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from evaluate.grid import write_grid
from evaluate.pipeline import load_pipeline
from shards.dataset import Dataset
from shards.layout import ledger_path
from shards.ledger import OK, read_ledger


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    num_steps: int = 20,
    guidance_scale: float = 3.0,
    batch_size: int = 50,
) -> list[np.ndarray]:
    """Images [H, W, 3] uint8, one for each prompt, at the U-Net's own size.

    The unconditional branch is the empty prompt, which is the null condition of training. The
    image of the n-th prompt starts from the noise of seed + n.
    """
    import torch

    images: list[np.ndarray] = []
    with tqdm(total=len(prompts), unit="img", desc="sampling", disable=None) as bar:
        for start in range(0, len(prompts), batch_size):
            part = list(prompts[start : start + batch_size])
            seeds = range(seed + start, seed + start + len(part))
            output = pipeline(
                part,
                generator=[torch.Generator("cpu").manual_seed(s) for s in seeds],
                num_inference_steps=num_steps,
                guidance_scale=guidance_scale,
                output_type="np",
            )
            images += list((output.images * 255).round().astype(np.uint8))
            bar.update(len(part))
    return images


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


def write_samples(run: str | Path, model: str, prompts: Sequence[str], *, seed: int = 0) -> Path:
    """Sample a run and write `<run>/samples.png`; returns its path."""
    path = Path(run) / "samples.png"
    images = generate(load_pipeline(run, model), prompts, seed=seed)
    write_grid(path, images, prompts)
    return path
