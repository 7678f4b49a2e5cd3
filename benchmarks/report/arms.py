"""Online against offline: the ratio, the arms, their parts, and the time with stage 1 counted."""

from __future__ import annotations

from statistics import median

from benchmarks.report.blocks import (
    NOTHING,
    Bar,
    Bars,
    Block,
    Card,
    Facts,
    Part,
    Stack,
    Stacks,
    Table,
    Text,
    Tile,
    Tiles,
)
from benchmarks.report.doubts import parts_doubt, ratio_doubt, share_doubt
from benchmarks.report.fields import Fields, Spread
from benchmarks.report.number_format import (
    NBSP,
    percent,
    percent_text,
    precision_text,
    range_text,
    seconds,
    seconds_text,
    spread_text,
    three_digits,
    time_unit,
)
from benchmarks.report.sources import Document

_ARMS = {
    "resident": "U-Net only, batches in memory",
    "offline": "offline, latents from disk",
    "ids": "offline, text encoder in the step",
    "online": "online, VAE and text encoder in the step",
}
_STEP = ("unet", "optimizer", "ema")
_PARTS = {
    "resident": _STEP,
    "offline": _STEP,
    "ids": ("text", *_STEP),
    "online": ("vae", "text", *_STEP),
}
_PART_NAMES = {
    "vae": "VAE",
    "text": "text encoder",
    "unet": "U-Net, forward and backward",
    "optimizer": "optimizer",
    "ema": "EMA",
    "decode": "read and decode",
}
_WAIT = "waiting for data"
_IN_ORDER = (*(_PART_NAMES[part] for part in ("vae", "text", *_STEP)), _WAIT, _PART_NAMES["decode"])


def headline_cards(document: Document) -> list[Card]:
    """The ratio, and what it is to be held against; none where one of the two arms did not run."""
    fields = document.fields
    if not _has_both(fields):
        return []
    ratio, predicted = fields.spread("offline_speedup"), fields.number("flops_predicted_speedup")
    bars = [
        Bar(
            label="measured",
            value=ratio,
            text=spread_text(ratio, "x"),
            note=ratio_doubt(ratio),
        ),
        Bar(
            label="predicted from FLOPs alone",
            value=Spread(median=predicted, p10=predicted, p90=predicted),
            text=f"{three_digits(predicted)}x, predicted",
            kind="predicted",
        ),
    ]
    title = "Speed of offline training over online, stage 1 not counted"
    chart = Bars(title=title, bars=bars, mark=1.0, mark_text="no gain")
    tiles = Tiles(tiles=_tiles(fields, ratio, predicted))
    return [Card(title=_title(document), blocks=[tiles, chart, _settings(fields)])]


def _has_both(fields: Fields) -> bool:
    """Whether the two arms that are compared ran; a ratio without them is a broken result."""
    arms = fields.fields("arms").data
    return "offline_speedup" in fields.data or {"offline", "online"} <= arms.keys()


def _tiles(fields: Fields, ratio: Spread, predicted: float) -> list[Tile]:
    tiles = [
        Tile(
            figure=f"{three_digits(ratio.median)}x",
            label="offline over online",
            note=_noted(f"p10–p90 {range_text(ratio, 'x')}", ratio_doubt(ratio)),
        )
    ]
    if fields.find("arms", "resident") is not None:
        ceiling = fields.spread("arms", "offline", "share_of_ceiling")
        note = _noted(f"p10–p90 {range_text(ceiling, '%', size=0.01)}", share_doubt(ceiling))
        label = "of the U-Net alone, offline"
        tiles.append(Tile(figure=percent(ceiling.median), label=label, note=note))
    return [
        *tiles,
        Tile(
            figure=f"{three_digits(predicted)}x",
            label="predicted from FLOPs alone",
            note="counted, not timed",
        ),
        Tile(
            figure=_break_even(fields),
            label="epochs until stage 1 has paid for itself",
            note=_noted("computed from the speeds", ratio_doubt(ratio)),
        ),
    ]


