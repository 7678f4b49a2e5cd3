"""Numbers as people read them: three significant digits, and a unit that fits the size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from benchmarks.report.fields import Spread, is_number

NBSP = "\N{NO-BREAK SPACE}"
_TIMES = (
    *((2 * 86_400, 86_400.0, "days"), (2 * 3600, 3600.0, "h"), (120, 60.0, "min")),
    *((1, 1.0, "s"), (1e-3, 1e-3, "ms"), (1e-6, 1e-6, "µs"), (0, 1e-9, "ns")),
)
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def three_digits(value: float) -> str:
    """`31,954` → `32,000`; `0.03124` → `0.0312`; `3.05e-05`."""
    if not math.isfinite(value):
        return "not finite"
    rounded = float(f"{value:.3g}")
    if rounded == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(rounded)))
    if magnitude < -4 or magnitude > 14:
        return f"{rounded:.2e}"
    return f"{rounded:,.{max(0, 2 - magnitude)}f}"


def number(value: float) -> str:
    """Counts exactly, measurements to three digits or to the unit."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else three_digits(value)


def percent(frac: float) -> str:
    """`0.954` → `95.4%`; no more than two decimals."""
    return f"{three_digits(100 * frac)}%" if abs(frac) >= 0.01 else f"{100 * frac:.2f}%"


def seconds(value: float) -> str:
    """In the unit that fits."""
    size, unit = time_unit(value)
    return f"{three_digits(value / size)}{NBSP}{unit}"


def time_unit(value_sec: float) -> tuple[float, str]:
    """Seconds in a unit, and its name, for a time of this length."""
    return next((size, unit) for least, size, unit in _TIMES if abs(value_sec) >= least)


def num_bytes(value: float) -> str:
    """In decimal units."""
    size, unit = next(((s, u) for s, u in _BYTES if abs(value) >= s), _BYTES[-1])
    return f"{three_digits(value / size)}{NBSP}{unit}"


def range_text(spread: Spread, unit: str = "", *, size: float = 1.0) -> str:
    """`1.43–1.83x`.

    Args:
        spread: of the figure.
        unit: to write behind it.
        size: of the unit: what to divide by.
    """
    low, high = three_digits(spread.p10 / size), three_digits(spread.p90 / size)
    return f"{low}–{high}{unit}"


def spread_text(spread: Spread, unit: str = "", *, size: float = 1.0) -> str:
    """`1.62x (1.43–1.83)`; one number alone when there are no repeats."""
    median = f"{three_digits(spread.median / size)}{unit}"
    if spread.p10 == spread.median == spread.p90:
        return median
    return f"{median} ({range_text(spread, size=size)})"


def percent_text(spread: Spread) -> str:
    """A share with its spread."""
    median = percent(spread.median)
    if spread.p10 == spread.median == spread.p90:
        return median
    return f"{median} ({percent(spread.p10)[:-1]}–{percent(spread.p90)[:-1]})"


def seconds_text(spread: Spread) -> str:
    """A time with its spread, in one unit."""
    size, unit = time_unit(spread.median)
    return spread_text(spread, NBSP + unit, size=size)


def counted(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def precision_text(name: str) -> str:
    """A setting of mixed precision; `no` by itself reads as if there were none at all."""
    return "no (float32)" if name == "no" else name


def quantity(name: str, value: Any) -> str:
    """A value in the unit that its name ends in (`_sec`, `_bytes`, `_frac`, …).

    Args:
        name: of the figure; with dots, the last part that ends in a unit gives it.
        value: number, word, or a spread as JSON.
    """
    if isinstance(value, dict) and all(is_number(value.get(k)) for k in ("median", "p10", "p90")):
        median, p10, p90 = (quantity(name, value[key]) for key in ("median", "p10", "p90"))
        return f"{median} ({p10}–{p90})"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not is_number(value):
        return str(value)
    return _show_for(name)(value)


def _show_for(name: str) -> Callable[[float], str]:
    for part in reversed(name.split(".")):
        for ending, show in _BY_ENDING.items():
            if f"_{part}".endswith(ending):
                return show
        if part.startswith("num_"):
            break
    return number


_BY_ENDING: dict[str, Callable[[float], str]] = {
    "_bytes_per_sec": lambda value: f"{num_bytes(value)}/s",
    "_flops_per_sec": lambda value: f"{three_digits(value / 1e12)}{NBSP}TFLOP/s",
    "_mb_per_sec": lambda value: f"{three_digits(value)}{NBSP}MB/s",
    "_per_sec": lambda value: f"{three_digits(value)}/s",
    "_sec": seconds,
    "_ms": lambda value: seconds(value / 1e3),
    "_bytes": num_bytes,
    "_gib": lambda value: f"{three_digits(value)}{NBSP}GiB",
    "_mb": lambda value: f"{three_digits(value)}{NBSP}MB",
    "_frac": percent,
    "_usd": lambda value: f"${number(float(value))}",
}
