"""Numbers of a plan for people."""

from __future__ import annotations

_UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}


def count(number: float, what: str) -> str:
    """`1 run`, `3 runs`."""
    return f"{number:,.10g} {what}{'' if number == 1 else 's'}"


def days(value: float) -> str:
    """Two decimals, or two digits where that is nothing."""
    return f"{value:,.2f}" if value >= 0.1 else f"{value:.2g}"


def figure(value: float) -> str:
    """Whole, or three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def usd(value: float) -> str:
    """Whole dollars, or cents where there are few."""
    return f"${value:,.0f}" if abs(value) >= 100 else f"${value:,.2f}"


def size(num_bytes: float) -> str:
    """In the unit that fits."""
    unit, scale = unit_of(num_bytes)
    return f"{num_bytes / scale:,.4g} {unit}"


def unit_of(num_bytes: float) -> tuple[str, float]:
    """A decimal unit and its bytes: storage is sold by those."""
    fitting = (unit for unit in _UNITS.items() if num_bytes >= unit[1])
    return next(fitting, ("B", 1.0))
