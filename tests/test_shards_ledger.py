"""The ledger: every row comes back, with the source's own fields beside ours."""

import json
from typing import Any

import pyarrow.parquet as pq
import pytest

from shards.errors import CorruptFileError
from shards.ledger import OK, LedgerRow, count_reasons, read_ledger, save_ledger

ROWS = [
    LedgerRow(
        key="00000000",
        status=OK,
        caption="a lion",
        url="https://images.test/lion",
        width=640,
        height=480,
        sha256="f" * 64,
        metadata={"similarity": 0.31, "punsafe": 0, "NSFW": "UNLIKELY"},
    ),
    LedgerRow(key="../../etc/passwd", status="broken_image", caption="", metadata={"punsafe": 1}),
    LedgerRow(key="🦁", status="no_caption"),
]


def metadata_column(tmp_path: Any, values: list[Any]) -> list[Any]:
    """What becomes of one metadata field with these values."""
    path = tmp_path / "ledger.parquet"
    rows = [LedgerRow(key=str(n), status=OK, metadata={"x": v}) for n, v in enumerate(values)]
    save_ledger(path, rows)
    return [row["x"] for row in read_ledger(path, ["x"])]


def test_rows_come_back_in_order(tmp_path):
    save_ledger(tmp_path / "00000.parquet", ROWS)
    found = read_ledger(
        tmp_path / "00000.parquet",
        ["key", "status", "caption", "url", "width", "height", "sha256", "similarity", "NSFW"],
    )
    assert [row["key"] for row in found] == [row.key for row in ROWS]
    assert found[0] == {
        "key": "00000000",
        "status": OK,
        "caption": "a lion",
        "url": "https://images.test/lion",
        "width": 640,
        "height": 480,
        "sha256": "f" * 64,
        "similarity": 0.31,
        "NSFW": "UNLIKELY",
    }
    assert found[2]["caption"] is None
    assert found[1]["similarity"] is None


def test_own_columns_come_first_and_a_taken_name_gets_a_prefix(tmp_path):
    path = tmp_path / "00000.parquet"
    save_ledger(path, [LedgerRow(key="1", status=OK, metadata={"key": "theirs", "a": 1})])
    own = ["key", "status", "caption", "url", "width", "height", "sha256"]
    assert pq.read_schema(path).names == [*own, "a", "source_key"]
    assert read_ledger(path, ["key", "source_key"]) == [{"key": "1", "source_key": "theirs"}]


def test_a_field_that_bears_the_name_of_a_prefixed_one_is_kept_as_well(tmp_path):
    path = tmp_path / "00000.parquet"
    metadata = {"key": "theirs", "source_key": "another"}
    save_ledger(path, [LedgerRow(key="1", status=OK, metadata=metadata)])
    (row,) = pq.read_table(path).to_pylist()
    assert {"theirs", "another"} <= set(row.values())


def test_a_ledger_of_no_rows_is_a_ledger(tmp_path):
    save_ledger(tmp_path / "00000.parquet", [])
    assert read_ledger(tmp_path / "00000.parquet") == []


def test_equal_rows_make_equal_files(tmp_path):
    for name in "ab":
        save_ledger(tmp_path / name, ROWS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "values",
    [
        [1, 2, None],
        [0.5, 1, None],
        ["a", None, "ü"],
        [True, False, None],
        [None, None],
    ],
    ids=repr,
)
def test_fields_of_one_plain_type_keep_it(tmp_path, values):
    assert metadata_column(tmp_path, values) == values


@pytest.mark.parametrize(
    "values",
    [
        [1, "a"],
        [True, 1],
        [[1, 2], {"a": None}],
        [2**70, -1],
        [{"deep": [1.5, "ü"]}, None],
    ],
    ids=repr,
)
def test_fields_of_mixed_types_become_their_json_texts(tmp_path, values):
    found = metadata_column(tmp_path, values)
    for text, value in zip(found, values, strict=True):
        assert text is None if value is None else text in (value, json.dumps(value))


def test_reasons_are_counted_and_the_good_ones_left_out():
    rows = [LedgerRow(key="", status=status) for status in ("no_image", OK, "a", "no_image")]
    assert count_reasons(rows) == {"a": 1, "no_image": 2}


@pytest.mark.parametrize("data", [None, b"", b"PAR1", b"not parquet at all" * 10])
def test_an_unreadable_ledger_is_named_with_a_remedy(tmp_path, data):
    path = tmp_path / "00007.parquet"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"00007\.parquet: cannot be read.*Remedy: "):
        read_ledger(path)


def test_a_column_that_the_ledger_lacks_is_an_error_of_ours_to_name(tmp_path):
    save_ledger(tmp_path / "00000.parquet", ROWS)
    with pytest.raises(CorruptFileError, match="aesthetic"):
        read_ledger(tmp_path / "00000.parquet", ["key", "aesthetic"])
