"""A training run: where it got to, its curves, its samples, the settings that matter."""

from __future__ import annotations

from statistics import median

from benchmarks.report.blocks import (
    NOTHING,
    Bar,
    Bars,
    Block,
    Card,
    Curve,
    Details,
    Facts,
    Gallery,
    Picture,
    Tile,
    Tiles,
)
from benchmarks.report.curves import Line, draw_curves, smooth
from benchmarks.report.fields import Fields, Spread
from benchmarks.report.number_format import percent, precision_text, quantity, three_digits
from benchmarks.report.sources import Run

_LOSS, _VAL, _VAL_EMA = "train/loss", "val/loss", "val/ema_loss"
_SPEED, _RATE = "perf/images_per_sec", "train/learning_rate"
_MATTERS = (
    *("unet", "resolution", "global_batch_size", "micro_batch_size", "max_steps"),
    *("learning_rate", "lr_schedule", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("prediction_type", "min_snr_gamma", "zero_terminal_snr", "caption_drop_prob"),
    *("ema_decay", "mixed_precision", "compile", "sharding", "seed", "data", "text", "online"),
)
_SMOOTH_FRAC = 0.05  # of a run's rows
_MAX_BIN_LINES = 4
_PARTS = ("background", "colour", "shape", "size", "relation", "all_right")


def run_card(run: Run, ident: str, pictures: list[Picture]) -> Card:
    """All that there is to see of a run.

    Args:
        run: as it was read.
        ident: of this card, unique in the page.
        pictures: of its samples.
    """
    curves = [
        draw(run, ident)
        for draw, name, least in (
            (_loss_curve, _LOSS, 2),
            (_bin_curve, _VAL, 1),
            (_speed_curve, _SPEED, 2),
            (_rate_curve, _RATE, 2),
        )
        if sum(name in row for row in run.rows) >= least
    ]
    blocks: list[Block] = []
    if tiles := _tiles(run):
        blocks.append(Tiles(tiles=tiles))
    if curves:
        blocks.append(Gallery(items=curves))
    if pictures:
        blocks.append(Gallery(items=pictures))
    if run.scenes is not None:
        blocks += _scene_blocks(run.scenes)
    if run.config is not None:
        blocks += _settings(run.config)
    return Card(title=run.path.name or str(run.path), blocks=blocks, note=str(run.path))


def _series(run: Run, name: str) -> tuple[list[float], list[float]]:
    rows = [row for row in run.rows if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]


def _tiles(run: Run) -> list[Tile]:
    if not run.rows:
        return []
    asked = None if run.config is None else run.config.find("settings", "max_steps")
    last = max(row["step"] for row in run.rows)
    note = f"of {asked:,}" if isinstance(asked, int) else ""
    tiles = [Tile(figure=f"{last:,.0f}", label="steps", note=note)]
    for name, label in (
        (_LOSS, "training loss, last interval"),
        (_VAL, "held-out loss"),
        (_VAL_EMA, "held-out loss, EMA"),
    ):
        _, values = _series(run, name)
        if values:
            tiles.append(Tile(figure=three_digits(values[-1]), label=label))
    _, speeds = _series(run, _SPEED)
    if speeds:
        tiles.append(Tile(figure=three_digits(median(speeds)), label="images/s, median"))
    return tiles


# Curves -------------------------------------------------------------------------------------------


def _loss_curve(run: Run, ident: str) -> Curve:
    steps, losses = _series(run, _LOSS)
    window = max(3, round(_SMOOTH_FRAC * len(losses)))
    lines = [Line(label="training", x=steps, y=losses, thin=True)]
    if len(losses) > 2 * window:
        lines.append(Line(label=f"mean of {window} rows", x=steps, y=smooth(losses, window)))
    for style, (name, label) in enumerate(((_VAL, "held out"), (_VAL_EMA, "held out, EMA")), 1):
        x, y = _series(run, name)
        if x:
            lines.append(Line(label=label, x=x, y=y, style=style))
    svg = draw_curves(
        lines, x_label="step", y_label="loss", ident=f"{ident}-loss", log_if_wide=True
    )
    alt = f"Training loss from {three_digits(losses[0])} to {three_digits(losses[-1])} over "
    alt += f"{steps[-1]:,.0f} steps"
    return Curve(title="Loss", svg=svg, alt=alt)


def _bin_curve(run: Run, ident: str) -> Curve:
    """Held-out loss by timestep, at some validations from the first to the last."""
    rows = [row for row in run.rows if _VAL in row]
    chosen = sorted({round(i * (len(rows) - 1) / (_MAX_BIN_LINES - 1)) for i in range(4)})
    lines = []
    for style, row in enumerate(rows[index] for index in chosen):
        prefix = f"{_VAL}_t"
        bins = {n.removeprefix(prefix): v for n, v in row.items() if n.startswith(prefix)}
        middles = [sum(map(float, name.split("-"))) / 2 for name in bins]
        label = f"step {row['step']:,.0f}"
        lines.append(Line(label=label, x=middles, y=list(bins.values()), style=style))
    svg = draw_curves(
        lines, x_label="timestep", y_label="held-out loss", ident=f"{ident}-bins", log_if_wide=True
    )
    alt = f"Held-out loss by timestep at {', '.join(line.label for line in lines)}"
    return Curve(title="Held-out loss by timestep", svg=svg, alt=alt)


def _speed_curve(run: Run, ident: str) -> Curve:
    steps, speeds = _series(run, _SPEED)
    line = Line(label="images/s", x=steps, y=speeds)
    svg = draw_curves([line], x_label="step", y_label="images/s", ident=f"{ident}-speed")
    alt = f"Images per second over steps, median {three_digits(median(speeds))}"
    return Curve(title="Speed", svg=svg, alt=alt)


def _rate_curve(run: Run, ident: str) -> Curve:
    steps, rates = _series(run, _RATE)
    line = Line(label="learning rate", x=steps, y=rates)
    svg = draw_curves([line], x_label="step", y_label="learning rate", ident=f"{ident}-rate")
    alt = f"Learning rate over steps, at most {three_digits(max(rates))}"
    return Curve(title="Learning rate", svg=svg, alt=alt)


# Scenes and settings ------------------------------------------------------------------------------


def _scene_blocks(scenes: Fields) -> list[Block]:
    """What was read back from the pixels, beside what chance would give."""
    parts = [part for part in _PARTS if scenes.find("accuracy", part) is not None]
    bars = []
    for part in parts:
        right, label = scenes.number("accuracy", part), part.replace("_", " ")
        has_chance = scenes.find("chance", part) is not None
        chance = percent(scenes.number("chance", part)) if has_chance else NOTHING
        value = Spread(median=right, p10=right, p90=right)
        bars.append(Bar(label=label, value=value, text=f"{percent(right)} (chance {chance})"))
    title = f"Right in {scenes.text('num_images')} images, read back from the pixels"
    return [Bars(title=title, bars=bars, mark=1.0, mark_text="all")]


def _setting(name: str, value: object) -> str:
    shown = quantity("", value)
    return precision_text(shown) if name == "mixed_precision" else shown


def _settings(config: Fields) -> list[Block]:
    settings = config.fields("settings")
    facts = [
        (name.replace("_", " "), _setting(name, settings.find(name)))
        for name in _MATTERS
        if settings.find(name) not in (None, "")
    ]
    ran = [("attention that ran", config.text("attention", default=NOTHING))]
    if isinstance(step := config.find("step"), dict):  # runs of before have none
        on = [name for name, value in step.items() if value is True]
        ran += [
            ("compiled", str(step.get("compile"))),
            ("switches that were on", ", ".join(on) or "none"),
            ("micro-batch that ran", str(config.find("micro_batch_size"))),
        ]
    everything = [(name, str(value)) for name, value in settings.data.items()]
    return [
        Facts(facts=facts + ran),
        Details(summary="All settings", blocks=[Facts(facts=everything)]),
    ]
