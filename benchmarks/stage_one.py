"""Stage 1 of ours against a naive one: same images, same encoders, in turns.

First with encoders that take no time: what the CPUs do for an image, in images per second of one
core. Then with the model's: the pipeline against each of its own stages alone, on as many threads,
and against the naive arm. That one reads, decodes with PIL for each resolution, encodes and
writes, one after another.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.flops import text_flops, vae_flops
from benchmarks.model_configs import SD2_TEXT
from benchmarks.random_model import write_random_model
from benchmarks.result import result, spread
from benchmarks.stage_one_data import write_image_shards
from precompute.columns import image_columns, text_columns
from precompute.model_folder import ModelFolder, find_model
from precompute.worker_spec import WorkerSpec
from shards.column import ColumnSpec, Json
from shards.errors import UserError
from shards.find_shards import find_shards

if TYPE_CHECKING:
    from benchmarks.stage_one_arms import StageOne

_SMALL_FRAC, _DUPLICATE_FRAC = 0.1, 0.1
_RANDOM_SD2 = "random-sd2"
_DEVICE_SPEED = 0.7  # of a paced device: of the images that the CPUs alone can prepare


@dataclass(frozen=True, kw_only=True)
class StageOneConfig:
    """Measure stage 1 against a naive one, and against its own stages."""

    images: int = 320
    """Images, with an encoder that takes no time."""
    model_images: int = 96
    """Images, with the model's encoders; 0 leaves that part out."""
    megapixels: str = "0.5,1,2"
    """Sizes of the images, in turns; one in ten is 400x300."""
    resolutions: str = "256,512"
    """Of the latents."""
    shards: int = 4
    """Image shards."""
    model: str = "examples/tiny-model"
    """Diffusers model folder or hub id; random-sd2 is of SD2's size with random weights."""
    device: str = "auto"
    """Of the model's encoders."""
    dtype: str = "auto"
    """Of the model's encoders: float32, float16, bfloat16; auto: float16 on a GPU."""
    batch_size: int = 32
    """Images per call of the VAE, in both arms."""
    decode_workers: int = 1
    """Threads that decode beside the model's encoders; with no encoder, one per CPU."""
    blocks: int = 7
    """Timed passes of each arm with an encoder that takes no time."""
    model_blocks: int = 3
    """Timed passes of each arm with the model's encoders."""
    scratch: str = "data"
    """Folder for a temporary folder, which is removed at the end."""
    out: str = ""
    """File of the result; default: its place in benchmarks/results; `-`: none."""


def measure(config: StageOneConfig) -> dict[str, Any]:
    """Run all arms and return the result document.

    Raises:
        UserError: settings that do not fit each other, or a model that cannot be loaded.
    """
    sizes = tuple(float(size) for size in config.megapixels.split(","))
    if min(config.images, config.shards, config.blocks, config.model_blocks, *sizes) <= 0:
        raise UserError("precompute", "no images, shards or blocks")
    Path(config.scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.scratch, prefix="precompute-") as folder:
        bench = _Bench(config, Path(folder).resolve(), sizes)
        found: dict[str, Any] = {"null_encoder": bench.measure_cpu_path()}
        if config.model_images:
            found["model"] = bench.measure_model()
    return result("precompute", config, **found)