def _noted(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def arms_card(document: Document) -> Card:
    """Images per second, share of the ceiling, and the parts of a step."""
    fields = document.fields
    arms = {
        name: (label, fields.fields("arms", name))
        for name, label in _ARMS.items()
        if fields.find("arms", name) is not None
    }
    header = ["arm", "step", "steps/s", "waiting for a batch", "loss, relative difference"]
    return Card(
        title=_title(document),
        blocks=[
            *_arm_bars(fields, arms),
            *_not_measured(fields),
            Table(
                title="The arms, medians with p10–p90",
                header=header,
                rows=[_arm_row(label, arm, fields) for label, arm in arms.values()],
            ),
            Text(
                text="Waiting for a batch includes the encoders where they run in the step. The "
                "loss is compared with the offline arm's, block by block: the arms train on the "
                "same samples with the same noise, so only rounding may differ."
            ),
            *_component_blocks(fields, arms),
        ],
    )


def _arm_bars(fields: Fields, arms: dict[str, tuple[str, Fields]]) -> list[Bars]:
    """Images per second, and the share of the ceiling where that was measured."""
    speeds, shares = [], []
    for label, arm in arms.values():
        speed = arm.spread("images_per_sec")
        speeds.append(Bar(label=label, value=speed, text=spread_text(speed, f"{NBSP}img/s")))
        if fields.find("arms", "resident") is not None:
            share = arm.spread("share_of_ceiling")
            text, note = percent_text(share), share_doubt(share)
            shares.append(Bar(label=label, value=share, text=text, note=note))
    charts = [Bars(title="Images per second", bars=speeds)]
    if shares:
        title = "Share of the ceiling, block by block"
        charts.append(Bars(title=title, bars=shares, mark=1.0, mark_text="U-Net only"))
    return charts


def _not_measured(fields: Fields) -> list[Text]:
    if not fields.find("not_measured"):
        return []
    reasons = fields.fields("not_measured")
    said = [f"{_ARMS.get(name, name)}: {reasons.text(name)}" for name in reasons.data]
    return [Text(text=f"Not measured: {'; '.join(said)}.")]


def totals_cards(document: Document) -> list[Card]:
    """Time per image with stage 1 counted, after some epochs; none without both arms."""
    fields = document.fields
    if not _has_both(fields):
        return []
    epochs = fields.children("totals", "epochs")
    rows, bars = [], []
    for name, each in sorted(epochs.items(), key=lambda item: (len(item[0]), item[0])):
        offline, online = each.number("offline_sec_per_image"), each.number("online_sec_per_image")
        speedup = each.number("speedup")
        label = f"{name} epoch" if name == "1" else f"{name} epochs"
        rows.append([label, seconds(offline), seconds(online), f"{three_digits(speedup)}x"])
        value = Spread(median=speedup, p10=speedup, p90=speedup)
        bars.append(Bar(label=label, value=value, text=f"{three_digits(speedup)}x"))
    stage1 = fields.number("stage1_images_per_sec")
    says = ("These follow from medians, so they have no spread", _totals_doubt(fields))
    blocks: list[Block] = [
        Bars(
            title="Online time over offline time with stage 1",
            bars=bars,
            mark=1.0,
            mark_text="break-even",
        ),
        Text(text=f"{_noted(*says)}."),
        Table(
            title="Time per image of the data set, all epochs together",
            header=["after", "offline and stage 1", "online", "gain"],
            rows=rows,
        ),
    ]
    note = f"Break-even after epochs: {_break_even(fields)}. Stage 1: {three_digits(stage1)} img/s."
    return [Card(title=_title(document), note=note, blocks=blocks)]


def _totals_doubt(fields: Fields) -> str:
    """A break-even is no better than the ratio that it comes from."""
    doubt = ratio_doubt(fields.spread("offline_speedup"))
    return f"of the ratio that they come from, {doubt}" if doubt else ""


def _title(document: Document) -> str:
    fields = document.fields
    what = f"{fields.text('preset')} at {fields.text('resolution')} px"
    return f"{what}, batch {fields.text('global_batch_size')}: {document.device}"


def _settings(fields: Fields) -> Facts:
    timing = fields.fields("protocol" if fields.find("blocks") is None else "blocks")
    facts = [
        (label, show(fields.text(name)))
        for label, name, show in (
            ("mixed precision", "precision", precision_text),
            ("attention", "attention", str),
        )
        if fields.find(name) is not None
    ]
    facts += [
        (name, timing.text(name))
        for name in ("blocks", "steps", "warmup")
        if timing.find(name) is not None
    ]
    flops = fields.fields("flops_per_image")
    counted = ", ".join(
        f"{_PART_NAMES.get(name, name)} {three_digits(flops.number(name) / 1e9)}"
        for name in flops.data
    )
    return Facts(facts=[*facts, ("GFLOPs per image", counted)])


def _break_even(fields: Fields) -> str:
    if fields.find("totals", "break_even_epochs") is None:
        return "never"
    return three_digits(fields.number("totals", "break_even_epochs"))


def _arm_row(label: str, arm: Fields, fields: Fields) -> list[str]:
    return [
        label,
        seconds(median(arm.numbers("sec_per_step"))),
        spread_text(arm.spread("iters_per_sec")),
        percent_text(arm.spread("data_wait_frac")),
        _loss_difference(arm, fields.fields("arms", "offline")),
    ]


def _loss_difference(arm: Fields, offline: Fields) -> str:
    """From the offline arm's; arms that did not train on the same samples cannot be compared."""
    if arm.find("losses") is None or arm.data is offline.data:
        return NOTHING
    own, other = arm.numbers("losses"), offline.numbers("losses")
    if len(own) != len(other):
        return NOTHING
    largest = max(abs(a - b) / abs(b) if b else abs(a) for a, b in zip(own, other, strict=True))
    return three_digits(largest)


def _component_blocks(fields: Fields, arms: dict[str, tuple[str, Fields]]) -> list[Block]:
    """Each part alone, seconds per step of the whole batch, beside the step as it was measured."""
    if fields.find("components") is None:
        return []
    alone = fields.children("components")
    stacks = [_stack(label, name, arm, alone) for name, (label, arm) in arms.items()]
    if "decode" in alone:
        sec = alone["decode"].number("sec_per_step", "median")
        part = Part(name=_PART_NAMES["decode"], sec=sec, text=seconds(sec))
        note = f"{seconds(sec)}, on CPU threads beside the step"
        stacks.append(Stack(label="online: read and decode", parts=[part], text=note))
    used = {part.name for stack in stacks for part in stack.parts}
    rows = [
        [_PART_NAMES.get(name, name), seconds_text(part.spread("sec_per_step"))]
        for name, part in alone.items()
    ]
    doubts = filter(None, map(_stack_doubt, stacks))
    return [
        Stacks(
            title="Parts of a step, each timed alone; the mark is the whole step",
            names=[name for name in _IN_ORDER if name in used],
            stacks=stacks,
        ),
        Text(
            text="Parts timed alone need not add up to the step: in the loop they share the device "
            "and the CPUs. Reading and decoding run on CPU threads beside the step."
        ),
        *(Text(text=doubt) for doubt in doubts),
        Table(title="Each part alone, for a whole batch", header=["part", "time"], rows=rows),
    ]


def _stack_doubt(stack: Stack) -> str:
    if stack.whole_sec is None:
        return ""
    return parts_doubt(stack.label, sum(part.sec for part in stack.parts), stack.whole_sec)


def _stack(label: str, name: str, arm: Fields, alone: dict[str, Fields]) -> Stack:
    whole_sec = median(arm.numbers("sec_per_step"))
    waited_sec = arm.number("data_wait_frac", "median") * whole_sec if name == "offline" else 0.0
    times = [
        (_PART_NAMES[part], alone[part].number("sec_per_step", "median"))
        for part in _PARTS[name]
        if part in alone
    ]
    times += [(_WAIT, waited_sec)] if waited_sec else []
    size, unit = time_unit(whole_sec)
    total, whole = (three_digits(sec / size) for sec in (sum(s for _, s in times), whole_sec))
    return Stack(
        label=label,
        parts=[Part(name=part, sec=sec, text=seconds(sec)) for part, sec in times],
        text=f"parts {total}, step {whole}{NBSP}{unit}",
        whole_sec=whole_sec,
    )
