"""The training step: every row of the sweep, and bars along each setting that was varied."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from benchmarks.report.blocks import NOTHING, Bar, Bars, Card, Table, Text
from benchmarks.report.doubts import ratio_doubt
from benchmarks.report.fields import Fields, Spread
from benchmarks.report.number_format import (
    NBSP,
    percent,
    percent_text,
    precision_text,
    seconds,
    spread_text,
    three_digits,
)
from benchmarks.report.sources import Document
from shards.errors import UserError

_OURS = "latentmill"
_NO_SPEED = Spread(median=0.0, p10=0.0, p90=0.0)
_AXES = {
    "micro_batch": "micro-batch",
    "ema": "EMA",
    "attention": "attention",
    "precision": "precision",
    "compile": "compile",
}


def step_cards(document: Document) -> list[Card]:
    """One for each preset."""
    rows = document.fields.rows("rows")
    if not rows:
        raise UserError(document.path, "rows is empty")
    by_preset: dict[str, list[Fields]] = defaultdict(list)
    for row in rows:
        by_preset[row.text("preset")].append(row)
    left_out = document.fields.texts("left_out")
    return [
        Card(
            title=f"{preset}: {document.device}",
            blocks=[
                *_loop_bars(rows),
                *_comparisons(document.fields, preset),
                *(bars for axis in _AXES for bars in _axis_bars(rows, axis)),
                *_ema_tables(document.fields, preset),
                _table(rows),
                *_left_out([what for what in left_out if what.startswith(f"{preset},")]),
            ],
        )
        for preset, rows in by_preset.items()
    ]


def _loop(row: Fields) -> str:
    return row.text("loop", default=_OURS)


def _is_measured(row: Fields) -> bool:
    return row.find("not_measured") is None


def _loop_bars(rows: list[Fields]) -> Iterator[Bars]:
    """The fastest row of each loop, with EMA and without: the two are not the same work."""
    fastest: dict[str, dict[str, Fields]] = defaultdict(dict)
    for row in filter(_is_measured, rows):
        of_ema = fastest[row.text("ema")]
        if _speed(row) >= _speed(of_ema.setdefault(_loop(row), row)):
            of_ema[_loop(row)] = row
    for ema, by_loop in fastest.items():
        if len(by_loop) > 1:
            title = f"Images per second, each loop at its fastest settings here, EMA {ema}"
            bars = [_bar(row, loop, note=_settings(row)) for loop, row in by_loop.items()]
            yield Bars(title=title, bars=bars)


def _comparisons(fields: Fields, preset: str) -> Iterator[Text]:
    """Block by block, so with a spread; the bars above cannot say that."""
    found = fields.rows("comparisons") if fields.find("comparisons") else []
    for each in found:
        if each.text("preset") == preset:
            ratio = each.spread("speedup")
            what = f"EMA {each.text('ema')}: latentmill over the plain diffusers loop"
            says = (f"{what}, each at its best: {spread_text(ratio, 'x')}", ratio_doubt(ratio))
            yield Text(text=f"{'; '.join(filter(None, says))}.")


def _ema_tables(fields: Fields, preset: str) -> Iterator[Table]:
    """With and without EMA by micro-batch, as others publish it."""
    found = fields.rows("ema_costs") if fields.find("ema_costs") else []
    rows = [
        [
            each.text("micro_batch"),
            each.text("loop"),
            spread_text(each.spread("ema_images_per_sec")),
            spread_text(each.spread("no_ema_images_per_sec")),
            percent_text(each.spread("cost_frac")),
        ]
        for each in found
        if each.text("preset") == preset
    ]
    if rows:
        header = ["micro-batch", "loop", "img/s, EMA", "img/s, no EMA", "EMA costs"]
        yield Table(title="With and without EMA, alike otherwise", header=header, rows=rows)


def _axis_bars(rows: list[Fields], axis: str) -> list[Bars]:
    """Rows of ours that differ in one setting alone: the largest such group."""
    groups: dict[tuple[str, ...], list[Fields]] = defaultdict(list)
    for row in rows:
        if _loop(row) == _OURS:
            groups[tuple(row.text(other) for other in _AXES if other != axis)].append(row)
    largest = max(
        groups.values(), key=lambda rows: (len(rows), rows[-1].number("micro_batch")), default=[]
    )
    if len(largest) < 2 or not any(map(_is_measured, largest)):
        return []
    shared = ", ".join(
        f"{name} {_setting(largest[0], other)}" for other, name in _AXES.items() if other != axis
    )
    bars = [_bar(row, f"{_AXES[axis]} {_setting(row, axis)}") for row in largest]
    return [Bars(title=f"Images per second by {_AXES[axis]} ({shared})", bars=bars)]


def _bar(row: Fields, label: str, note: str = "") -> Bar:
    if not _is_measured(row):
        return Bar(label=label, value=_NO_SPEED, text=_reason(row), note=note)
    speed = row.spread("images_per_sec")
    return Bar(
        label=label,
        value=speed,
        text=spread_text(speed, f"{NBSP}img/s"),
        note=note,
        kind="ours" if _loop(row) == _OURS else "other",
    )


def _speed(row: Fields) -> float:
    return row.number("images_per_sec", "median")


def _reason(row: Fields) -> str:
    return f"not measured: {row.text('not_measured')}"


def _setting(row: Fields, axis: str) -> str:
    name = row.text(axis)
    return precision_text(name) if axis == "precision" else name


def _settings(row: Fields) -> str:
    return ", ".join(f"{name} {_setting(row, axis)}" for axis, name in _AXES.items())


def _table(rows: list[Fields]) -> Table:
    header = ["loop", *_AXES.values(), "img/s", "steps/s", "MFU", "memory", "data wait", "set-up"]
    return Table(
        title="All rows, medians with p10–p90",
        header=[*header, "attention that ran"],
        rows=[
            [_loop(row), *(_setting(row, axis) for axis in _AXES), *_figures(row)] for row in rows
        ],
    )


def _figures(row: Fields) -> list[str]:
    if not _is_measured(row):
        return [_reason(row), *[NOTHING] * 6]
    visits = row.rows("visits")
    if not visits:
        raise UserError("rows", "has figures, but no visits")
    return [
        spread_text(row.spread("images_per_sec")),
        three_digits(row.number("iters_per_sec", "median")),
        percent(row.number("mfu", "median")),
        f"{three_digits(row.number('peak_mem_gib'))}{NBSP}GiB",
        percent(row.number("data_wait_frac", "median")),
        seconds(visits[-1].number("setup_sec")),
        visits[-1].text("attention"),
    ]


def _left_out(cases: list[str]) -> list[Text]:
    if not cases:
        return []
    return [Text(text=f"Left out for lack of time: {'; '.join(cases)}.")]