class _Bench:
    """The two measurements over one folder."""

    def __init__(self, config: StageOneConfig, scratch: Path, sizes: tuple[float, ...]) -> None:
        self._config, self._scratch, self._sizes = config, scratch, sizes
        self._model = _find_model(config.model, scratch)
        self._runs = 0

    def measure_cpu_path(self) -> Json:
        """Images per second of one core, of each arm, with encoders that take no time."""
        import torch

        from benchmarks.stage_one_arms import (
            NullImageEncoder,
            NullTextEncoder,
            run_naive,
            run_ours,
        )
        from precompute.text_encoder import TextEncoder

        torch.set_num_threads(1)
        config = self._config
        job = self._job(config.images, "float32")
        channels = 2 * job.images[0].latent_channels
        cpu = torch.device("cpu")
        tokenizer = TextEncoder(self._model, cpu, torch.float32, tokenizer_only=True)
        null = NullImageEncoder(job.images[0].downsample_factor, channels)
        job = _with_encoders(job, null, NullTextEncoder(tokenizer, job.text))
        spec = self._spec(job.columns, "cpu", "float32", os.cpu_count() or 1)
        arms = {
            "ours": lambda out: run_ours(job, spec, out),
            "naive": lambda out: run_naive(job, out, config.batch_size),
        }
        found = self._run_in_turns(arms, config.blocks, config.images)
        ratios = [
            a / b
            for a, b in zip(
                found["ours"]["core_seconds"], found["naive"]["core_seconds"], strict=True
            )
        ]
        return {
            "arms": found,
            "ours_over_naive_per_core": spread([1 / ratio for ratio in ratios]),
            "paced": self._measure_paced(job, spec, found["ours"]["seconds"]),
        }

    def _measure_paced(self, job: StageOne, spec: WorkerSpec, cpu_seconds: list[float]) -> Json:
        """How busy the pipeline keeps a device that is a little slower than the CPUs."""
        from benchmarks.stage_one_arms import PacedImageEncoder, run_ours

        pixels = sum(c.resolution**2 for c in job.images) * self._config.images
        sec_per_pixel = statistics.median(cpu_seconds) / _DEVICE_SPEED / pixels
        encoders = []

        def run(out: Path) -> None:
            factor, channels = job.images[0].downsample_factor, 2 * job.images[0].latent_channels
            encoders.append(PacedImageEncoder(factor, channels, sec_per_pixel))
            text = job.tools.text[job.text.part]
            run_ours(_with_encoders(job, encoders[-1], text), spec, out)

        found = self._run_in_turns({"paced": run}, self._config.blocks, self._config.images)
        walls = found["paced"]["seconds"]
        busy = [e.busy_sec / wall for e, wall in zip(encoders[1:], walls, strict=True)]
        return {"device_over_cpu_speed": _DEVICE_SPEED, "device_busy": spread(busy), **found}

    def measure_model(self) -> Json:
        """Seconds of the pipeline, of its stages alone and of the naive arm; FLOPs per row."""
        import torch

        from benchmarks.stage_one_arms import run_naive, run_ours, stages_alone
        from precompute.image_encoder import ImageEncoder
        from precompute.loading import choose_device
        from precompute.text_encoder import TextEncoder

        config = self._config
        device = choose_device(config.device)
        dtype = config.dtype
        if dtype == "auto":
            dtype = "float16" if device.type == "cuda" else "float32"
        job = self._job(config.model_images, dtype)
        job = _with_encoders(
            job,
            ImageEncoder(self._model, device, getattr(torch, dtype)),
            TextEncoder(self._model, device, getattr(torch, dtype)),
        )
        spec = self._spec(job.columns, str(device), dtype, config.decode_workers)
        wasted = run_naive(job, self._folder(), config.batch_size)  # and a warm-up
        alone: list[dict[str, float]] = []
        arms: dict[str, Callable[[Path], Any]] = {
            "ours": lambda out: run_ours(job, spec, out),
            "stages alone": lambda out: alone.append(stages_alone(job, spec, out)),
            "naive": lambda out: run_naive(job, out, config.batch_size),
        }
        found = self._run_in_turns(arms, config.model_blocks, config.model_images)
        del found["stages alone"], alone[0]  # the latter warmed up
        slowest = [max(seconds, key=lambda name: seconds[name]) for seconds in alone]
        over_slowest = [
            wall / max(seconds.values())
            for wall, seconds in zip(found["ours"]["seconds"], alone, strict=True)
        ]
        speedups = [
            b / a for a, b in zip(found["ours"]["seconds"], found["naive"]["seconds"], strict=True)
        ]
        return {
            "arms": found,
            "alone_sec": {name: spread([each[name] for each in alone]) for name in alone[0]},
            "slowest_stage": statistics.mode(slowest),
            "wall_over_slowest_alone": spread(over_slowest),
            "naive_over_ours_wall": spread(speedups),
            "flops": self._flops(job, wasted),
        }

    def _flops(self, job: StageOne, wasted: int) -> Json:
        """FLOPs of the encoders, of both arms, per row that is stored."""
        per_image = {c.resolution: vae_flops(self._model, c.resolution) for c in job.images}
        per_caption = text_flops(self._model, job.text)
        num_images, smallest = self._config.model_images, max(per_image)
        captions = _distinct_captions(job)
        wasted_flops = wasted * per_image[smallest]
        rows = num_images * len(per_image) - wasted
        image = num_images * sum(per_image.values()) - wasted_flops
        return {
            "vae": {str(resolution): flops for resolution, flops in per_image.items()},
            "text": per_caption,
            "ours_per_row": (image + captions * per_caption) / rows,
            "naive_per_row": (image + wasted_flops + num_images * per_caption) / rows,
            "thrown_away_by_naive": wasted,
            "captions": captions,
        }

    def _job(self, num_images: int, dtype: str) -> StageOne:
        from benchmarks.stage_one_arms import StageOne, no_tools

        images = write_image_shards(
            self._scratch / f"images-{num_images}",
            num_images,
            self._config.shards,
            self._sizes,
            small_frac=_SMALL_FRAC,
            duplicate_frac=_DUPLICATE_FRAC,
        )
        resolutions = sorted(int(part) for part in self._config.resolutions.split(","))
        columns: list[ColumnSpec] = [
            *image_columns(self._model, resolutions, dtype),
            *text_columns(self._model, dtype)[:1],
        ]
        sources, _ = find_shards(" ".join(map(str, images)))
        return StageOne(sources, columns, no_tools(self._config.batch_size))

    def _spec(
        self, columns: list[ColumnSpec], device: str, dtype: str, decode_workers: int
    ) -> WorkerSpec:
        return WorkerSpec(
            dataset="",
            model=self._model,
            columns=columns,
            device=device,
            dtype=dtype,
            wanted="",
            caption_field="",
            batch_size=self._config.batch_size,
            decode_workers=decode_workers,
            compiled=False,
        )

    def _folder(self) -> Path:
        self._runs += 1
        return self._scratch / f"out-{self._runs}"

    def _run_in_turns(
        self, arms: dict[str, Callable[[Path], Any]], blocks: int, num_images: int
    ) -> Json:
        """Each arm once per block; wall seconds and, over all threads, core seconds."""
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        core_seconds: dict[str, list[float]] = {name: [] for name in arms}
        for block in range(-1, blocks):  # the first pass warms up
            for name, run in arms.items():
                folder = self._folder()
                wall, core = time.perf_counter(), time.process_time()
                run(folder)
                if block >= 0:
                    seconds[name].append(time.perf_counter() - wall)
                    core_seconds[name].append(time.process_time() - core)
                shutil.rmtree(folder)
            if block >= 0:
                shown = ", ".join(f"{name} {sec[-1]:.1f} s" for name, sec in seconds.items())
                print(f"block {block + 1}/{blocks}: {shown}", flush=True)
        return {
            name: {
                "seconds": seconds[name],
                "core_seconds": core_seconds[name],
                "images_per_sec": spread([num_images / sec for sec in seconds[name]]),
                "images_per_core_sec": spread([num_images / sec for sec in core_seconds[name]]),
            }
            for name in arms
        }


