"""Train a U-Net from latent shards.

accelerate launch train/main.py                      # data/latents, the preset that fits it
accelerate launch train/main.py tiny --data data/emoji --output-dir runs/x
accelerate launch --multi_gpu train/main.py sd2-base-256 --micro-batch-size 64
accelerate launch train/main.py sd2-base-512 --init-from runs/sd2-base-256
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import tyro

from shards.batch import BatchSource, LatentBatch
from shards.cache import bounded_cache
from shards.column import ImageColumn, TextColumn
from shards.dataset import Column, Dataset
from shards.errors import DatasetError, UserError, reported
from shards.follow import FollowingReader
from shards.held_out import choose_held_out
from shards.layout import MANIFEST
from shards.lock import sole_writer
from shards.order import choose_partitions
from shards.reader import LatentReader
from shards.stop import StopOnSignal
from shards.storage import location, size_of
from train.config import TrainConfig
from train.launcher import follow_launcher
from train.presets import PRESETS, preset
from train.restarts import restarted_on_failure
from train.unet import check_fits, load_unet_config

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train.observer import Observer

# A run that was just stopped may still be writing its checkpoint.
_LOCK_WAIT_SEC = 60.0
_POLL_SEC = 2.0
_PROGRAM = "train/main.py"
_DESCRIPTION = (
    "Train a Stable-Diffusion-class U-Net from latent shards. The same command again continues "
    "where the run stopped, exactly; Ctrl-C, SIGTERM and SIGUSR1 write a checkpoint first. Without "
    "a preset, the one that fits --data is taken. Defaults below are those of the preset {name}."
)


def main(argv: list[str] | None = None) -> None:
    """Parse, then run; errors of the user are one line."""
    with reported("train"):
        config = parse(sys.argv[1:] if argv is None else argv)
        with restarted_on_failure(config.max_restarts):
            run(config)


def run(config: TrainConfig) -> None:
    """Put the pieces together: batches, trainer, what looks at it."""
    follow_launcher()
    if config.follow:
        wait_for_first_shard(config.data)
    columns = None if config.online else open_columns(config)

    import torch

    from train.trainer import build_accelerator, train

    torch.set_flush_denormal(True)  # CPU: tiny gradients would cost a hundred times their worth
    torch.set_float32_matmul_precision("high")
    accelerator = build_accelerator(config)
    with ExitStack() as held:
        signals = held.enter_context(StopOnSignal(signal.SIGUSR1))
        run_dir = location(config.output_dir)
        if accelerator.is_main_process and isinstance(run_dir, Path):
            held.enter_context(sole_writer(run_dir, _LOCK_WAIT_SEC))
        accelerator.wait_for_everyone()
        if columns:
            source = open_latents(config, columns, accelerator, signals)
        else:
            source = open_images(config, accelerator)
        if not any_stop_requested(accelerator, signals):
            train(config, source.batches, accelerator, build_observers(config, source), signals)
    accelerator.end_training()


def any_stop_requested(accelerator: Accelerator, signals: StopOnSignal) -> bool:
    """Whether a signal has reached any process: all must begin to train, or none."""
    import torch

    requested = torch.tensor(float(signals.requested), device=accelerator.device)
    return bool(accelerator.reduce(requested, "sum") > 0)


# Where batches come from --------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """What is read of a latent dataset."""

    dataset: Dataset
    image: Column[ImageColumn]
    text: Column[TextColumn]


class HasHeldOut(Protocol):
    """A source that keeps samples apart for validation."""

    num_held_out: int

    def iter_held_out(self, first: int, last: int, batch_size: int) -> Iterator[LatentBatch]:
        """See `LatentReader.iter_held_out`."""
        ...


@dataclass(frozen=True)
class Source:
    """Batches, and what there is beside them.

    Args:
        batches: to train on.
        held_out: never trained on; None online, where nothing is set apart.
        model: whose encoders made them.
        captions: so many of them, for sample images.
    """

    batches: BatchSource
    held_out: HasHeldOut | None
    model: str
    captions: Callable[[int], list[str]]


def wait_for_first_shard(data: str) -> None:
    """Whoever follows stage 1 may be there before it has finished a shard."""
    place = location(data)
    if size_of(place / MANIFEST) is None and os.environ.get("RANK", "0") == "0":
        print(f"waiting for the first shard of {place}", flush=True)
    while size_of(place / MANIFEST) is None or not Dataset(place).columns:
        time.sleep(_POLL_SEC)


def open_columns(config: TrainConfig) -> Columns:
    """The columns to train on, held against the U-Net before anything slow is loaded."""
    dataset = Dataset(config.data, bounded_cache(config.cache_dir, config.cache_gib))
    image = dataset.image_column(config.resolution, config.image_column)
    text = dataset.text_column(config.text_column, config.text)
    check_fits(load_unet_config(config.unet), image, text)
    return Columns(dataset, image, text)


def open_latents(
    config: TrainConfig, columns: Columns, accelerator: Accelerator, signals: StopOnSignal
) -> Source:
    """The offline source: a reader of latent shards, the text encoder beside it for token ids."""
    dataset, image, text = columns.dataset, columns.image, columns.text
    options: dict[str, Any] = {
        **_order_options(config),
        "allocate": pinned_empty if accelerator.device.type == "cuda" else None,
        "processes_sharing_cache": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "flip_prob": config.flip_prob,
        "flipped": dataset.flipped_column(image) if config.flip_prob else None,
    }
    reader: LatentReader | FollowingReader
    if config.follow:
        reader = FollowingReader(
            dataset,
            image,
            text,
            location(config.output_dir) / "epochs.jsonl",
            num_held_out=config.validation_samples,
            agree=_agreement(accelerator),
            is_main=accelerator.is_main_process,
            say=accelerator.print,
            should_stop=lambda: signals.requested,
            **options,
        )
        reader.begin()
    else:
        held_out = choose_held_out(dataset, image, config.validation_samples)
        reader = LatentReader(dataset, image, text, held_out=held_out, **options)
    batches: Any = reader
    if not text.spec.has_states:
        from precompute.encoded_text import EncodedText

        accelerator.print(f"text encoder of {config.model or text.model} runs along (token ids)")
        batches = EncodedText(
            reader,
            text,
            device=accelerator.device,
            model=config.model,
            compiled_share=_compiled_share(config, accelerator),
        )

    def captions(count: int) -> list[str]:
        from evaluate.prompts import captions_of

        return captions_of(dataset, count)

    return Source(batches, batches, config.model or text.model, captions)


def open_images(config: TrainConfig, accelerator: Accelerator) -> Source:
    """The online source: image shards through stage 1's own encoders."""
    from precompute.online import open_online
    from precompute.online_encoders import online_columns

    image, text = online_columns(config.model, config.resolution, accelerator.device)
    check_fits(load_unet_config(config.unet), image, text)
    batches = open_online(
        config.online,
        image,
        text,
        device=accelerator.device,
        num_workers=config.online_workers,
        random_crop=config.random_crop,
        flip_prob=config.flip_prob,
        say=print,  # of every process: each replaces what it cannot decode
        quiet=not accelerator.is_main_process,
        compiled_share=_compiled_share(config, accelerator),
        **_order_options(config),
    )
    return Source(batches, None, config.model, batches.captions)


