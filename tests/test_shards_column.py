"""A column's id changes with everything that its bytes depend on, and with nothing else."""

import re
from dataclasses import fields, replace
from typing import Any

import pytest

import shards.column
from shards.column import ColumnSpec, ImageColumn, TextColumn, column_from_json
from shards.errors import DatasetError

IMAGE = ImageColumn(
    weights_sha256="a" * 64,
    encoder_config={"latent_channels": 4, "block_out_channels": [128, 256], "act_fn": "silu"},
    compute_dtype="float16",
    storage_dtype="float16",
    resolution=256,
    latent_channels=4,
    latent_size=32,
    scaling_factor=0.18215,
    transform={"resize": "shortest_side", "crop": "center"},
)
TEXT = TextColumn(
    weights_sha256="b" * 64,
    encoder_config={"hidden_size": 1024},
    compute_dtype="float16",
    storage_dtype="float16",
    num_tokens=77,
    dim=1024,
    tokenizer_sha256="c" * 64,
)


CHOICES = {"float16": "int8", "moments": "mean"}


def another(value: Any) -> Any:
    """A value of the same type that differs a little."""
    if isinstance(value, str) and value in CHOICES:
        return CHOICES[value]
    if isinstance(value, dict):
        return {**value, "one more": 1}
    if isinstance(value, list):
        return [*value, [64, 96]]
    return value + ("x" if isinstance(value, str) else 1)


@pytest.mark.parametrize(
    ("spec", "name"),
    [(spec, field.name) for spec in (IMAGE, TEXT) for field in fields(spec)],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_another_setting_is_another_column(spec, name):
    value = getattr(spec, name)
    changed = replace(spec, **{name: "bfloat16" if name == "compute_dtype" else another(value)})
    assert changed.column_id != spec.column_id


def test_a_value_deep_in_a_configuration_makes_another_column():
    deep = {**IMAGE.encoder_config, "block_out_channels": [128, 257]}
    assert replace(IMAGE, encoder_config=deep).column_id != IMAGE.column_id


def test_another_format_version_makes_another_column(monkeypatch):
    before = IMAGE.column_id
    monkeypatch.setattr(shards.column, "FORMAT_VERSION", shards.column.FORMAT_VERSION + 1)
    assert IMAGE.column_id != before


def test_the_order_of_a_configuration_does_not_matter():
    turned = dict(reversed(IMAGE.encoder_config.items()))
    assert replace(IMAGE, encoder_config=turned).column_id == IMAGE.column_id


def test_the_id_is_a_name_and_eight_hex_digits():
    assert re.fullmatch(r"moments-256-[0-9a-f]{8}", IMAGE.column_id)
    assert re.fullmatch(r"text-[0-9a-f]{8}", TEXT.column_id)


@pytest.mark.parametrize("spec", [IMAGE, TEXT], ids=["image", "text"])
def test_a_spec_round_trips_through_json(spec):
    found = column_from_json(spec.to_json(), "here")
    assert found == spec
    assert found.column_id == spec.column_id


def test_another_format_version_is_refused_with_all_that_one_needs_to_know():
    document = {**IMAGE.to_json(), "format_version": 99}
    with pytest.raises(DatasetError) as error:
        column_from_json(document, "the/file.json")
    assert re.fullmatch(
        r"the/file\.json: format version 99; wanted version 1\. Remedy: .+", str(error.value)
    )


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"format_version": 1},
        {"format_version": 1, "kind": "sound"},
        {"format_version": 1, "kind": ["image"]},
        {**IMAGE.to_json(), "surprise": 1},
        {name: value for name, value in TEXT.to_json().items() if name != "dim"},
        None,
        3,
        "text",
        [1],
    ],
    ids=repr,
)
def test_what_is_no_column_is_refused_by_name(document):
    with pytest.raises(DatasetError, match=r"the/file\.json"):
        column_from_json(document, "the/file.json")


def test_a_column_is_no_image_and_no_text_by_itself():
    with pytest.raises(TypeError, match="abstract"):
        ColumnSpec(  # type: ignore[abstract]
            weights_sha256="", encoder_config={}, compute_dtype="", storage_dtype=""
        )
