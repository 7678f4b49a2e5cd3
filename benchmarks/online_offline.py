"""Online against offline: one loop, one U-Net, one order of samples, two sources of batches.

The arms run in turns, block by block, so that a machine that slows down slows both. The first
steps of a block are not timed. Before any time is trusted the arms' losses must agree.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.flops import flops_per_image, predicted_ratio
from benchmarks.result import environment, spread
from precompute.config import PrecomputeConfig
from precompute.job import precompute
from precompute.model_folder import find_model
from precompute.time_account import DECODE, READ, TRANSFORM, WRITE, loads
from shards.column import ImageColumn, TextColumn
from shards.dataset import Column, Dataset
from shards.errors import UserError
from shards.manifest import iter_receipts
from shards.order import choose_partitions
from shards.reader import LatentReader
from train.config import TrainConfig
from train.metrics import read_metrics
from train.presets import preset
from train.unet import check_fits, load_unet_config

_OWN_DATA = "data/bench"
_LOSS_TOLERANCE = 1e-3  # the cache is float16, and a batch's company moves the last bits


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measure online against offline training of the same U-Net."""

    data: str = ""
    """Latent dataset whose image shards are still there; default: scenes drawn into data/bench."""
    preset: str = "tiny"
    """Training preset; its U-Net, batch and optimizer are what is timed."""
    global_batch_size: int = 0
    """Samples per step; 0 keeps the preset's."""
    blocks: int = 5
    """Timed blocks for each arm."""
    steps: int = 10
    """Timed steps in a block."""
    warmup: int = 5
    """Steps before each block that are not timed; more than the sources prefetch."""
    out: str = ""
    """Also write the result to this file."""


def draw_own_data() -> str:
    """A small latent dataset of scenes, made on first use."""
    from examples.scenes import SceneDataset, write_scenes

    write_scenes(Path(_OWN_DATA) / "scenes", SceneDataset(num_train=2000, num_held_out=100))
    out = f"{_OWN_DATA}/latents"
    precompute(
        PrecomputeConfig(
            shards=f"{_OWN_DATA}/scenes/train/*.tar",
            out=out,
            model="examples/tiny-model",
            resolutions="64",
        )
    )
    return out


def measure(bench: BenchConfig) -> dict[str, Any]:
    """Run both arms and return the result document.

    Raises:
        UserError: no usable dataset, or the arms' losses differ.
    """
    config = preset(bench.preset)
    if bench.global_batch_size:
        config = replace(config, global_batch_size=bench.global_batch_size, micro_batch_size=0)
    dataset = Dataset(bench.data or draw_own_data())
    image, text = dataset.image_column(config.resolution), dataset.text_column()
    check_fits(load_unet_config(config.unet), image, text)
    with tempfile.TemporaryDirectory() as scratch:
        sec_per_step = _run_arms(bench, config, dataset, Path(scratch))
    flops = flops_per_image(config.unet, find_model(image.model), image.spec, text.spec)
    ratios = [
        online / offline
        for online, offline in zip(sec_per_step["online"], sec_per_step["offline"], strict=True)
    ]
    batch = config.global_batch_size
    images_per_sec = {
        arm: spread([batch / s for s in times]) for arm, times in sec_per_step.items()
    }
    encode_per_sec = stage_one_images_per_sec(dataset, image, text)
    return {
        "theme": "online_offline",
        "protocol": asdict(bench),
        "preset": bench.preset,
        "resolution": config.resolution,
        "global_batch_size": batch,
        "images_per_sec": images_per_sec,
        "iters_per_sec": {arm: spread([1 / s for s in t]) for arm, t in sec_per_step.items()},
        "offline_speedup": spread(ratios),
        "flops_per_image": flops,
        "flops_predicted_speedup": predicted_ratio(flops),
        "stage1_images_per_sec": encode_per_sec,
        "totals": totals(
            images_per_sec["online"]["median"], images_per_sec["offline"]["median"], encode_per_sec
        ),
        "sec_per_step": sec_per_step,
        "environment": environment(),
    }