def _compiled_share(config: TrainConfig, accelerator: Accelerator) -> int | None:
    """Samples of a step on a process, where the encoders are compiled as the step is."""
    from train.step_plan import resolve_compile

    mode, _ = resolve_compile(config, accelerator.device)
    return None if mode == "off" else config.global_batch_size // accelerator.num_processes


def _order_options(config: TrainConfig) -> dict[str, Any]:
    return {
        "seed": config.seed,
        "global_batch_size": config.global_batch_size,
        "num_partitions": choose_partitions(config.global_batch_size, config.num_partitions),
        "window": config.shuffle_window,
    }


def _agreement(accelerator: Accelerator) -> Callable[[Any], Any]:
    """What the main process says, on every process."""
    from accelerate.utils import broadcast_object_list

    def agree(document: Any) -> Any:
        if accelerator.num_processes == 1:
            return document
        return broadcast_object_list([document])[0]

    return agree


def pinned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A buffer from which the copy to a GPU overlaps with what the GPU is doing."""
    import torch

    like = torch.from_numpy(np.empty(0, dtype))
    return torch.empty(shape, dtype=like.dtype, pin_memory=True).numpy()


# What looks at the run ----------------------------------------------------------------------------


def build_observers(config: TrainConfig, source: Source) -> list[Observer]:
    """Validation, sample grids and metrics, as far as they are wanted and possible."""
    from train.validation import Validation

    observers: list[Observer] = []
    held_out, every = source.held_out, config.validation_every
    if held_out and held_out.num_held_out:
        observers.append(Validation(held_out.iter_held_out, held_out.num_held_out, every=every))
    if config.num_samples:
        from evaluate.run_samples import SampleGrids

        captions = [] if config.sample_prompts else source.captions(config.num_samples)
        observers.append(SampleGrids(config, source.model, captions))
    if config.eval_images:
        from evaluate.run_metrics import build_run_metrics

        observers.append(build_run_metrics(config, source.model, source.batches, held_out))
    return observers


# The command line ---------------------------------------------------------------------------------


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
    peek.add_argument("--online", default="")
    named, _ = peek.parse_known_args(argv)
    if named.online:
        raise UserError(
            "preset",
            "none, and --online has no dataset to tell it from",
            wanted=f"one of {', '.join(PRESETS)}",
        )
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


if __name__ == "__main__":
    main()
