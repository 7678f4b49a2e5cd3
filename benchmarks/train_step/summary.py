"""What the rows of the training step say together: best against best, and what EMA costs."""

from __future__ import annotations

from typing import Any

from benchmarks.result import spread
from benchmarks.train_step.plan import family
from shards.column import Json

_SETTINGS = ("loop", "micro_batch", "attention", "precision", "compile")


def compare_loops(rows: list[Json]) -> list[Json]:
    """The fastest row of our trainer against the fastest of the plain loop, with equal EMA.

    Args:
        rows: of the result document.

    Returns:
        for each preset and EMA that both were measured with: the settings and images per second of
        either, `speedup` with its spread and `samples`, block by block in the order of time.
    """
    found: dict[tuple[str, str], dict[str, Json]] = {}
    for row in _measured(rows):
        best = found.setdefault((row["preset"], row["ema"]), {})
        loop = family(row["loop"])
        if loop not in best or _median(row) > _median(best[loop]):
            best[loop] = row
    comparisons = []
    for (preset, ema), best in found.items():
        if len(best) == 2:
            ratios = _ratios(best["latentmill"], best["diffusers"])
            either = {loop: _settings_and_speed(row) for loop, row in best.items()}
            facts = {"preset": preset, "ema": ema, **either}
            comparisons.append({**facts, "speedup": spread(ratios), "samples": ratios})
    return comparisons


def ema_costs(rows: list[Json]) -> list[Json]:
    """Rows with and without EMA that are alike otherwise, as the seed systems publish them.

    Args:
        rows: of the result document.

    Returns:
        for each pair its preset and settings, images per second of both, and `cost_frac`, the share
        of speed that EMA takes, with its spread and `samples`.
    """
    measured = _measured(rows)
    without = {_key(row): row for row in measured if row["ema"] == "off"}
    pairs = [
        (row, without[_key(row)]) for row in measured if row["ema"] == "on" and _key(row) in without
    ]
    return [
        {
            **{name: on[name] for name in ("preset", *_SETTINGS)},
            "ema_images_per_sec": on["images_per_sec"],
            "no_ema_images_per_sec": off["images_per_sec"],
            "cost_frac": spread(costs := [1 - ratio for ratio in _ratios(on, off)]),
            "samples": costs,
        }
        for on, off in pairs
    ]


def _measured(rows: list[Json]) -> list[Json]:
    """Without those that ran in no round, or out of memory in a later one."""
    return [row for row in rows if row["visits"] and not row["not_measured"]]


def _key(row: Json) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("preset", *_SETTINGS))


def _median(row: Json) -> float:
    return float(row["images_per_sec"]["median"])


def _settings_and_speed(row: Json) -> Json:
    ran = row["visits"][-1]["attention"]
    settings = {name: row[name] for name in _SETTINGS}
    return {**settings, "ran": ran, "images_per_sec": row["images_per_sec"]}


def _ratios(row: Json, other: Json) -> list[float]:
    """How many times as fast as the other, block by block; as many blocks as both have."""
    speeds, others = _speeds(row), _speeds(other)
    return [speed / base for speed, base in zip(speeds, others, strict=False)]


def _speeds(row: Json) -> list[float]:
    return [block["perf/images_per_sec"] for visit in row["visits"] for block in visit["blocks"]]
