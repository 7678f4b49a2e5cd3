"""Receipts: what is written is read back, and not one byte may differ."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from shards.errors import DatasetError
from shards.receipt import Receipt, file_facts, read_receipt, receipt_path, write_receipt

RECEIPT = Receipt(
    shard="00000",
    column={"kind": "image", "format_version": 1, "scaling_factor": 0.18215},
    source={"url": "s3://bucket/ü/00000.tar", "bytes": 7249920, "sha256": "d" * 64},
    rows_in=492,
    rows=480,
    absent={"too_small": 10, "broken_image": 2},
    data_bytes=1234,
    data_sha256="e" * 64,
    stats={"latent_mean": -0.158515, "latent_std": 0.995915, "float32_fallbacks": 0},
    model="examples/tiny-model",
    versions={"torch": "2.13.0+cpu"},
    timings={"write": 1.345, "encode_image": 12.5},
)


@pytest.fixture
def receipt_file(tmp_path: Path) -> Path:
    write_receipt(tmp_path / "00000.safetensors", RECEIPT)
    return tmp_path / "00000.json"


def test_a_receipt_round_trips(receipt_file):
    assert read_receipt(receipt_file) == RECEIPT


@pytest.mark.parametrize("name", ["00000.safetensors", "00000.parquet", "a.b-c.safetensors"])
def test_a_receipt_stands_beside_its_data(tmp_path, name):
    found = receipt_path(tmp_path / name)
    assert found == tmp_path / (name.rsplit(".", 1)[0] + ".json")


def test_facts_of_a_file_are_its_length_and_hash(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert file_facts(tmp_path / "x") == {
        "data_bytes": 3,
        "data_sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }


def test_any_single_changed_byte_is_found_and_the_file_named(receipt_file):
    whole = receipt_file.read_bytes()
    telling = b"\x00\r\n\t e9-\"'\\{}[],:.\x7f\x80\xff"
    alike = {b"\n": b"\r", b".": b"e"}  # JSON's parser, or Python's, takes either
    for place, byte in enumerate(whole):
        others = {byte ^ (1 << place % 8), telling[place % len(telling)]}
        for other in {*others, *alike.get(bytes([byte]), b"")} - {byte}:
            receipt_file.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
            with pytest.raises(DatasetError, match=re.escape(str(receipt_file))):
                read_receipt(receipt_file)


def test_a_receipt_cut_short_anywhere_is_found(receipt_file):
    whole = receipt_file.read_bytes()
    for length in range(0, len(whole), 3):
        receipt_file.write_bytes(whole[:length])
        with pytest.raises(DatasetError, match=re.escape(str(receipt_file))):
            read_receipt(receipt_file)


@pytest.mark.parametrize("extra", [b" ", b"\n", b"\r", b"{}", b"\x00"])
def test_bytes_added_at_either_end_are_found(receipt_file, extra):
    whole = receipt_file.read_bytes()
    for changed in (extra + whole, whole + extra):
        receipt_file.write_bytes(changed)
        with pytest.raises(DatasetError, match=receipt_file.name):
            read_receipt(receipt_file)


def test_a_receipt_written_anew_by_another_tool_is_not_believed(receipt_file):
    document = json.loads(receipt_file.read_text())
    document["rows"], document["absent"]["too_small"] = 479, 11
    receipt_file.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    with pytest.raises(DatasetError, match="does not match its own hash"):
        read_receipt(receipt_file)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"text"', "", "[" * 100_000])
def test_what_is_no_receipt_is_refused_by_name(receipt_file, text):
    receipt_file.write_text(text)
    with pytest.raises(DatasetError, match=receipt_file.name):
        read_receipt(receipt_file)


def test_another_format_version_is_refused_with_all_that_one_needs_to_know(
    receipt_file, monkeypatch
):
    monkeypatch.setattr("shards.receipt.FORMAT_VERSION", 2)
    with pytest.raises(DatasetError) as error:
        read_receipt(receipt_file)
    wanted = rf"{re.escape(str(receipt_file))}: format version 1; wanted version 2\. Remedy: .+"
    assert re.fullmatch(wanted, str(error.value))


@pytest.mark.parametrize(("rows", "absent"), [(479, 12), (481, 12), (480, 11), (0, 0), (492, 1)])
def test_rows_that_do_not_add_up_are_refused(rows, absent):
    with pytest.raises(DatasetError, match=r"shard 00000.*wanted the 492 rows of its source"):
        replace(RECEIPT, rows=rows, absent={"too_small": absent})
