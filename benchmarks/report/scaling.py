"""Scaling over processes: what was measured, and what is predicted, apart."""

from __future__ import annotations

from benchmarks.report.blocks import NOTHING, Bar, Bars, Block, Card, Facts, Table, Text
from benchmarks.report.fields import Fields, Spread
from benchmarks.report.number_format import NBSP, num_bytes, percent, quantity, seconds, spread_text
from benchmarks.report.sources import Document

_NO_SPEED = Spread(median=0.0, p10=0.0, p90=0.0)


def scaling_card(document: Document) -> Card:
    """Images per second and efficiency by world size, then the prediction."""
    fields = document.fields
    rows = fields.rows("rows")
    blocks: list[Block] = [_speeds(rows), _efficiencies(rows)] if rows else []
    notes = fields.texts("notes")
    if notes:
        blocks.append(Text(text=f"Note: {'; '.join(notes)}."))
    if fields.find("predicted") is not None:
        blocks += _predicted(fields.fields("predicted"))
    return Card(title=document.device, blocks=blocks)


def _speeds(rows: list[Fields]) -> Bars:
    bars = [_bar(row, "images_per_sec", f"{NBSP}img/s", size=1.0) for row in rows]
    return Bars(title="Images per second, measured", bars=bars)


def _efficiencies(rows: list[Fields]) -> Bars:
    return Bars(
        title="Efficiency, measured: images per second of a process, over those of one alone",
        bars=[_bar(row, "efficiency", "%", size=0.01) for row in rows],
        mark=1.0,
        mark_text="100%",
    )


def _bar(row: Fields, figure: str, unit: str, *, size: float) -> Bar:
    count = row.count("num_processes")
    label = _with_sharding(row, f"{count} process" if count == 1 else f"{count} processes")
    if row.find("not_measured") is not None:
        return Bar(label=label, value=_NO_SPEED, text=f"not measured: {row.text('not_measured')}")
    value = row.spread(figure)
    return Bar(label=label, value=value, text=spread_text(value, unit, size=size))


def _with_sharding(row: Fields, label: str) -> str:
    sharding = row.text("sharding", default="none")
    return label if sharding == "none" else f"{label}, {sharding}"


# The prediction -----------------------------------------------------------------------------------


def _predicted(predicted: Fields) -> list[Block]:
    bars, table = [], []
    for row in predicted.rows("rows"):
        efficiency = row.number("efficiency")
        label = _with_sharding(row, f"{row.count('num_devices'):,} devices")
        value = Spread(median=efficiency, p10=efficiency, p90=efficiency)
        text = f"{percent(efficiency)}, predicted"
        bars.append(Bar(label=label, value=value, text=text, kind="predicted"))
        table.append([label, percent(efficiency), *_communication(row)])
    assumptions = predicted.fields("assumptions").data
    facts = [(name.replace("_", " "), _fact(name, each)) for name, each in assumptions.items()]
    header = ["devices", "efficiency, predicted", "without overlap", "sent by a device, per step"]
    blocks: list[Block] = [
        Bars(title="Efficiency, predicted: not measured", bars=bars, mark=1.0, mark_text="100%"),
        Table(title="Predicted, not measured", header=[*header, "communication"], rows=table),
        Facts(facts=[(f"assumed: {name}", each) for name, each in facts]),
    ]
    if predicted.find("published"):
        blocks.append(_published(predicted.rows("published")))
    return blocks


def _communication(row: Fields) -> list[str]:
    without, sent = row.find("efficiency_without_overlap"), row.find("sent_bytes_per_device")
    took = row.find("communication_sec")
    return [
        NOTHING if without is None else percent(row.number("efficiency_without_overlap")),
        NOTHING if sent is None else num_bytes(row.number("sent_bytes_per_device")),
        NOTHING if took is None else seconds(row.number("communication_sec")),
    ]


def _fact(name: str, value: object) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else quantity(name, value)


def _published(rows: list[Fields]) -> Table:
    return Table(
        title="Published by others, to hold the prediction against",
        header=["source", "devices", "against", "efficiency"],
        rows=[
            [
                row.text("source"),
                f"{row.count('num_devices'):,}",
                f"{row.count('against'):,}",
                percent(row.number("efficiency")),
            ]
            for row in rows
        ],
    )
