"""A plan for people: tables of about 100 columns, then what they rest on and leave out."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.planner.business_text import describe_case
from benchmarks.planner.phase import ARMS
from benchmarks.planner.sources import PRESET
from benchmarks.planner.stored_bytes import TB
from benchmarks.planner.words import count, days, figure, size, usd

_WIDTH = 100
_MEANS = {
    "online": "online: encoders in every step",
    "offline": "offline: latents, text stored",
    "ids": "ids: latents, text encoder runs",
}
_FEED = ("mb_per_sec_per_gpu", "mb_per_sec_per_node", "mb_per_sec")

Json = Mapping[str, Any]


def print_plan(document: Json) -> None:
    """All tables, then what they rest on."""
    phases = [
        f"{phase['images_seen']:,.0f} images at {phase['resolution']} px "
        f"({phase['epochs']:.3g} epochs of {phase['num_images']:,.0f})"
        for phase in document["phases"]
    ]
    print(textwrap.fill(f"{document['preset'] or 'plan'}: {', then '.join(phases)}", _WIDTH))
    for section in (_training, _stage_one, _totals, _break_even, _bytes, _feed):
        section(document)
    if document["business_case"]:
        _head("Against the expected return (an input: nothing here predicts it)")
        _items(describe_case(document["business_case"]))
    _head("What this rests on")
    _items(_inputs(document["inputs"]))
    _head("What it leaves out")
    _items(document["notes"])


def _inputs(inputs: Sequence[Json]) -> Iterator[str]:
    """Those of a preset without its source, which follows once."""
    for entry in inputs:
        source = "" if entry["kind"] == PRESET else f": {entry['words']}"
        yield f"{entry['name']}: {entry['value']} [{entry['kind']}{source}]"
    for words in {entry["words"] for entry in inputs if entry["kind"] == PRESET}:
        yield f"preset: {words}"


def _training(document: Json) -> None:
    plans = document["usd_per_gpu_hour"]
    sides = [phase["resolution"] for phase in document["phases"]]
    header = ["GPUs", *(f"img/s {side}" for side in sides), *(f"scaling {side}" for side in sides)]
    rows = [
        [
            f"{row['num_gpus']:,}",
            *(_rate(phase) for phase in row["phases"]),
            *(_scaling(phase) for phase in row["phases"]),
            *(days(row["days"]), figure(row["gpu_hours"])),
            *(usd(row["usd"][plan]) for plan in plans),
        ]
        for row in document["training"]
    ]
    _head("One training from latents, stage 1 not included")
    _table([*header, "days", "GPU-hours", *plans], rows)
    phases = [phase for row in document["training"] for phase in row["phases"]]
    if not all(phase["is_known_count"] for phase in phases):
        print("  ~ computed from the speed at other numbers of GPUs")
    if any(phase["is_assumed_efficiency"] for phase in phases):
        print("  ? assumed: nothing says what scaling costs (--efficiency, or a scaling result)")


def _stage_one(document: Json) -> None:
    plans = document["usd_per_gpu_hour"]
    rows = [
        [
            f"{row['num_gpus']:,}",
            days(row["days"]),
            figure(row["gpu_hours"]),
            *(usd(row["usd"][plan]) for plan in plans),
            f"  {row['kind']}" if index == 0 else f"  {row['kind']}, to compare; not counted below",
        ]
        for index, row in enumerate(document["stage_one"])
    ]
    _head("Stage 1, once")
    _table(["GPUs", "days", "GPU-hours", *plans, ""], rows, words=True)


def _totals(document: Json) -> None:
    totals, plans = document["totals"], document["usd_per_gpu_hour"]
    arms = totals["arms"]
    rows = [
        [
            _MEANS[arm],
            days(arms[arm]["days"]),
            figure(arms[arm]["gpu_hours"]),
            f"{arms['online']['gpu_hours'] / arms[arm]['gpu_hours']:.3f}x",
            size(arms[arm]["stored_bytes"]) if arms[arm]["stored_bytes"] else "0",
            *(usd(arms[arm]["usd"][plan]["total"]) for plan in plans),
        ]
        for arm in ARMS
    ]
    runs = count(document["protocol"]["runs"], "run")
    _head(f"All in all: {runs} on {count(totals['num_gpus'], 'GPU')}, stage 1 and storage included")
    _table(["", "days", "GPU-hours", "gain", "stored", *plans], rows)
    for arm in ("offline", "ids"):
        extras = next(iter(arms[arm]["usd"].values()), {"storage": 0.0, "egress": 0.0})
        if extras["storage"] or extras["egress"]:
            months = f"{arms[arm]['storage_months']:.2g} months"
            stored = f"storage {usd(extras['storage'])} for {months}"
            print(f"  {arm}, of that: {stored}, egress {usd(extras['egress'])}")


def _break_even(document: Json) -> None:
    totals, plans = document["totals"], document["usd_per_gpu_hour"]
    runs, points = list(totals["gain"]), totals["break_even"]
    rows = [
        [
            arm,
            *(f"{totals['gain'][run][arm]:.3f}x" for run in runs),
            _share(point["runs"]),
            *(_share(point["usd_runs"][plan]) for plan in plans),
        ]
        for arm, point in points.items()
    ]
    _head("Gain over online in GPU-hours, stage 1 included; ahead of it after this share of a run")
    _table(["", *(count(int(run), "run") for run in runs), "ahead after", *plans], rows)
    for arm, point in points.items():
        if point["runs"] is not None:
            epochs = [f"{number:.2g} at {side}" for side, number in point["epochs"].items()]
            print(f"  {arm}, ahead after epochs: {' + '.join(epochs)}")


def _share(runs: float | None) -> str:
    return "never" if runs is None else f"{runs:.0%}"


def _bytes(document: Json) -> None:
    found, chosen = document["bytes"], document["protocol"]
    sides = [str(phase["resolution"]) for phase in document["phases"]]
    counts = [phase["num_encoded"] for phase in document["phases"]]
    header = ["", *(name for side in sides for name in (f"B at {side}", "all")), ""]
    rows = []
    for kind, sizes in found["latents"].items():
        pairs = zip(sides, counts, strict=True)
        cells = [(f"{sizes[side]:,}", size(sizes[side] * number)) for side, number in pairs]
        mark = "  <- chosen" if kind == chosen["latents"] else ""
        rows.append([f"latents {kind}", *(cell for pair in cells for cell in pair), mark])
    for kind, each in found["text"].items():
        total = size(each * found["num_captions"])
        mark = "  <- chosen" if kind == chosen["text"] else ""
        rows.append([f"text {kind}", f"{each:,}", total, *[""] * (2 * len(sides) - 2), mark])
    _head("Bytes of an image or caption, and of all; row index and checksum included")
    _table(header, rows, words=True)
    price = chosen["storage_usd_per_tb_month"]
    stored = [
        f"{arm} {size(total)}" + (f" ({usd(total / TB * price)} a month)" if price else "")
        for arm, total in found["stored"].items()
    ]
    print(f"  stored: {', '.join(stored)}")


def _feed(document: Json) -> None:
    header = ["GPUs", "px", "offline: GPU", "node", "all", "ids: GPU", "node", "all"]
    rows = [
        [
            f"{row['num_gpus']:,}",
            f"{row['resolution']}",
            *(figure(row[arm][name]) for arm in ("offline", "ids") for name in _FEED),
        ]
        for row in document["feed"]
    ]
    _head(f"MB/s that training reads; a node has {document['protocol']['gpus_per_node']} GPUs")
    _table(header, rows)


def _rate(phase: Json) -> str:
    known = "" if phase["is_known_count"] else "~"
    return f"{known}{figure(phase['images_per_sec'])}"


def _scaling(phase: Json) -> str:
    assumed = "?" if phase["is_assumed_efficiency"] else ""
    return f"{phase['efficiency']:.0%}{assumed}"


# Layout -------------------------------------------------------------------------------------------


def _head(text: str) -> None:
    print(f"\n{text}")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False) -> None:
    """The first column to the left, numbers to the right; with `words` the last to the left."""
    widths = [max(map(len, column)) + 3 for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        first, *rest = row
        line = f"{first:<{widths[0] - 3}}"
        for position, cell in enumerate(rest, 1):
            is_last = words and position == len(rest)
            line += cell if is_last else f"{cell:>{widths[position]}}"
        print(f"  {line}".rstrip())


def _items(texts: Iterable[str]) -> None:
    for text in texts:
        print(textwrap.fill(text, _WIDTH, initial_indent="  - ", subsequent_indent="    "))
