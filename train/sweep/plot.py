"""Cost against validation loss, a point a trial."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from shards.storage import write_whole
from train.sweep.outcome import COMPLETE, Outcome, front_of

_MARKS = {COMPLETE: ("o", "tab:blue"), "pruned": ("x", "tab:gray"), "under way": ("s", "tab:olive")}


def write_plot(outcomes: list[Outcome], path: Path, unit: str, protocol: str) -> None:
    """Draw the trials that have a loss, and the front.

    Args:
        outcomes: of all trials.
        path: the PNG.
        unit: of the cost.
        protocol: what is the same in all trials; the title.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, MaxNLocator, NullLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for state, (marker, color) in _MARKS.items():
        of_state = [one for one in outcomes if one.state == state and one.loss is not None]
        if of_state:
            axes.scatter(
                [one.device_hours for one in of_state],
                [one.loss or 0.0 for one in of_state],
                marker=marker,
                color=color,
                label=state if state == COMPLETE else f"{state}, at its last validation",
            )
        for one in of_state:
            axes.annotate(
                str(one.trial),
                (one.device_hours, one.loss),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
            )
    if front := front_of(outcomes):
        axes.plot(
            [one.device_hours for one in front],
            [one.loss or 0.0 for one in front],
            drawstyle="steps-post",
            color="tab:red",
            linewidth=1,
            label="no other beats these in both",
        )
    axes.set(xlabel=unit, ylabel="validation loss", yscale="log", title=protocol)
    axes.yaxis.set(
        major_locator=MaxNLocator(6),
        major_formatter=FormatStrFormatter("%.3g"),
        minor_locator=NullLocator(),
    )
    axes.set_xlim(left=0)
    axes.legend(fontsize=8)
    write_whole(path, partial(_save, figure))


def _save(figure: object, path: Path) -> None:
    figure.savefig(path, format="png", dpi=130)  # type: ignore[attr-defined]
