"""Filters keep what their conditions say, count why not, and run nothing but their own language."""

import json
from dataclasses import replace

import pytest
from conftest import image_bytes, sample_members, smooth_image, write_tar
from numpy.random import default_rng

from precompute.account import dropped_frac
from precompute.config import PrecomputeConfig
from precompute.filters import Filter
from precompute.job import precompute
from precompute.pixels import Picture, UnusableImageError
from shards.dataset import Dataset
from shards.errors import DatasetError, UserError
from shards.layout import ledger_path
from shards.ledger import read_ledger


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height as the header says."""
    picture = Picture(data)
    return picture.width, picture.height


LAION = "punsafe < 0.1 and pwatermark < 0.8 and similarity > 0.28 and min(width, height) >= 256"
GOOD = {"punsafe": 0.05, "pwatermark": 0.1, "similarity": 0.3, "width": 300, "height": 256}


def test_a_sample_that_meets_every_condition_is_kept():
    assert Filter(LAION).reason_against(GOOD.get) == ""
    assert Filter("").reason_against({}.get) == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"punsafe": 0.1}, "filter: punsafe < 0.1"),
        ({"pwatermark": 0.9, "similarity": 0}, "filter: pwatermark < 0.8"),
        ({"height": 255}, "filter: min(width, height) >= 256"),
        ({"similarity": None}, "filter: no similarity"),
        ({"punsafe": "high"}, "filter: not comparable in punsafe < 0.1"),
        ({"punsafe": float("nan")}, "filter: punsafe < 0.1"),
    ],
)
def test_the_first_condition_that_fails_is_the_reason(change, reason):
    assert Filter(LAION).reason_against({**GOOD, **change}.get) == reason


def test_a_field_that_is_absent_fails_the_condition_by_name():
    assert Filter("aesthetic > 5").reason_against(GOOD.get) == "filter: no aesthetic"
    # What is not looked at need not be there.
    assert Filter("punsafe < 1 or aesthetic > 5").reason_against(GOOD.get) == ""


@pytest.mark.parametrize(
    ("expression", "kept"),
    [
        ("0.2 < x <= 0.5", True),
        ("0.2 < x < 0.5", False),
        ("not (x > 1 or y == 'b')", True),
        ("y in ['a', 'c']", True),
        ("y not in ('a', 'c')", False),
        ("max(width / height, height / width) <= 2", True),
        ("abs(x - 1) < 0.6 and len(y) == 1 and 'A' not in y", True),
        ("lower('ABC') == 'abc'", True),
        ("-x < 0", True),
        ("x + 1 == 1.5 and x * 2 == 1 and flag == True", True),
        ("x / zero > 1", False),
    ],
)
def test_the_language_means_what_python_means(expression, kept):
    fields = {"x": 0.5, "y": "a", "width": 10, "height": 5, "zero": 0, "flag": True}
    assert (Filter(expression).reason_against(fields.get) == "") is kept


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "().__class__",
        "x.y < 1",
        "x[0] < 1",
        "[z for z in x]",
        "lambda: 1",
        "x if y else z",
        "min(x, key=y) < 1",
        "open('x')",
        "x ** 99 > 1",
        "(x := 1)",
        "f'{x}' == 'a'",
        "min() < 1",
        "1 <",
        "x; y",
        "(" * 2000,
        "x == b'a'",
        "x\0",
    ],
)
def test_anything_else_is_refused_before_a_sample_is_read(expression):
    with pytest.raises(UserError, match="--filter"):
        Filter(expression)


def test_white_space_makes_no_other_filter():
    assert Filter(" a  <\n 1 ").expression == Filter("a < 1").expression


def test_the_size_is_that_of_the_upright_image_and_costs_no_decode():
    image = smooth_image(default_rng(0), 40, 70)
    exif = image.getexif()
    exif[274] = 6
    assert size_of(image_bytes(image, "JPEG")) == (40, 70)
    turned = image_bytes(image, "JPEG", exif=exif)
    assert size_of(turned) == (70, 40)
    assert size_of(turned[:-100]) == (70, 40)  # the header is whole
    with pytest.raises(UnusableImageError, match="not_an_image"):
        Picture(b"no picture")


@pytest.fixture
def config(tmp_path, model_folder):
    rng = default_rng(0)
    members = []
    for number in range(12):
        image = image_bytes(smooth_image(rng, 40 + 4 * number, 60), "JPEG")
        image = b"broken" if number == 11 else image
        metadata = {"punsafe": number / 10} if number % 4 else {}
        members += sample_members(f"{number:04d}", image, f"number {number}", metadata)
    write_tar(tmp_path / "00000.tar", members)
    return PrecomputeConfig(
        shards=str(tmp_path / "00000.tar"),
        out=str(tmp_path / "out"),
        model=str(model_folder),
        resolutions="32",
        device="cpu",
        filter="punsafe < 0.8 and min(width, height) >= 48",
    )


def test_every_row_that_is_filtered_out_stands_in_the_ledger_with_its_reason(config):
    manifest = precompute(config)
    statuses = [
        row["status"] for row in read_ledger(ledger_path(Dataset(config.out).path, "00000"))
    ]
    size = "filter: min(width, height) >= 48"
    none, unsafe = "filter: no punsafe", "filter: punsafe < 0.8"
    expected = [none, size, "ok", "ok", none, "ok", "ok", "ok", none, unsafe, unsafe, unsafe]
    assert statuses[1] == size  # 44 x 60
    assert statuses == expected
    assert manifest["filter"] == config.filter
    assert manifest["dropped"] == {none: 3, size: 1, unsafe: 3}
    assert Dataset(config.out).text_column().num_rows == 5


def test_what_the_filter_drops_is_no_failure_and_what_fails_besides_is(config):
    assert dropped_frac(precompute(config)) == 0
    # Its metadata lets the broken image in.
    other = replace(config, out=config.out + "2", filter="punsafe > 0.5")
    manifest = precompute(other)
    assert manifest["dropped"]["not_an_image"] == 1
    assert dropped_frac(manifest) == pytest.approx(1 / 5)  # of 6, 7, 9, 10, 11


def test_one_dataset_has_one_filter(config):
    precompute(config)
    before = json.loads((Dataset(config.out).path / "dataset.json").read_text())
    for changed in ("", "punsafe < 0.9"):
        with pytest.raises(DatasetError, match="was made with --filter"):
            precompute(replace(config, filter=changed, resolutions="32,40"))
    precompute(replace(config, filter="punsafe < 0.8  and min(width, height) >= 48"))
    assert json.loads((Dataset(config.out).path / "dataset.json").read_text()) == before
