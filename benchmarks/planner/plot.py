"""A plan as a picture: GPU-hours by runs, days by GPUs, bytes by what is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.planner.phase import ARMS
from benchmarks.planner.words import count, unit_of
from shards.errors import UserError
from shards.storage import write_whole

_FORMATS = (".png", ".svg", ".pdf")
_COLOURS = {"online": "#c0504d", "offline": "#2f6db3", "ids": "#3f9b5a"}
_LINES = {"online": "-", "offline": "-", "ids": "--"}
_FEWEST_RUNS = 3
_MOST_TICKS = 8

Json = Mapping[str, Any]


def check_plot(path: str) -> None:
    """Refuse a file that cannot be drawn, before anything is computed."""
    if path and Path(path).suffix not in _FORMATS:
        raise UserError("--plot", path, wanted=f"a name that ends with {', '.join(_FORMATS)}")


def draw(document: Json, path: str) -> None:
    """Draw a plan.

    Args:
        document: of `benchmarks.plan.plan`.
        path: file; its ending is the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    by_runs, by_gpus, by_kind = figure.subplots(1, 3)
    _draw_runs(by_runs, document)
    draw_days = _draw_gpus if len(document["training"]) > 1 else _draw_arms
    draw_days(by_gpus, document)
    _draw_bytes(by_kind, document)
    for axes in (by_runs, by_gpus, by_kind):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.title.set_fontsize(11)
    figure.suptitle(_title(document), fontsize=12)
    suffix = Path(path).suffix
    write_whole(Path(path), partial(figure.savefig, format=suffix[1:], dpi=150))


def _title(document: Json) -> str:
    phases = [
        f"{phase['images_seen'] / 1e6:,.4g} M images at {phase['resolution']} px"
        for phase in document["phases"]
    ]
    return f"{document['preset'] or 'Plan'}: {', then '.join(phases)}"


def _draw_runs(axes: Any, document: Json) -> None:
    """GPU-hours over the number of trainings; dots are where the cache is ahead."""
    totals, planned = document["totals"], document["protocol"]["runs"]
    runs = np.linspace(0, max(_FEWEST_RUNS, planned), 2)
    for arm in ARMS:
        total = totals["arms"][arm]
        per_run = total["training_gpu_hours"] / planned
        hours = total["stage1_gpu_hours"] + runs * per_run
        axes.plot(runs, hours, _LINES[arm], color=_COLOURS[arm], label=arm)
        point = totals["break_even"].get(arm, {}).get("runs")
        if point is not None and point <= runs[-1]:
            online = totals["arms"]["online"]["training_gpu_hours"] / planned
            dot = f"{arm} ahead after {point:.2g} runs"
            axes.plot(point, point * online, "o", color=_COLOURS[arm], label=dot)
    gpus = count(totals["num_gpus"], "GPU")
    axes.set(
        title=f"GPU-hours on {gpus}, stage 1 included",
        xlabel="runs from one cache",
        xlim=(0, None),
        ylim=(0, None),
    )
    axes.yaxis.set_major_formatter(lambda hours, _: f"{hours:,.10g}")
    axes.legend(frameon=False)


def _draw_gpus(axes: Any, document: Json) -> None:
    """Days of one training over the number of GPUs, beside what perfect scaling would be."""
    from matplotlib.ticker import NullLocator

    rows = sorted(document["training"], key=lambda row: row["num_gpus"])
    gpus, days = [row["num_gpus"] for row in rows], [row["days"] for row in rows]
    ideal = [days[0] * gpus[0] / number for number in gpus]
    axes.loglog(gpus, ideal, "--", color="grey", linewidth=1, label="perfect scaling")
    axes.loglog(gpus, days, "o-", color=_COLOURS["offline"], label="offline, one training")
    for number, length in zip(gpus, days, strict=True):
        axes.annotate(
            f"{length:,.3g}",
            (number, length),
            textcoords="offset points",
            xytext=(6, 5),
            fontsize=9,
        )
    shown = gpus[:: -(-len(gpus) // _MOST_TICKS)]
    axes.set_xticks(shown, [f"{number:,}" for number in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(title="Days of one training, stage 1 not included", xlabel="GPUs")
    axes.margins(0.15)
    axes.legend(frameon=False)


def _draw_arms(axes: Any, document: Json) -> None:
    """Days of each way of training, where there is one number of GPUs alone."""
    totals, runs = document["totals"], document["protocol"]["runs"]
    lengths = [totals["arms"][arm]["days"] for arm in ARMS]
    axes.barh(ARMS, lengths, color=[_COLOURS[arm] for arm in ARMS])
    _label_bars(axes, ARMS, lengths)
    gpus, trainings = count(totals["num_gpus"], "GPU"), count(runs, "run")
    axes.set(title=f"Days on {gpus}: stage 1, {trainings}")


def _draw_bytes(axes: Any, document: Json) -> None:
    """TB of each way to store latents, the resolutions one after another, and text."""
    found, phases = document["bytes"], document["phases"]
    kinds = list(found["latents"])
    unit, scale = unit_of(max(found["stored"].values()))
    left = np.zeros(len(kinds))
    for index, phase in enumerate(phases):
        side = phase["resolution"]
        widths = [
            found["latents"][kind][str(side)] * phase["num_encoded"] / scale for kind in kinds
        ]
        shade = 0.9 - 0.5 * index / max(len(phases) - 1, 1)
        axes.barh(kinds, widths, left=left, color="#2f6db3", alpha=shade, label=f"{side} px")
        left += widths
    texts = [f"text {kind}" for kind in found["text"]]
    widths = [size * found["num_captions"] / scale for size in found["text"].values()]
    axes.barh(texts, widths, color="#8a8a8a", label="text")
    _label_bars(axes, [*kinds, *texts], [*left, *widths])
    axes.set(title=f"{unit}: one of the latents and one of the text", xlim=(0, None))
    axes.legend(frameon=False, loc="lower right")


def _label_bars(axes: Any, names: Sequence[str], widths: Sequence[float]) -> None:
    """The figure behind each bar; the first bar on top."""
    for name, width in zip(names, widths, strict=True):
        place = {"textcoords": "offset points", "xytext": (4, 0), "va": "center"}
        axes.annotate(f"{width:,.3g}", (width, name), fontsize=9, **place)
    axes.invert_yaxis()
    axes.margins(x=0.15)
