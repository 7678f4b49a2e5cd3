from __future__ import annotations

import math

import pytest

from benchmarks.report.curves import Line, draw_curves, smooth
from benchmarks.report.fields import Fields, Spread
from benchmarks.report.number_format import (
    num_bytes,
    number,
    percent,
    percent_text,
    quantity,
    seconds,
    seconds_text,
    spread_text,
    three_digits,
)
from shards.errors import UserError


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.6366, "1.64"),
        (9.996, "10.0"),
        (99.96, "100"),
        (31954.2, "32,000"),
        (999_600.0, "1,000,000"),
        (0.03124, "0.0312"),
        (0.0001, "0.000100"),
        (3.05e-05, "3.05e-05"),
        (-1.234, "-1.23"),
        (math.nan, "not finite"),
        (math.inf, "not finite"),
    ],
)
def test_measurements_have_three_digits(value: float, text: str) -> None:
    assert three_digits(value) == text


def test_counts_are_exact_and_measurements_are_not() -> None:
    assert number(535_986_176) == "535,986,176"
    assert number(31_230.4) == "31,230"
    assert number(0.81729) == "0.817"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 ns"), (3e-7, "300 ns"), (0.0215, "21.5 ms"), (59.94, "59.9 s"), (600.0, "10.0 min")],
)
def test_times_have_the_unit_that_fits(value: float, text: str) -> None:
    assert seconds(value).replace("\N{NO-BREAK SPACE}", " ") == text


def test_days_hours_and_bytes_have_the_unit_that_fits() -> None:
    shown = [seconds(81.33 * 86_400), seconds(7.5 * 3600), num_bytes(0), num_bytes(20_121_167)]
    assert [s.replace("\N{NO-BREAK SPACE}", " ") for s in shown] == [
        *("81.3 days", "7.50 h", "0 B", "20.1 MB")
    ]


def test_a_spread_keeps_one_unit_and_says_nothing_where_there_is_none() -> None:
    times = Spread(median=1.1, p10=0.9, p90=1.3)
    assert seconds_text(times) == "1.10\N{NO-BREAK SPACE}s (0.900–1.30)"
    assert spread_text(Spread(median=0.5, p10=0.5, p90=0.5), "%", size=0.01) == "50.0%"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("wait_frac", 0.012, "1.20%"),
        ("images_per_sec", 228.04, "228/s"),
        ("read_bytes_per_sec", 7.13e9, "7.13 GB/s"),
        ("open_sec", 0.336, "336 ms"),
        ("next_ms", 0.592, "592 µs"),
        ("train_usd", 31230, "$31,230"),
        ("storage_usd", 0.023, "$0.0230"),
        ("peak_gib", 31.25, "31.2 GiB"),
        ("arms.offline.usd.$2.00/h.total", 38_812.3, "$38,812"),
        ("bytes.latents.256", 16_396, "16.4 kB"),
        ("bytes.num_captions", 790_000_000, "790,000,000"),
        ("offline.mb_per_sec", 192.04, "192 MB/s"),
        ("device", "cpu", "cpu"),
        ("ema", True, "yes"),
        ("price", None, "none"),
        ("wait_sec", 10**400, str(10**400)),
        ("loss", math.nan, "nan"),
        (
            "step_sec",
            {"median": 2.0, "p10": 1.0, "p90": 3.0},
            "2.00 s (1.00 s–3.00 s)",
        ),
    ],
)
def test_the_end_of_a_name_gives_the_unit(name: str, value: object, text: str) -> None:
    assert quantity(name, value).replace("\N{NO-BREAK SPACE}", " ") == text


def test_shares_have_no_more_than_two_decimals() -> None:
    assert [percent(frac) for frac in (0.9537, 0.0123, 0.0041, 0.0000273)] == [
        *("95.4%", "1.23%", "0.41%", "0.00%")
    ]
    assert percent_text(Spread(median=0.5, p10=0.001, p90=1.0)) == "50.0% (0.10–100)"


# Look-ups -----------------------------------------------------------------------------------------


def test_look_ups_name_the_file_and_the_path() -> None:
    fields = Fields({"arms": {"ours": {"rows": [{"speed": True}]}}}, "loader.json")
    (row,) = fields.rows("arms", "ours", "rows")
    with pytest.raises(UserError, match=r"loader\.json: arms\.ours\.rows\.0\.speed is true or"):
        row.number("speed")
    with pytest.raises(UserError, match=r"arms\.naive is not there; wanted a JSON object"):
        fields.fields("arms", "naive")
    with pytest.raises(UserError, match=r"arms\.ours\.speed is not there"):
        fields.children("arms")["ours"].text("speed")


@pytest.mark.parametrize("found", [[], [1, "2"], [1, math.nan], "12", None])
def test_a_list_of_numbers_is_just_that(found: object) -> None:
    with pytest.raises(UserError, match="losses"):
        Fields({"losses": found}, "x").numbers("losses")


def test_counts_have_no_fraction() -> None:
    assert Fields({"n": 3.0}, "x").count("n") == 3
    with pytest.raises(UserError, match="whole number"):
        Fields({"n": 3.5}, "x").count("n")


# Curves -------------------------------------------------------------------------------------------


def test_smoothing_is_the_mean_around_each_value() -> None:
    assert smooth([1.0, 2.0, 6.0, 4.0], 3) == pytest.approx([1.5, 3.0, 4.0, 5.0])
    assert smooth([5.0, 1.0], 1) == [5.0, 1.0]


def test_smoothing_leaves_out_what_is_not_finite() -> None:
    found = smooth([1.0, math.nan, 3.0, math.inf], 3)
    assert found == pytest.approx([1.0, 2.0, 3.0, 3.0])
    assert math.isnan(smooth([math.nan, math.nan], 1)[0])


def test_a_drawing_takes_its_colours_from_the_page() -> None:
    lines = [Line(label=f"line {i}", x=[0, 1, 2], y=[i, 1, 2], style=i) for i in range(3)]
    svg = draw_curves(lines, x_label="step", y_label="loss", ident="a")
    assert svg.startswith("<svg")
    assert "<style" not in svg
    assert "#0" not in svg.replace('="#0', "")
    assert all(f"var(--{name})" in svg for name in ("ink", "line", "c1", "c2", "c3"))
    assert all(line.label in svg for line in lines)


@pytest.mark.parametrize("values", [[0.0, 0.0], [math.nan, math.nan], [1e-9, 1e9], [-1.0, 2.0]])
def test_any_values_can_be_drawn(values: list[float]) -> None:
    line = Line(label="loss", x=[1, 2], y=values)
    svg = draw_curves([line], x_label="", y_label="", ident="b", log_if_wide=True)
    assert "</svg>" in svg