def _run_arms(
    bench: BenchConfig, config: TrainConfig, dataset: Dataset, scratch: Path
) -> dict[str, list[float]]:
    """Mean seconds per step of every block, by arm."""
    from precompute.online import OnlineBatches
    from precompute.online_samples import samples_of_dataset
    from train.trainer import Trainer, build_accelerator

    accelerator = build_accelerator(config)
    image, text = dataset.image_column(config.resolution), dataset.text_column()
    reader = LatentReader(
        dataset,
        image,
        text,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        num_partitions=choose_partitions(config.global_batch_size),
    )
    online = OnlineBatches(
        samples_of_dataset(reader, image, dataset.caption_field),
        image,
        text,
        device=accelerator.device,
        num_workers=os.cpu_count() or 1,
    )
    total = bench.blocks * (bench.warmup + bench.steps)
    config = replace(config, max_steps=total, log_every=total + 1, checkpoint_every=total + 1)
    trainers = {
        arm: Trainer(replace(config, output_dir=str(scratch / arm)), source, accelerator)
        for arm, source in (("offline", reader), ("online", online))
    }
    sec_per_step: dict[str, list[float]] = {arm: [] for arm in trainers}
    for block in range(bench.blocks):
        for arm, trainer in trainers.items():
            start = block * (bench.warmup + bench.steps)
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.run(start + bench.warmup)
                began = time.perf_counter()
                trainer.run(start + bench.warmup + bench.steps)  # ends with a synchronisation
            sec_per_step[arm].append((time.perf_counter() - began) / bench.steps)
        speeds = ", ".join(f"{arm} {1 / times[-1]:.2f} it/s" for arm, times in sec_per_step.items())
        print(f"block {block + 1}/{bench.blocks}: {speeds}", flush=True)
    check_equal_losses(scratch)
    return sec_per_step


def check_equal_losses(scratch: Path) -> None:
    """Both arms must have trained on the same samples with the same noise.

    Raises:
        UserError: they have not; no time is reported then.
    """
    rows = {arm: read_metrics(scratch / arm / "metrics.jsonl") for arm in ("offline", "online")}
    for offline, online in zip(rows["offline"], rows["online"], strict=True):
        if not math.isclose(offline["train/loss"], online["train/loss"], rel_tol=_LOSS_TOLERANCE):
            raise UserError(
                "bench",
                f"losses differ at step {offline['step']:.0f}: offline "
                f"{offline['train/loss']:.6f}, online {online['train/loss']:.6f}",
                wanted=f"equal within {_LOSS_TOLERANCE:g}",
                remedy="precompute the dataset again from the image shards that are there now",
            )


def stage_one_images_per_sec(
    dataset: Dataset, image: Column[ImageColumn], text: Column[TextColumn]
) -> float:
    """Speed of stage 1 for these two columns, from the times in their receipts.

    Its stages overlap, so a shard takes as long as the slowest of them.
    """
    texts = {receipt.shard: receipt for receipt in iter_receipts(dataset.path / text.column_id)}
    num_rows, seconds = 0, 0.0
    for receipt in iter_receipts(dataset.path / image.column_id):
        timings, of_text = receipt.timings, texts[receipt.shard].timings
        stages = {
            **{name: timings[name] for name in (READ, DECODE, TRANSFORM)},
            "encode both": timings["encode"] + of_text["encode"],
            WRITE: timings[WRITE] + of_text[WRITE],
        }
        seconds += max(loads(stages, timings["decode_workers"]).values())
        num_rows += receipt.rows_in
    return num_rows / seconds


def totals(online: float, offline: float, encode: float) -> dict[str, Any]:
    """Online time over offline time *with* stage 1 counted, by epochs, and the break-even.

    Args:
        online: images per second.
        offline: images per second, from latents.
        encode: images per second of stage 1.
    """
    gain = 1 / online - 1 / offline
    return {
        "speedup_with_stage1": {
            str(epochs): (epochs / online) / (epochs / offline + 1 / encode)
            for epochs in (1, 2, 3, 10)
        },
        "break_even_epochs": (1 / encode) / gain if gain > 0 else None,
    }


def print_table(result: dict[str, Any]) -> None:
    """The result for people."""
    env = result["environment"]
    print(
        f"\n{result['preset']} at {result['resolution']} px, batch {result['global_batch_size']}, "
        f"{env['device']}, torch {env['versions']['torch']}"
    )
    print(f"{'arm':<10}{'it/s':>8}{'img/s':>9}   p10-p90 img/s")
    for arm, speed in result["images_per_sec"].items():
        iters = result["iters_per_sec"][arm]["median"]
        print(
            f"{arm:<10}{iters:>8.2f}{speed['median']:>9.1f}   {speed['p10']:.1f}-{speed['p90']:.1f}"
        )
    speedup, flops = result["offline_speedup"], result["flops_per_image"]
    print(
        f"offline is {speedup['median']:.2f}x as fast (p10-p90 {speedup['p10']:.2f}-"
        f"{speedup['p90']:.2f}); FLOPs alone predict {result['flops_predicted_speedup']:.2f}x"
    )
    print("GFLOP per image: " + ", ".join(f"{k} {v / 1e9:.2f}" for k, v in flops.items()))
    with_stage1 = result["totals"]["speedup_with_stage1"]
    print(
        f"with stage 1 counted ({result['stage1_images_per_sec']:.0f} img/s): "
        + ", ".join(f"{ratio:.2f}x after {epochs} epochs" for epochs, ratio in with_stage1.items())
    )
    break_even = result["totals"]["break_even_epochs"]
    print(f"break-even: {break_even:.1f} epochs" if break_even else "break-even: never")
