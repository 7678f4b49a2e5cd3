"""Train a U-Net from latent shards.

accelerate launch train/main.py                      # data/latents, the preset that fits it
accelerate launch train/main.py tiny --data data/emoji --output-dir runs/x
accelerate launch --multi_gpu train/main.py sd2-base-256 --micro-batch-size 64
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

from shards.cache import bounded_cache
from shards.column import ImageColumn, TextColumn
from shards.dataset import Column, Dataset
from shards.errors import DatasetError, UserError, reported
from shards.lock import sole_writer
from shards.order import choose_partitions
from shards.reader import LatentReader
from train.config import TrainConfig
from train.presets import PRESETS, preset
from train.unet import check_fits, load_unet_config

if TYPE_CHECKING:
    from accelerate import Accelerator

    from shards.batch import BatchSource

# A run that was just stopped may still be writing its checkpoint.
_LOCK_WAIT_SEC = 60.0
_PROGRAM = "train/main.py"
_DESCRIPTION = (
    "Train a Stable-Diffusion-class U-Net from latent shards. The same command again continues "
    "where the run stopped, exactly; Ctrl-C and SIGTERM write a checkpoint first. Without a "
    "preset, the one that fits --data is taken. Defaults below are those of the preset {name}."
)


def main(argv: list[str] | None = None) -> None:
    """Parse, then run; errors of the user are one line."""
    with reported("train"):
        run(parse(sys.argv[1:] if argv is None else argv))


def run(config: TrainConfig) -> None:
    """Put the pieces together: dataset, reader, trainer, samples."""
    dataset = Dataset(config.data, bounded_cache(config.cache_dir, config.cache_gib))
    image = dataset.image_column(config.resolution, config.image_column)
    text = dataset.text_column(config.text_column, config.text)
    check_fits(load_unet_config(config.unet), image, text)

    import torch

    from train.launcher import follow_launcher
    from train.trainer import build_accelerator, train

    follow_launcher()
    torch.set_flush_denormal(True)  # CPU: tiny gradients would cost a hundred times their worth
    torch.set_float32_matmul_precision("high")
    accelerator = build_accelerator(config)
    reader = build_reader(config, dataset, image, text, pinned=torch.cuda.is_available())
    batches = reader if text.spec.has_states else encode_text(config, reader, text, accelerator)
    with ExitStack() as held:
        if accelerator.is_main_process:
            held.enter_context(sole_writer(Path(config.output_dir), _LOCK_WAIT_SEC))
        accelerator.wait_for_everyone()
        trainer = train(config, batches, accelerator)
        if accelerator.is_main_process and trainer.step >= config.max_steps:
            draw_samples(config, dataset, config.model or text.model, accelerator)
    accelerator.end_training()


def build_reader(
    config: TrainConfig,
    dataset: Dataset,
    image: Column[ImageColumn],
    text: Column[TextColumn],
    *,
    pinned: bool,
) -> LatentReader:
    """The offline source of batches; into pinned memory where there is a GPU to copy to."""
    return LatentReader(
        dataset,
        image,
        text,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        num_partitions=choose_partitions(config.global_batch_size, config.num_partitions),
        window=config.shuffle_window,
        allocate=_pinned_empty if pinned else None,
        processes_sharing_cache=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )


def encode_text(
    config: TrainConfig, reader: LatentReader, text: Column[TextColumn], accelerator: Accelerator
) -> BatchSource:
    """The frozen text encoder beside the reader, for a dataset of token ids."""
    from precompute.encoded_text import EncodedText

    accelerator.print(f"text encoder of {config.model or text.model} runs along (token ids)")
    return EncodedText(reader, text, device=accelerator.device, model=config.model)


def _pinned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    import torch

    like = torch.from_numpy(np.empty(0, dtype))
    return torch.empty(shape, dtype=like.dtype, pin_memory=True).numpy()


def parse(argv: list[str]) -> TrainConfig:
    """`[PRESET] --flags` to a configuration; without a preset, the one that fits the dataset."""
    flags_only = not argv or argv[0].startswith("-")
    wants_help = bool({"-h", "--help"} & set(argv))
    name = argv[0] if not flags_only else "tiny" if wants_help else fitting_preset(argv)
    return tyro.cli(
        TrainConfig,
        default=preset(name),
        args=argv if flags_only else argv[1:],
        prog=f"{_PROGRAM} [{'|'.join(PRESETS)}]",
        description=_DESCRIPTION.format(name=name),
    )


def fitting_preset(argv: list[str]) -> str:
    """The first preset whose resolution and U-Net fit the dataset that the flags name."""
    peek = argparse.ArgumentParser(add_help=False)
    for flag in ("data", "image_column", "text_column", "text"):
        peek.add_argument(f"--{flag.replace('_', '-')}", default=getattr(TrainConfig, flag))
    named, _ = peek.parse_known_args(argv)
    dataset = Dataset(named.data)
    text = dataset.text_column(named.text_column, named.text)
    for name, config in PRESETS.items():
        if config.resolution not in dataset.resolutions():
            continue
        try:
            image = dataset.image_column(config.resolution, named.image_column)
            check_fits(load_unet_config(config.unet), image, text)
        except DatasetError:
            continue
        if os.environ.get("RANK", "0") == "0":
            print(f"preset {name} fits {dataset.path} ({config.resolution} px, {text.model})")
        return name
    raise DatasetError(
        dataset.path,
        f"images at {dataset.resolutions()} px, text states of width {text.spec.dim}",
        wanted=f"what one of the presets trains on ({', '.join(PRESETS)})",
        remedy="name a preset and --unet, --resolution",
    )


def draw_samples(
    config: TrainConfig, dataset: Dataset, model: str, accelerator: Accelerator
) -> None:
    """A grid of images for captions of the dataset, from the exported U-Net."""
    if not config.num_samples:
        return
    from evaluate.sample import captions_of, write_samples

    prompts = captions_of(dataset, config.num_samples)
    try:
        grid = write_samples(config.output_dir, model, prompts, seed=config.seed)
    except UserError as error:  # the run itself is complete; its model may be on another machine
        accelerator.print(f"no sample grid: {error}")
    else:
        accelerator.print(f"samples: {grid}")


if __name__ == "__main__":
    main()
