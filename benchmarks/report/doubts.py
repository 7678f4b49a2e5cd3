"""What a reader should doubt in a figure, in words beside it."""

from __future__ import annotations

from benchmarks.report.fields import Spread
from benchmarks.report.number_format import percent, seconds, three_digits

_WIDE = 1.5  # p90 over p10 of a ratio
_LEAST_FRAC, _MOST_FRAC = 0.6, 1.4  # of a step, that its parts sum to
_NOISY = "the machine was too noisy to conclude from this"


def ratio_doubt(ratio: Spread) -> str:
    """Of a ratio of two speeds whose blocks disagree; empty where there is none."""
    if ratio.p10 < 1 < ratio.p90:
        return f"{_NOISY}: p10–p90 crosses 1"
    if ratio.p90 > _WIDE * ratio.p10:
        return f"{_NOISY}: p90 is more than {three_digits(_WIDE)} times p10"
    return ""


def share_doubt(share: Spread) -> str:
    """Of a share of the ceiling that is above it; empty where there is none."""
    return "above 100%: noise, nothing is faster than its ceiling" if share.median > 1 else ""


def parts_doubt(label: str, parts_sec: float, whole_sec: float) -> str:
    """Of parts that are far from adding up; empty where there is none.

    Args:
        label: of the arm.
        parts_sec: their sum, each timed alone.
        whole_sec: the step.
    """
    if _LEAST_FRAC * whole_sec <= parts_sec <= _MOST_FRAC * whole_sec:
        return ""
    if parts_sec < whole_sec:
        why = "the rest is waiting, work that is not among the parts, or other load on the machine"
    else:
        why = "they overlap within the step, or the machine was slower while they were timed"
    sums = f"{seconds(parts_sec)} against a step of {seconds(whole_sec)}"
    frac = f" ({percent(parts_sec / whole_sec)})" if whole_sec else ""
    return f"{label}: the parts sum to {sums}{frac}; {why}."
