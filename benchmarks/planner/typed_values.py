"""Numbers as they are typed for the planner: alone, by resolution, by number of GPUs, by name."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from shards.errors import UserError

_KEY = re.compile(r"(\d+)(?:@(\d+))?")
MOST_GPUS = 1_000_000
# No input of a job is beyond these, and no sum, product or ratio of a few overflows.
SMALLEST, LARGEST = 1e-9, 1e15
_LARGEST_RESOLUTION = 4096
_LATENT_CELL = 8  # pixels along a side; every VAE of Stable Diffusion 1, 2 and XL


def number(flag: str, text: str, *, at_most: float = LARGEST, wanted: str = "") -> float:
    """A number from `SMALLEST` to `at_most`.

    Raises:
        UserError: it is none, or beyond them.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not SMALLEST <= value <= at_most:
        bounds = f"a number from {SMALLEST:g} to {at_most:g}, such as 4e6"
        raise UserError(flag, f"{text}", wanted=wanted or bounds)
    return value


def resolutions(flag: str, text: str) -> list[int]:
    """`256,512` as numbers of pixels."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    for part in found:
        if not part.isdigit() or not _LATENT_CELL <= int(part) <= _LARGEST_RESOLUTION:
            raise UserError(flag, part, wanted="sides in pixels, such as 256,512")
        if int(part) % _LATENT_CELL:
            raise UserError(flag, part, wanted=f"multiples of {_LATENT_CELL} (the VAE's factor)")
    if not found or len(set(found)) < len(found):
        raise UserError(
            flag,
            text or "not given",
            wanted="each phase's once, such as 256,512",
            remedy="" if text else "or begin from a job: --preset mosaicml-a100",
        )
    return [int(part) for part in found]


def by_resolution(
    flag: str, entries: Sequence[str], wanted: Sequence[int], *, at_most: float = LARGEST
) -> dict[int, float]:
    """`4e6`, for all, or `256=790e6`; not necessarily of every resolution.

    Args:
        flag: for errors.
        entries: as they were typed.
        wanted: resolutions that there are.
        at_most: for each number.
    """
    found: dict[int, float] = {}
    for resolution, gpus, value in _entries(flag, entries, wanted, at_most):
        if gpus:
            raise UserError(flag, f"{resolution}@{gpus}", wanted=f"{resolution}=<number>")
        found[resolution] = value
    return found


def curves(flag: str, entries: Sequence[str], wanted: Sequence[int]) -> dict[int, dict[int, float]]:
    """Images per second of one GPU by resolution and number of GPUs, from rates of all together."""
    found: dict[int, dict[int, float]] = {}
    for resolution, gpus, value in _entries(flag, entries, wanted, LARGEST):
        found.setdefault(resolution, {})[gpus or 1] = value / (gpus or 1)
    return found


def prices(flag: str, entries: Sequence[str]) -> dict[str, float]:
    """Dollars by the plan's name; one without a name is called by its price."""
    found: dict[str, float] = {}
    for entry in entries:
        name, separator, text = entry.rpartition("=")
        value = number(flag, text, wanted="dollars per GPU-hour: 2.50, or spot=2.50")
        name = name.strip() if separator else f"${value:.2f}/h"
        if not name or name in found:
            raise UserError(flag, entry, wanted="each plan once, under a name of its own")
        found[name] = value
    return found


def _entries(
    flag: str, entries: Sequence[str], wanted: Sequence[int], at_most: float
) -> list[tuple[int, int, float]]:
    """(resolution, GPUs or 0, number); one without a resolution stands for all of them."""
    found: list[tuple[int, int, float]] = []
    for entry in (part for text in entries for part in text.split(",") if part):
        key, separator, text = entry.rpartition("=")
        value = number(flag, text, at_most=at_most)
        if not separator:
            found += [(resolution, 0, value) for resolution in wanted]
            continue
        if not (match := _KEY.fullmatch(key)) or int(match[1]) not in wanted:
            phases = ", ".join(map(str, wanted))
            raise UserError(flag, entry, wanted=f"a resolution among {phases} before the =")
        gpus = int(match[2]) if match[2] else 0
        if match[2] and not 1 <= gpus <= MOST_GPUS:
            raise UserError(flag, entry, wanted=f"1 to {MOST_GPUS:,} GPUs after the @")
        found.append((int(match[1]), gpus, value))
    keys = [(resolution, gpus or 1) for resolution, gpus, _ in found]
    if len(set(keys)) < len(keys):
        raise UserError(flag, " ".join(entries), wanted="one number for each resolution")
    return found
