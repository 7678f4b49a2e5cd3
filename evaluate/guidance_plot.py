"""What a guidance sweep looks like: FID against CLIP score, and the pictures themselves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evaluate.generated import Generated
from evaluate.grid import write_grid
from shards.storage import Location, write_whole

_BLUE, _ORANGE = "#0072b2", "#d55e00"
_MANY_TIMES = 5


def write_plot(where: Location, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Write FID against CLIP score as a PNG, a point a scale; of scenes their accuracy beside it.

    Args:
        where: the PNG.
        rows: see `evaluate.guidance.measure_sweep`.
        title: what was measured, and by which network.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    has_scenes = "scene_accuracy" in rows[0]
    figure = Figure(figsize=(11, 4.8) if has_scenes else (6.4, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, 2 if has_scenes else 1, squeeze=False)[0]
    _plot_curve(axes[0], rows)
    if has_scenes:
        _plot_accuracy(axes[1], rows)
    write_whole(where, partial(_save, figure))


def _plot_curve(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    clip_scores = [row["clip_score"] for row in rows]
    fids = [row["fid"] for row in rows]
    axes.plot(clip_scores, fids, color=_BLUE, marker="o")
    for row, x, y in zip(rows, clip_scores, fids, strict=True):
        label = f"{row['guidance_scale']:g}"
        axes.annotate(label, (x, y), textcoords="offset points", xytext=(6, 5), fontsize=9)
    if 0 < _MANY_TIMES * min(fids) < max(fids):  # the best would lie on each other
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plain)
        axes.yaxis.set_minor_formatter(_plain)
        axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.set_xlabel("CLIP score (100 x cosine), higher is better")
    axes.set_ylabel("FID, lower is better")
    axes.set_title("one point per guidance scale", fontsize=9)
    axes.grid(alpha=0.3)


def _plain(value: float, _: int) -> str:
    return f"{value:g}"


def _plot_accuracy(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    scales = [row["guidance_scale"] for row in rows]
    right = [100 * row["scene_accuracy"]["all_right"] for row in rows]
    chance = [100 * row["scene_accuracy"]["chance"]["all_right"] for row in rows]
    axes.plot(scales, right, color=_ORANGE, marker="o", label="read back all right")
    axes.plot(scales, chance, color="grey", linestyle="--", label="by chance")
    axes.set_xlabel("guidance scale")
    axes.set_ylabel("scenes, %")
    axes.set_ylim(-3, 103)
    axes.set_title("share of pictures that show their caption", fontsize=9)
    axes.legend(loc="center right")
    axes.grid(alpha=0.3)


def _save(figure: Any, path: Path) -> None:
    # Without the date and the version of matplotlib: the same figures, the same bytes.
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})


def write_scale_grid(where: Location, folders: Sequence[Generated], num_prompts: int) -> None:
    """Write a grid of pictures: a row for each scale, a column for each of the first prompts."""
    columns = _first_of_each_prompt(folders[0].prompts, num_prompts)
    images: list[np.ndarray] = []
    captions: list[str] = []
    for generated in folders:
        scale = generated.settings["guidance_scale"]
        images += [generated.read_image(number) for number in columns]
        captions += [f"guidance {scale:g}: {generated.prompts[number]}" for number in columns]
    write_grid(where, images, captions, len(columns))


def _first_of_each_prompt(prompts: Sequence[str], count: int) -> list[int]:
    first: dict[str, int] = {}
    for number, prompt in enumerate(prompts):
        first.setdefault(prompt, number)
    return list(first.values())[:count]
