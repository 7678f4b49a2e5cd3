"""How long an image takes: the plain diffusers pipeline beside ours, in turns.

From prompts to pixels in the host's memory, after warm-up, the device waited for on both sides; all
samples are kept. Where the time goes is measured apart, part by part. The baselines are the plain
pipeline as it is usually run: in float32, with TF32 products, and in half precision, which is its
best. Before that, what needs no GPU is counted: operators, launches and waits of a denoising step.

`--model random-sd2 --batch-sizes 1 --trials 10` is the command for a GPU; `--ladder` turns on one
switch after another. Without a GPU, the tiny model shows that everything runs and says nothing
about a GPU's speed.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from benchmarks.latency.arms import Arm, ArmSpec, list_arms, open_arm
from benchmarks.latency.config import RANDOM_MODELS, LatencyConfig, check_config
from benchmarks.latency.counts import count_all
from benchmarks.latency.models import ModelParts, open_pipeline, parts_of, random_parts
from benchmarks.latency.room import obstacle
from benchmarks.latency.table import print_table as print_table
from benchmarks.latency.timing import PARTS, Call, time_call, time_parts
from benchmarks.result import result, spread
from shards.column import Json

_LEAST_ROUNDS = 3
_PART_ROUNDS = 3
_VARIANT_CHARS = 40
NO_GPU = "without a CUDA device: it shows that all arms run, and says nothing about a GPU"


def measure(config: LatencyConfig) -> dict[str, Any]:
    """Count, then time all arms and return the result document.

    Raises:
        UserError: settings that cannot be measured, or a model that cannot be loaded.
    """
    import torch

    check_config(config)
    on_gpu = torch.cuda.is_available()
    config = config.resolved(on_gpu=on_gpu)
    base = None if config.model in RANDOM_MODELS else open_pipeline(config.model)
    parts = random_parts(config.model) if base is None else parts_of(base)
    calls = _calls(config, parts)
    latent = calls[0].height // parts.vae_scale_factor, calls[0].width // parts.vae_scale_factor
    specs = list_arms(config, tuple(f"{c.batch}x{c.height}x{c.width}" for c in calls))
    counts = count_all(config, parts, latent)
    reason = "" if on_gpu else obstacle(config, parts, counts["flops"], len(specs))
    figures: Json = {"rows": [], "arms": [], "counts": counts, "note": ""}
    if reason:
        figures["not_measured"] = reason
    else:
        bench = Bench(config, specs, base or open_pipeline(config.model), calls)
        figures |= bench.run() | {"note": "" if on_gpu else NO_GPU}
    variant = _slug(Path(config.model).name)[:_VARIANT_CHARS]
    return result("latency", config, variant=variant, **figures)


def _calls(config: LatencyConfig, parts: ModelParts) -> list[Call]:
    size: int | list[int] = parts.unet["sample_size"]
    sides = [size, size] if isinstance(size, int) else size
    own = [side * parts.vae_scale_factor for side in sides]
    return [
        Call(
            batch=batch,
            height=config.height or own[0],
            width=config.width or own[1],
            steps=config.steps,
            guidance=config.guidance,
        )
        for batch in config.batch_sizes
    ]


class Bench:
    """All arms over all batch sizes.

    Args:
        config: what was asked for.
        specs: the arms.
        base: float32 pipeline on the CPU.
        calls: one for each batch size.
    """

    def __init__(
        self, config: LatencyConfig, specs: Sequence[ArmSpec], base: Any, calls: Sequence[Call]
    ) -> None:
        import torch

        self._config, self._calls = config, calls
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._arms: list[Arm] = []
        for spec in specs:
            self._arms.append(arm := open_arm(spec, base, device, config.scheduler))
            print(f"{spec.name}: set up in {arm.setup_sec:.1f} s", *arm.lines, sep="\n  ")
        self._folder = Path(config.images) / Path(config.model).name
        self._deadline = monotonic() + 60 * config.max_minutes

    def run(self) -> Json:
        """Time everything.

        Returns:
            `arms`: what each is, and `rows`: a row for each batch size and arm.
        """
        arms = [
            {
                "name": arm.spec.name,
                "setup_sec": arm.setup_sec,
                "lines": list(arm.lines),
                "fast": asdict(arm.spec.fast) if arm.spec.fast else None,
            }
            for arm in self._arms
        ]
        rows: list[Json] = []
        for call in self._calls:
            rows += self._rows(call)
        return {"arms": arms, "rows": rows}

    def _rows(self, call: Call) -> list[Json]:
        rows: list[Json] = [
            {"arm": arm.spec.name, "batch_size": call.batch, "samples_sec": []}
            for arm in self._arms
        ]
        images: dict[str, list[np.ndarray]] = {}
        for number in range(self._config.warmup + self._config.trials):
            is_warm = number >= self._config.warmup
            if number - self._config.warmup >= _LEAST_ROUNDS and monotonic() > self._deadline:
                break
            for arm, row in zip(self._arms, rows, strict=True):
                if "not_measured" not in row:
                    self._try(arm, call, row, images, is_timed=is_warm)
        for arm, row in zip(self._arms, rows, strict=True):
            if "not_measured" not in row:
                row |= _summary(row["samples_sec"])
                row["parts"] = _parts(arm, call)
        _compare_speeds(rows)
        if self._config.image_diff:
            self._compare_images(rows, images)
        return rows

    def _try(
        self,
        arm: Arm,
        call: Call,
        row: Json,
        images: dict[str, list[np.ndarray]],
        *,
        is_timed: bool,
    ) -> None:
        import torch

        try:
            seconds, images[arm.spec.name] = time_call(arm, call)
        except torch.OutOfMemoryError:
            row["not_measured"] = "out of memory"
            images.pop(arm.spec.name, None)
        else:
            row["samples_sec"] += [seconds] if is_timed else []
            return
        gc.collect()
        torch.cuda.empty_cache()

    def _compare_images(self, rows: list[Json], images: dict[str, list[np.ndarray]]) -> None:
        """Each arm's last images with the first arm's that ran."""
        from serve.image_diff import write_differences

        if not images:
            return
        reference, expected = next(iter(images.items()))
        for row in rows:
            if row["arm"] not in images or row["arm"] == reference:
                continue
            folder = self._folder / f"batch-{row['batch_size']}" / _slug(row["arm"])
            names = _slug(row["arm"]), _slug(reference)
            found = write_differences(folder, images[row["arm"]], expected, names)
            row["image_diff"] = {
                "reference": reference,
                "max_levels": max(each.max_levels for each in found),
                "mean_levels": max(each.mean_levels for each in found),
                "psnr_db": min((d.psnr_db for d in found if d.psnr_db), default=None),
                "folder": str(folder),
            }


def _summary(samples_sec: list[float]) -> Json:
    return {"call_sec": spread(samples_sec), "p95_sec": float(np.percentile(samples_sec, 95))}


def _parts(arm: Arm, call: Call) -> Json:
    """Spreads by part, and the samples."""
    samples = [time_parts(arm, call) for _ in range(_PART_ROUNDS)]
    return {name: spread([s[name] for s in samples]) for name in PARTS} | {"samples": samples}


def _compare_speeds(rows: list[Json]) -> None:
    """How much faster each arm of ours is than the fastest plain one, round by round."""
    measured = [row for row in rows if "call_sec" in row]
    plain = [row for row in measured if row["arm"].startswith("plain")]
    best = min(plain, key=lambda row: row["call_sec"]["median"], default=None)
    for row in measured:
        if best and row not in plain:
            pairs = zip(best["samples_sec"], row["samples_sec"], strict=True)
            row["speedup"] = {"over": best["arm"]} | spread([plain / own for plain, own in pairs])


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
