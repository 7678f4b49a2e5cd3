"""The data of online against offline where nobody brings any: drawn, and encoded, on first use.

A tiny U-Net gets the demo's scenes and the embedded model. A U-Net of Stable Diffusion's size gets
JPEGs of a photograph's size and spectrum, and encoders of Stable Diffusion's size with random
weights: what they encode is noise, what it takes is what the real ones take.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.random_model import RANDOM_SD2
from precompute.config import PrecomputeConfig
from precompute.job import precompute
from shards.errors import UserError
from train.config import TrainConfig

_FOLDER = Path("data/bench")
_TINY_MODEL = "examples/tiny-model"
_SIZES_MEGAPIXELS = (0.5, 1.0)  # all sides above 512 pixels
_SCENES = 2000
_SHARDS = 4
_SD2_UNETS = ("sd2-base",)


def own_dataset(config: TrainConfig, num_images: int) -> str:
    """A latent dataset that fits a preset: moments, text states, and token ids as a third column.

    Args:
        config: the preset; says resolution and U-Net.
        num_images: distinct images at least, where they have Stable Diffusion's size.

    Returns:
        its path; what is there already is used again.

    Raises:
        UserError: there are no encoders for this U-Net.
    """
    if config.unet == "tiny":
        shards, model, name = _draw_scenes(), _TINY_MODEL, "tiny"
    elif config.unet in _SD2_UNETS:
        name = f"{config.unet}-{config.resolution}-{num_images}"
        shards, model = _draw_photographs(name, num_images), str(_random_sd2())
    else:
        raise UserError(
            "--data",
            f"none, and no encoders of {config.unet}'s size are at hand",
            remedy="--data <a latent dataset that was precomputed for it>",
        )
    out = str(_FOLDER / name / "latents")
    common = PrecomputeConfig(
        shards=shards, out=out, model=model, resolutions=str(config.resolution)
    )
    precompute(common)
    precompute(replace(common, resolutions="none", text="ids"))
    return out


def _draw_scenes() -> str:
    from examples.scenes import SceneDataset, write_scenes

    folder = _FOLDER / "tiny" / "scenes"
    write_scenes(folder, SceneDataset(num_train=_SCENES, num_held_out=100))
    return f"{folder}/train/*.tar"


def _draw_photographs(name: str, num_images: int) -> str:
    from benchmarks.stage_one_data import write_image_shards

    def write(folder: Path) -> object:
        sizes = _SIZES_MEGAPIXELS
        return write_image_shards(
            folder, num_images, _SHARDS, sizes, small_frac=0.0, duplicate_frac=0.0
        )

    return f"{_once(_FOLDER / name / 'images', write)}/*.tar"


def _random_sd2() -> Path:
    from benchmarks.random_model import write_random_sd2

    return _once(_FOLDER / RANDOM_SD2, write_random_sd2)


def _once(folder: Path, write: Callable[[Path], object]) -> Path:
    """Write a folder, whole or not at all, where it is not there yet."""
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        part.rename(folder)
    return folder
