"""What feeds the training: loaders, stage 1, and the order of samples."""

from __future__ import annotations

from benchmarks.report.blocks import NOTHING, Bar, BarKind, Bars, Block, Card, Facts, Table, Text
from benchmarks.report.doubts import ratio_doubt
from benchmarks.report.fields import Fields, Spread
from benchmarks.report.number_format import (
    NBSP,
    num_bytes,
    number,
    percent,
    percent_text,
    seconds,
    seconds_text,
    spread_text,
    three_digits,
)
from benchmarks.report.sources import Document

_KINDS: dict[str, BarKind] = {"ours": "ours", "memcpy": "roof"}


def loader_card(document: Document) -> Card:
    """Samples per second of every loader, and of memcpy."""
    fields = document.fields
    arms = fields.children("arms")
    fastest_first = sorted(
        arms, key=lambda name: arms[name].number("samples_per_sec", "median"), reverse=True
    )
    whole = [name for name in fastest_first if not name.startswith("ours: ")]
    bars = [_loader_bar(name, arms[name]) for name in whole]
    blocks: list[Block] = [
        Bars(
            title="Samples per second, whole samples; memcpy of as many bytes is the roof",
            bars=bars,
        )
    ]
    if fields.find("best_peer"):
        what = f"Ours over the fastest peer, {fields.text('best_peer')}, block by block"
        blocks.append(_ratio(what, fields.spread("ours_over_best_peer")))
    header = ["loader", "version", "samples/s", "GB/s", "of memcpy", "CPU time per sample"]
    blocks.append(
        Table(
            title="Medians with p10–p90",
            header=[*header, "calls per sample", "shuffle distance"],
            rows=[_loader_row(name, arms[name]) for name in fastest_first],
        )
    )
    if absent := fields.texts("absent_peers"):
        blocks.append(Text(text=f"Not measured, not installed: {', '.join(absent)}."))
    arrays = fields.fields("sample_bytes")
    sample_bytes = sum(arrays.number(name) for name in arrays.data)
    protocol = fields.fields("protocol")
    what = f"{protocol.count('num_samples'):,} samples of {num_bytes(sample_bytes)}"
    return Card(
        title=f"{what}, batch {protocol.text('batch_size')}: {document.device}", blocks=blocks
    )


def _loader_bar(name: str, arm: Fields) -> Bar:
    speed = arm.spread("samples_per_sec")
    kind = _KINDS.get(arm.text("kind"), "other")
    return Bar(label=name, value=speed, text=spread_text(speed, "/s"), kind=kind)


def _loader_row(name: str, arm: Fields) -> list[str]:
    return [
        name,
        arm.text("version", default=NOTHING),
        spread_text(arm.spread("samples_per_sec")),
        spread_text(arm.spread("bytes_per_sec"), size=1e9),
        percent_text(arm.spread("memcpy_frac")),
        seconds(arm.number("cpu_us_per_sample", "median") / 1e6),
        three_digits(arm.number("calls_per_sample")),
        NOTHING
        if arm.find("shuffle_distance") is None
        else three_digits(arm.number("shuffle_distance")),
    ]


# Stage 1 ------------------------------------------------------------------------------------------


def stage_one_card(document: Document) -> Card:
    """Images per second of ours and of the naive arm, with and without encoders."""
    null = document.fields.fields("null_encoder")
    blocks: list[Block] = [
        _stage_one_bars(
            null, "images_per_core_sec", "Images per core-second, encoders that take no time"
        ),
        _ratio("Ours over naive, per core", null.spread("ours_over_naive_per_core")),
    ]
    if null.find("paced") is not None:
        busy = percent_text(null.spread("paced", "device_busy"))
        speed = percent(null.number("paced", "device_over_cpu_speed"))
        says = f"A simulated device at {speed} of the CPUs' speed is busy for {busy} of the time."
        blocks.append(Text(text=says))
    if document.fields.find("model") is not None:
        blocks += _model_blocks(document.fields.fields("model"))
    protocol = document.fields.fields("protocol")
    what = f"{protocol.text('model')} at {protocol.text('resolutions')} px"
    return Card(title=f"{what}: {document.device}", blocks=blocks)


def _model_blocks(model: Fields) -> list[Block]:
    """With encoders that do their work."""
    alone = model.children("alone_sec")
    flops = model.fields("flops")
    return [
        _stage_one_bars(model, "images_per_sec", "Images per second, the model's encoders"),
        _ratio("Naive time over ours", model.spread("naive_over_ours_wall")),
        Table(
            title="Each stage alone, on as many threads",
            header=["stage", "time"],
            rows=[[name, seconds_text(model.spread("alone_sec", name))] for name in alone],
        ),
        Facts(
            facts=[
                ("slowest stage", model.text("slowest_stage")),
                (
                    "pipeline over slowest stage alone",
                    spread_text(model.spread("wall_over_slowest_alone"), "x"),
                ),
                ("GFLOPs per stored row, ours", number(flops.number("ours_per_row") / 1e9)),
                ("GFLOPs per stored row, naive", number(flops.number("naive_per_row") / 1e9)),
            ]
        ),
    ]


def _stage_one_bars(part: Fields, figure: str, title: str) -> Bars:
    bars = []
    for name, arm in part.children("arms").items():
        speed = arm.spread(figure)
        kind = _KINDS.get(name, "other")
        text = spread_text(speed, f"{NBSP}img/s")
        bars.append(Bar(label=name, value=speed, text=text, kind=kind))
    return Bars(title=title, bars=sorted(bars, key=lambda bar: -bar.value.median))


def _ratio(what: str, ratio: Spread) -> Text:
    says = f"{what}: {spread_text(ratio, 'x')}"
    return Text(text=f"{'; '.join(filter(None, (says, ratio_doubt(ratio))))}.")


# The order of samples -----------------------------------------------------------------------------


def order_card(document: Document) -> Card:
    """Opening and seeking, and how well each window shuffles."""
    fields = document.fields
    protocol = fields.fields("protocol")
    rss = spread_text(fields.spread("peak_rss_mb"), f"{NBSP}MB")
    facts = [
        ("open", seconds_text(fields.spread("open_sec"))),
        ("seek into the fourth epoch", seconds_text(fields.spread("seek_sec"))),
        ("next step", spread_text(fields.spread("next_ms"), f"{NBSP}ms")),
        ("memory of the process", rss),
        ("dataset.json", num_bytes(fields.number("manifest_bytes"))),
    ]
    rows = [
        [
            f"{row.count('window'):,}",
            spread_text(row.spread("steps_of_a_shard")),
            percent_text(row.spread("epoch_frac_of_a_shard")),
            spread_text(row.spread("shards_in_a_batch")),
            spread_text(row.spread("shards_open_per_rank")),
        ]
        for row in fields.rows("shuffle")
    ]
    header = ["window", "steps a shard takes", "of the epoch", "shards in a batch"]
    table = Table(
        title="How well the order shuffles, by window",
        header=[*header, "shards open per process"],
        rows=rows,
    )
    samples, shards = (protocol.count(name) for name in ("num_samples", "num_shards"))
    title = f"{samples:,} samples in {shards:,} shards: {document.device}"
    return Card(title=title, blocks=[Facts(facts=facts), table])
