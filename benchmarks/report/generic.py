"""Any result, as tables of its figures: for themes that have no form of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.report.blocks import NOTHING, Block, Card, Table
from benchmarks.report.number_format import quantity
from benchmarks.report.sources import Document

_SHOWN_APART = ("format", "theme", "variant", "protocol", "environment")
_NAMES = ("load", "rung", "unet", "resolution", "verdict", "not_measured")  # of rows


def generic_card(document: Document) -> Card:
    """One table of single figures, and one for each list of objects."""
    figures = {n: v for n, v in document.fields.data.items() if n not in _SHOWN_APART}
    rows = [[name, quantity(name, value)] for name, value in _single(figures)]
    blocks: list[Block] = []
    if rows:
        blocks.append(Table(title="Figures", header=["figure", "value"], rows=rows))
    blocks += [_list_table(name, rows) for name, rows in _lists(figures)]
    what = ", ".join(filter(None, (document.theme, document.fields.shown("variant", default=""))))
    return Card(title=f"{what}: {document.device}", blocks=blocks)


def _single(value: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Names with dots, and numbers, words and spreads; lists of them as one text."""
    for key, each in value.items():
        name = f"{path}{key}"
        if isinstance(each, dict) and not _is_spread(each):
            yield from _single(each, f"{name}.")
        elif not isinstance(each, list):
            yield name, each
        elif not _is_list_of_objects(each):
            shown = ", ".join(quantity(name, item) for item in each[:12]) or "none"
            yield name, f"{shown}, … ({len(each)} in all)" if len(each) > 12 else shown


def _lists(value: dict[str, Any], path: str = "") -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for key, each in value.items():
        if isinstance(each, dict):
            yield from _lists(each, f"{path}{key}.")
        elif isinstance(each, list) and _is_list_of_objects(each):
            yield f"{path}{key}", each


def _list_table(name: str, rows: list[dict[str, Any]]) -> Table:
    flat = [dict(_single(row)) for row in rows]
    columns = list(dict.fromkeys(column for row in flat for column in row))
    # Names first: a table that is too wide shows its left side.
    columns.sort(key=lambda column: column not in _NAMES)
    return Table(
        title=name,
        header=columns,
        rows=[[quantity(c, row[c]) if c in row else NOTHING for c in columns] for row in flat],
    )


def _is_list_of_objects(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(item, dict) for item in value)


def _is_spread(value: dict[str, Any]) -> bool:
    return value.keys() == {"median", "p10", "p90"}