def _find_model(name: str, scratch: Path) -> ModelFolder:
    if name == _RANDOM_SD2:
        return ModelFolder(name, write_random_model(scratch / "model", SD2_TEXT))
    return find_model(name)


def _with_encoders(job: StageOne, image: Any, text: Any) -> StageOne:
    tools = replace(job.tools, image=image, text={job.text.part: text})
    return replace(job, tools=tools)


def _distinct_captions(job: StageOne) -> int:
    """Over all shards, each shard by itself."""
    from shards.image_shards import ShardStream

    return sum(len({sample.caption for sample in ShardStream(s)}) for s in job.sources)


def print_table(document: dict[str, Any]) -> None:
    """The result for people."""
    null = document["null_encoder"]
    print("\nwith encoders that take no time:")
    _print_arms(null["arms"])
    print(f"  ours over naive, per core: {_shown(null['ours_over_naive_per_core'], 'x')}")
    busy = _shown(null["paced"]["device_busy"])
    print(f"  a device at {_DEVICE_SPEED:.0%} of the CPUs' speed is busy: {busy} of the time")
    if model := document.get("model"):
        print("\nwith the model's encoders:")
        _print_arms(model["arms"])
        alone = ", ".join(f"{n} {s['median']:.1f} s" for n, s in model["alone_sec"].items())
        print(f"  stages alone: {alone}")
        slowest = f"{model['slowest_stage']} alone"
        print(f"  pipeline over {slowest}: {_shown(model['wall_over_slowest_alone'], 'x')}")
        print(f"  naive over ours, wall time: {_shown(model['naive_over_ours_wall'], 'x')}")
        flops = model["flops"]
        print(
            f"  GFLOPs per stored row: ours {flops['ours_per_row'] / 1e9:.2f}, "
            f"naive {flops['naive_per_row'] / 1e9:.2f}"
        )


def _print_arms(arms: Json) -> None:
    print(f"  {'arm':<8}{'img/s':>28}{'img per core-second':>28}")
    for name, arm in arms.items():
        speeds = [_shown(arm[kind]) for kind in ("images_per_sec", "images_per_core_sec")]
        print(f"  {name:<8}{speeds[0]:>28}{speeds[1]:>28}")


def _shown(found: dict[str, float], unit: str = "") -> str:
    return f"{found['median']:.2f}{unit} ({found['p10']:.2f}-{found['p90']:.2f})"
