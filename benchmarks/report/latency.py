"""What an image takes: the plain pipeline and ours."""

from __future__ import annotations

from benchmarks.report.blocks import (
    NOTHING,
    Bar,
    BarKind,
    Bars,
    Block,
    Card,
    Part,
    Stack,
    Stacks,
    Table,
    Text,
)
from benchmarks.report.doubts import ratio_doubt
from benchmarks.report.fields import Fields
from benchmarks.report.number_format import (
    counted,
    number,
    seconds,
    seconds_text,
    spread_text,
    three_digits,
)
from benchmarks.report.sources import Document

_PARTS = {
    "text encoder": "text_sec",
    "denoising": "denoise_sec",
    "VAE": "vae_sec",
    "PNG": "png_sec",
}


def latency_card(document: Document) -> Card:
    """Bars, parts and a table for each batch size; then what was counted."""
    fields = document.fields
    blocks: list[Block] = []
    if reason := fields.shown("not_measured", default=""):
        blocks.append(Text(text=f"Not measured: {reason}."))
    by_batch: dict[int, list[Fields]] = {}
    for row in fields.rows("rows"):
        by_batch.setdefault(row.count("batch_size"), []).append(row)
    for batch, rows in by_batch.items():
        blocks += _batch_blocks(counted(batch, "image"), rows)
    blocks.append(_counts_table(fields.rows("counts", "step")))
    if note := fields.shown("note", default=""):
        blocks.append(Text(text=f"Measured {note}."))
    protocol = fields.fields("protocol")
    what = f"{protocol.text('model')}, {protocol.count('steps')} steps"
    return Card(title=f"{what} of {protocol.text('scheduler')}: {document.device}", blocks=blocks)


def _batch_blocks(images: str, rows: list[Fields]) -> list[Block]:
    measured = [row for row in rows if row.find("not_measured") is None]
    table = Table(
        title=f"{images}: medians with p10–p90",
        header=["arm", "time of a call", "p95", "calls", "speed-up", "difference"],
        rows=[_row(row) for row in rows],
    )
    if not measured:
        return [table]
    doubts = [ratio_doubt(row.spread("speedup")) for row in measured if row.find("speedup")]
    noisy = [Text(text=f"{images}: {doubt}.") for doubt in dict.fromkeys(doubts) if doubt]
    bars = Bars(title=f"Seconds for {images}", bars=[_bar(row) for row in measured])
    parts = Stacks(
        title=f"Where the time goes for {images}, each part timed alone",
        names=list(_PARTS),
        stacks=[_stack(row) for row in measured],
    )
    return [bars, parts, table, *noisy]


def _bar(row: Fields) -> Bar:
    time, arm = row.spread("call_sec"), row.text("arm")
    kind: BarKind = "other" if arm.startswith("plain") else "ours"
    return Bar(label=arm, value=time, text=seconds_text(time), kind=kind)


def _stack(row: Fields) -> Stack:
    parts = []
    for name, key in _PARTS.items():
        sec = row.number("parts", key, "median")
        parts.append(Part(name=name, sec=sec, text=seconds(sec)))
    return Stack(label=row.text("arm"), parts=parts, text=seconds(sum(part.sec for part in parts)))


def _row(row: Fields) -> list[str]:
    if reason := row.shown("not_measured", default=""):
        return [row.text("arm"), reason, *[NOTHING] * 4]
    speedup = NOTHING
    if row.find("speedup"):
        speedup = f"{spread_text(row.spread('speedup'), 'x')} over {row.text('speedup', 'over')}"
    return [
        row.text("arm"),
        seconds_text(row.spread("call_sec")),
        seconds(row.number("p95_sec")),
        number(len(row.numbers("samples_sec"))),
        speedup,
        _difference(row),
    ]


def _difference(row: Fields) -> str:
    if row.find("image_diff") is None:
        return NOTHING
    found = row.fields("image_diff")
    if found.find("psnr_db") is None:
        return f"equal to {found.text('reference')}"
    return (
        f"max {found.count('max_levels')}, mean {three_digits(found.number('mean_levels'))} of "
        f"255, {three_digits(found.number('psnr_db'))} dB from {found.text('reference')}"
    )


def _counts_table(rows: list[Fields]) -> Table:
    columns = {
        "U-Net operators": "unet_operators",
        "U-Net GB": "unet_gb",
        "around it": "operators_around",
        "launches by the host": "launches_by_the_host",
        "waits a step": "waits_per_step",
        "waits an image": "waits_per_image",
    }
    return Table(
        title="Counted, of a denoising step of one image",
        header=["pipeline", *columns],
        rows=[
            [row.text("name"), *(_figure(row.number(key)) for key in columns.values())]
            for row in rows
        ],
    )


def _figure(value: float) -> str:
    return number(int(value)) if value == int(value) else three_digits(value)
