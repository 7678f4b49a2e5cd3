"""Scene accuracy: does a generated picture show what its caption says?

Only for the embedded default, whose captions fix background, colour, shape and size, so that they
can be read back from the pixels. Chance is the same pictures held against shuffled captions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluate.grid import write_grid
from evaluate.pipeline import load_pipeline
from evaluate.sample import generate
from examples.grammar import parse_caption
from examples.scene_reader import score
from shards.canonical import canonical_json
from shards.errors import UserError
from shards.find_shards import find_shards
from shards.image_shards import ShardStream
from shards.storage import write_text_whole


def held_out_captions(folder: str, num_captions: int) -> list[str]:
    """Captions of some image shards: each once, then from the start again.

    Raises:
        UserError: there are none, or one that describes no scene.
    """
    captions = list(dict.fromkeys(_iter_captions(folder)))
    if not captions:
        raise UserError(
            folder,
            "no captions",
            wanted="scenes",
            remedy="python -m examples.scenes --out <folder>",
        )
    try:
        for caption in captions:
            parse_caption(caption)
    except ValueError as error:
        raise UserError(folder, str(error), wanted="shards of scenes") from None
    return [captions[i % len(captions)] for i in range(num_captions)]


def _iter_captions(folder: str) -> Iterator[str]:
    shards, _ = find_shards(f"{folder}/*.tar")
    for shard in shards:
        for sample in ShardStream(shard):
            if sample.caption:
                yield sample.caption


def measure_scenes(
    run: str, model: str, captions: list[str], *, seed: int, guidance_scale: float, weights: str
) -> dict[str, Any]:
    """Generate a picture per caption, score them all, and write grid and JSON into the run.

    Returns:
        fractions right by part, the same at chance, and where the grid is.
    """
    pipeline = load_pipeline(run, model, weights=weights)
    images = generate(pipeline, captions, seed=seed, guidance_scale=guidance_scale)
    accuracy = asdict(score(captions, images))
    shown = min(len(images), 25)
    grid = Path(run) / "held_out.png"
    write_grid(grid, images[:shown], captions[:shown])
    result = {
        "num_images": accuracy.pop("num_images"),
        "guidance_scale": guidance_scale,
        "accuracy": accuracy,
        "chance": accuracy.pop("chance"),
        "grid": str(grid),
    }
    write_text_whole(Path(run) / "scene_accuracy.json", canonical_json(result))
    return result
