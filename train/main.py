"""Train a U-Net from latent shards.

accelerate launch train/main.py                      # data/latents, the preset that fits it
accelerate launch train/main.py tiny --data data/emoji --output-dir runs/x
accelerate launch --multi_gpu train/main.py sd2-base-256 --micro-batch-size 64
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

import tyro

from shards.dataset import Dataset
from shards.errors import DatasetError, UserError, reported
from train.config import PRESETS, TrainConfig, preset
from train.unet import check_fits, load_unet_config

if TYPE_CHECKING:
    from accelerate import Accelerator

_PROGRAM = "train/main.py"
_DESCRIPTION = (
    "Train a Stable-Diffusion-class U-Net from latent shards. The same command again continues "
    "where the run stopped, exactly; Ctrl-C and SIGTERM write a checkpoint first. Without a "
    "preset, the one that fits --data is taken. Defaults below are those of the preset {name}."
)


def main(argv: list[str] | None = None) -> None:
    """Parse, build, run."""
    argv = sys.argv[1:] if argv is None else argv
    with reported("train"):
        config = parse(argv)
        dataset = Dataset(config.data)
        image = dataset.image_column(config.resolution, config.image_column)
        text = dataset.text_column(config.text_column)
        check_fits(load_unet_config(config.unet), image, text)

        import torch

        from shards.order import choose_partitions
        from shards.reader import LatentReader
        from train.trainer import build_accelerator, train

        torch.set_flush_denormal(True)  # CPU: tiny gradients would cost a hundred times their worth
        torch.set_float32_matmul_precision("high")
        batches = LatentReader(
            dataset,
            image,
            text,
            seed=config.seed,
            global_batch_size=config.global_batch_size,
            num_partitions=choose_partitions(config.global_batch_size, config.num_partitions),
            window=config.shuffle_window,
        )
        accelerator = build_accelerator(config)
        trainer = train(config, batches, accelerator)
        if accelerator.is_main_process and trainer.step >= config.max_steps:
            draw_samples(config, dataset, config.model or text.model, accelerator)
        accelerator.end_training()


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
    peek.add_argument("--data", default=TrainConfig.data)
    dataset = Dataset(peek.parse_known_args(argv)[0].data)
    text = dataset.text_column()
    for name, config in PRESETS.items():
        if config.resolution not in dataset.resolutions():
            continue
        try:
            image = dataset.image_column(config.resolution)
            check_fits(load_unet_config(config.unet), image, text)
        except DatasetError:
            continue
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
