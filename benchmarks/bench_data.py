"""The data of online against offline where nobody brings any: drawn, and encoded, on first use.

A tiny U-Net gets the demo's scenes and the embedded model. A U-Net of Stable Diffusion's size gets
JPEGs of a photograph's size and spectrum, and encoders of Stable Diffusion's size with random
weights: what they encode is noise, what it takes is what the real ones take.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.model_configs import SD2_TEXT, SD15_TEXT
from precompute.config import PrecomputeConfig
from precompute.job import precompute
from shards.dataset import Dataset
from shards.errors import UserError
from shards.lock import sole_writer
from train.config import TrainConfig

_FOLDER = Path("data/bench")
_TINY_MODEL = "examples/tiny-model"
_SIZES_MEGAPIXELS = (0.5, 1.0)  # all sides above 512 pixels
_SCENES = 2000
_SHARDS = 4
_COLUMNS = 3  # moments, states, token ids
_WAIT_SEC = 600.0
_TEXT_ENCODERS = {"sd2-base": SD2_TEXT, "sd15": SD15_TEXT}


def own_dataset(config: TrainConfig, num_images: int) -> str:
    """A latent dataset that fits a preset: moments, text states, and token ids as a third column.

    Args:
        config: the preset; says resolution and U-Net.
        num_images: distinct images at least, where they have Stable Diffusion's size.

    Returns:
        its path; what is there already is used again.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with sole_writer(_FOLDER, _WAIT_SEC):  # against another benchmark in the same checkout
            return _make(config, num_images)
    except OSError as error:
        raise UserError(
            _FOLDER, f"cannot be written ({error})", remedy="space, or rights"
        ) from None


def _make(config: TrainConfig, num_images: int) -> str:
    if config.unet == "tiny":
        shards, model, name = _draw_scenes(), _TINY_MODEL, "tiny"
    else:
        name = f"{config.unet}-{config.resolution}-{num_images}"
        shards, model = _draw_photographs(name, num_images), _draw_encoders(config.unet)
    out = _FOLDER / name / "latents"
    common = PrecomputeConfig(
        shards=shards, out=str(out), model=model, resolutions=str(config.resolution)
    )
    _encode(common)
    if len(Dataset(out).columns) > _COLUMNS:  # some are of a model, or of code, that has changed
        shutil.rmtree(out)
        _encode(common)
    return str(out)


def _encode(images_and_states: PrecomputeConfig) -> None:
    precompute(images_and_states)
    precompute(replace(images_and_states, resolutions="none", text="ids"))


def _draw_scenes() -> str:
    from examples.scenes import SceneDataset, write_scenes

    folder = _FOLDER / "tiny" / "scenes"
    scenes = SceneDataset(num_train=_SCENES, num_held_out=100)
    try:
        write_scenes(folder, scenes)
    except ValueError:  # drawn by code that has changed; the latents are of those scenes
        shutil.rmtree(folder.parent)
        write_scenes(folder, scenes)
    return f"{folder}/train/*.tar"


def _draw_photographs(name: str, num_images: int) -> str:
    from benchmarks.stage_one_data import write_image_shards

    def write(folder: Path) -> object:
        sizes = _SIZES_MEGAPIXELS
        return write_image_shards(
            folder, num_images, _SHARDS, sizes, small_frac=0.0, duplicate_frac=0.0
        )

    return f"{_once(_FOLDER / name / 'images', write)}/*.tar"


def _draw_encoders(unet: str) -> str:
    from benchmarks.random_model import write_random_model

    text = _TEXT_ENCODERS[unet]
    write = partial(write_random_model, text=text)
    return str(_once(_FOLDER / f"random-{unet}", write))


def _once(folder: Path, write: Callable[[Path], object]) -> Path:
    """Write a folder, whole or not at all, where it is not there yet."""
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        part.rename(folder)
    return folder
