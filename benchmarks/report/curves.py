"""Curves as SVG that takes its colours from the page, so that it is right in dark and in light."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_SIZE_INCHES = (4.5, 2.8)  # small, so that the text stays readable on a phone
_MAX_POINTS = 500
# matplotlib wants colours of its own kind; each stands for a variable of the page's style sheet.
_INK, _FAINT = "#010203", "#010204"
_COLOURS = ("#010211", "#010212", "#010213", "#010214", "#010215")
_VARIABLES = {
    _INK: "var(--ink)",
    _FAINT: "var(--line)",
    **{colour: f"var(--c{number})" for number, colour in enumerate(_COLOURS, start=1)},
    "#000000": "var(--ink)",
}
_DASHES = ("-", "--", ":", "-.", (0, (8, 2)))
_LOG_RATIO = 6.0  # of largest to smallest, above which an axis is logarithmic


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve.

    Args:
        label: in the legend.
        x: [N].
        y: [N]; NaN leaves a gap.
        style: number of its colour and dashes.
        thin: drawn faintly, for what another line smooths.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0
    thin: bool = False


def draw_curves(
    lines: Sequence[Line], *, x_label: str, y_label: str, ident: str, log_if_wide: bool = False
) -> str:
    """SVG markup of some lines on one pair of axes.

    Args:
        lines: to be drawn; those with many points are thinned out.
        x_label: below the axis.
        y_label: beside the axis.
        ident: put before every id within, which must be unique in the page.
        log_if_wide: a logarithmic axis where the values span a wide range; else it starts at 0.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": ident, "font.size": 10}):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            _draw_line(axes, line)
        _scale(axes, lines, log_if_wide)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=_FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=9)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _for_page(buffer.getvalue(), ident)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over a window around every value; what is not finite does not count.

    Args:
        values: [N].
        window: values in it; fewer at both ends.
    """
    array = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(array)
    ones = np.ones(max(1, window))
    start = (len(ones) - 1) // 2
    sums, counts = (
        np.convolve(part, ones)[start : start + len(array)]
        for part in (np.where(finite, array, 0.0), finite.astype(np.float64))
    )
    means: list[float] = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).tolist()
    return means


def _draw_line(axes: Any, line: Line) -> None:
    every = -(-len(line.x) // _MAX_POINTS)
    shown: dict[str, Any] = {"linewidth": 1.8}
    if line.thin:
        shown = {"linewidth": 0.8, "alpha": 0.5}
    if len(line.x) <= 12:
        shown |= {"marker": "o", "markersize": 4}
    axes.plot(
        line.x[::every],
        line.y[::every],
        label=line.label,
        color=_COLOURS[line.style % len(_COLOURS)],
        linestyle=_DASHES[line.style % len(_DASHES)],
        **shown,
    )


def _scale(axes: Any, lines: Sequence[Line], log_if_wide: bool) -> None:
    from matplotlib.ticker import (
        EngFormatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
        StrMethodFormatter,
    )

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    values = np.concatenate([np.asarray(line.y, dtype=np.float64) for line in lines])
    values = values[np.isfinite(values)]
    if log_if_wide and len(values) and 0 < values.min() < values.max() / _LOG_RATIO:
        axes.set_yscale("log")
        axis = axes.yaxis
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    elif not log_if_wide:
        axes.set_ylim(bottom=0)


def _for_page(svg: str, ident: str) -> str:
    """The drawing alone: no prolog, no style of its own, our colours, ids that occur once."""
    svg = re.sub(r"<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r'(?<=id=")|(?<=href="#)|(?<=url\(#)', f"{ident}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg
