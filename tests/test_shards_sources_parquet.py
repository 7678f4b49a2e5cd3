"""Image shards in parquet: every row comes out, usable or with its reason, whatever the bytes."""

import datetime
import decimal
import hashlib
import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.errors import UserError
from shards.image_sample import ImageSample
from shards.image_shards import ShardStream
from shards.parquet_shards import IMAGE_COLUMNS
from shards.source_shard import SourceShard

IMAGE = b"\xff\xd8 the bytes of a picture"
HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def stream_of(path: Path, **options: Any) -> ShardStream:
    return ShardStream(SourceShard(str(path), path.stem, None), **options)


def read(folder: Path, columns: dict[str, Any], caption_field: str = "") -> list[ImageSample]:
    path = folder / "00000.parquet"
    pq.write_table(pa.table(columns), path)
    return list(stream_of(path, caption_field=caption_field))


def facts_of(samples: list[ImageSample]) -> list[tuple[str, str | None, str]]:
    return [(sample.key, sample.caption, sample.problem) for sample in samples]


def test_img2datasets_parquet_is_read_with_key_caption_and_metadata(tmp_path):
    samples = read(
        tmp_path,
        {
            "url": ["https://a", None],
            "key": ["000000007", "000000003"],
            "caption": [" a lion\n", "a tiger"],
            "punsafe": [0.5, None],
            "jpg": [IMAGE, None],
        },
    )
    assert facts_of(samples) == [
        ("000000007", "a lion", ""),
        ("000000003", "a tiger", "no_image"),
    ]
    assert samples[0].image == IMAGE
    assert samples[0].metadata == {"url": "https://a", "punsafe": 0.5}
    assert samples[1].metadata == {"url": None, "punsafe": None}


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(len(IMAGE))], ids=str)
@pytest.mark.parametrize("name", IMAGE_COLUMNS)
def test_binary_columns_of_every_usual_name_hold_images(tmp_path, name, kind):
    samples = read(tmp_path, {"text": ["x"], name: pa.array([IMAGE], kind)})
    assert [(s.image, s.problem) for s in samples] == [(IMAGE, "")]


@pytest.mark.parametrize("name", ["image", "photo"])
def test_hugging_faces_form_is_read(tmp_path, name):
    values = [{"bytes": IMAGE, "path": "a.png"}, None, {"bytes": None, "path": "b.png"}]
    values.append({"bytes": b"", "path": None})
    samples = read(tmp_path, {name: pa.array(values, HF_IMAGE), "text": ["x"] * 4})
    problems = ["", "no_image", "no_image", "empty_image"]
    assert facts_of(samples) == [(str(i), "x", problem) for i, problem in enumerate(problems)]
    assert samples[0].image == IMAGE
    assert all(sample.metadata == {} for sample in samples)


@pytest.mark.parametrize(
    ("columns", "field", "captions"),
    [
        ({"TEXT": ["c"], "text": ["b"], "caption": ["a"]}, "", ["a"]),
        ({"TEXT": ["c"], "text": ["b"]}, "", ["b"]),
        ({"TEXT": ["c"]}, "", ["c"]),
        ({"caption": ["a"], "blip": ["b"]}, "blip", ["b"]),
        ({"caption": ["a"]}, "blip", [None]),
        ({"caption": [["a", "b"]]}, "", [None]),
        ({"caption": [7]}, "", [None]),
        ({"caption": pa.array([None], pa.string())}, "", [None]),
        ({"caption": pa.array(["a"]).dictionary_encode()}, "", ["a"]),
        ({"caption": pa.array([b"by an old writer"])}, "", ["by an old writer"]),
    ],
)
def test_the_caption_is_the_named_column_or_the_first_usual_one(tmp_path, columns, field, captions):
    samples = read(tmp_path, {"jpg": [IMAGE], **columns}, field)
    assert [sample.caption for sample in samples] == captions
    assert [sample.problem for sample in samples] == ["" if c else "no_caption" for c in captions]


@pytest.mark.parametrize(
    ("columns", "keys"),
    [
        ({"key": ["a", "b"], "id": [1, 2]}, ["a", "b"]),
        ({"__key__": ["../../x", "/etc/passwd"], "id": [1, 2]}, ["../../x", "/etc/passwd"]),
        ({"id": [30, 10]}, ["30", "10"]),
        ({"id": [30, None]}, ["30", "1"]),
        ({"id": ["", "a\0b"]}, ["", "a\0b"]),
        ({}, ["0", "1"]),
    ],
    ids=str,
)
def test_the_key_is_a_usual_column_or_the_rows_number(tmp_path, columns, keys):
    samples = read(tmp_path, {"jpg": [IMAGE] * 2, "text": ["x"] * 2, **columns})
    assert [sample.key for sample in samples] == keys


def test_a_key_that_comes_again_has_a_reason(tmp_path):
    samples = read(tmp_path, {"jpg": [IMAGE] * 3, "text": ["x"] * 3, "key": ["a", "a", "b"]})
    assert [(s.key, s.problem) for s in samples] == [("a", ""), ("a", "duplicate_key"), ("b", "")]


def test_metadata_of_every_type_are_json_able(tmp_path):
    moment = datetime.datetime(2024, 2, 29, 12, 30, 0, 123456, tzinfo=datetime.UTC)
    samples = read(
        tmp_path,
        {
            "jpg": [IMAGE],
            "text": ["x"],
            "mask": [b"other bytes"],
            "second": pa.array([{"bytes": b"x", "path": "p"}], HF_IMAGE),
            "moment": [moment],
            "nanoseconds": pa.array([1], pa.timestamp("ns")),
            "day": [datetime.date(1970, 1, 2)],
            "no_day": pa.array([2**31 - 1], pa.date32()),
            "price": [decimal.Decimal("1.50")],
            "spent": pa.array([3], pa.duration("ms")),
            "nan": [float("nan")],
            "inf": [float("inf")],
            "large": pa.array([2**64 - 1], pa.uint64()),
            "truth": [True],
            "nested": [{"list": [{"when": moment, "raw": b"\xff"}], "none": None}],
            "nested_ns": pa.array([[1]], pa.list_(pa.timestamp("ns"))),
            "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int32())),
            "category": pa.array(["red"]).dictionary_encode(),
            "nothing": pa.nulls(1),
        }
        | {"list": [["a", None]]},
    )
    found = json.loads(json.dumps(samples[0].metadata, allow_nan=False))
    assert samples[0].problem == ""
    assert "mask" not in found
    assert "second" not in found
    assert found["moment"] == "2024-02-29 12:30:00.123456Z"
    assert found["nanoseconds"].endswith("00.000000001")
    assert (found["day"], found["price"]) == ("1970-01-02", "1.50")
    assert (found["nan"], found["inf"], found["large"]) == (None, "inf", 2**64 - 1)
    assert (found["truth"], found["list"], found["map"]) == (True, ["a", None], [["a", 1]])
    assert (found["category"], found["nothing"]) == ("red", None)
    assert found["nested"]["list"][0]["when"].startswith("2024-02-29")
    assert found["nested"]["list"][0]["raw"] == "\\xff"
    assert "00.000000001" in found["nested_ns"]


def test_texts_that_are_no_utf8_cost_their_sample_and_no_other(tmp_path):
    texts = pa.array([b"good", b"gr\xfcn"]).view(pa.string())
    samples = read(tmp_path, {"jpg": [IMAGE] * 2, "text": texts, "key": texts, "note": texts})
    assert facts_of(samples) == [("good", "good", ""), ("gr\\xfcn", None, "caption_not_utf8")]
    assert [sample.metadata["note"] for sample in samples] == ["good", "gr\\xfcn"]


def test_a_file_without_rows_says_so(tmp_path):
    samples = read(tmp_path, {"jpg": pa.array([], pa.binary()), "text": pa.array([], pa.string())})
    assert facts_of(samples) == [("<shard 00000>", None, "no_samples")]


def test_no_image_column_is_an_error_with_what_is_there_and_what_was_wanted(tmp_path):
    with pytest.raises(UserError, match=r"00000.*url \(string\), image \(string\).*wanted.*jpg, "):
        read(tmp_path, {"url": ["https://a"], "image": ["a.jpg"]})


def test_hash_and_length_are_those_of_the_file(tmp_path):
    read(tmp_path, {"jpg": [IMAGE] * 1000, "text": ["x"] * 1000})
    path = tmp_path / "00000.parquet"
    stream = stream_of(path)
    assert len(list(stream)) == 1000
    assert stream.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert stream.num_bytes == path.stat().st_size


def test_a_large_row_group_is_not_held_as_a_whole(tmp_path):
    path = tmp_path / "00000.parquet"
    image = os.urandom(50_000)
    table = pa.table({"jpg": [image[:-i] for i in range(1, 400)], "text": ["x"] * 399})
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": 8}
    pq.write_table(table, path, row_group_size=399, **options)
    del table
    pool = pa.default_memory_pool()
    before, peak = pool.bytes_allocated(), 0
    for sample in stream_of(path):
        assert sample.problem == ""
        peak = max(peak, pool.bytes_allocated() - before)
    assert 0 < peak < path.stat().st_size / 2


# Damage.

NUM_ROWS = 40


def large_file(path: Path, **options: Any) -> bytes:
    columns = {
        "key": [f"{i:05d}" for i in range(NUM_ROWS)],
        "text": [f"caption {i}" for i in range(NUM_ROWS)],
        "jpg": [random.Random(i).randbytes(500) for i in range(NUM_ROWS)],
        "when": pa.array(range(NUM_ROWS), pa.timestamp("us")),
        "tags": [["a", str(i)] for i in range(NUM_ROWS)],
    }
    pq.write_table(pa.table(columns), path, row_group_size=10, **options)
    return path.read_bytes()


def accounted_for(samples: list[ImageSample]) -> None:
    """All rows, or those before the break and one for the rest."""
    if len(samples) < NUM_ROWS:
        assert samples[-1].problem == "broken_shard"
    assert all(sample.problem != "broken_shard" for sample in samples[:-1])


def test_a_file_cut_short_anywhere_is_one_broken_shard(tmp_path):
    path = tmp_path / "00000.parquet"
    whole = large_file(path)
    for length in [1, 3, 4, 7, 8, 11, 12, *range(13, len(whole), 997), *range(-30, 0)]:
        path.write_bytes(whole[:length])
        (sample,) = stream_of(path)
        assert (sample.key, sample.problem) == ("<rest of 00000>", "broken_shard")
        assert sample.metadata["problem"]


@pytest.mark.parametrize("data", [b"x", b"PAR1", b"PAR1PAR1", b"no parquet" * 100, bytes(5000)])
def test_what_is_no_parquet_is_one_broken_shard(tmp_path, data):
    path = tmp_path / "00000.parquet"
    path.write_bytes(data)
    stream = stream_of(path)
    assert [sample.problem for sample in stream] == ["broken_shard"]
    assert stream.sha256 == hashlib.sha256(data).hexdigest()


def test_rows_before_a_damaged_row_group_are_read(tmp_path):
    path = tmp_path / "00000.parquet"
    whole = bytearray(large_file(path, write_page_checksum=True, use_dictionary=False))
    sound = list(stream_of(path))
    group = pq.ParquetFile(io.BytesIO(whole)).metadata.row_group(2)
    end = group.column(2).data_page_offset + group.column(2).total_compressed_size
    whole[end - 100] ^= 1  # in an image
    path.write_bytes(whole)
    samples = list(stream_of(path))
    assert samples[:-1] == sound[:20]
    assert samples[-1].problem == "broken_shard"


@pytest.mark.parametrize("options", [{}, {"write_page_checksum": True}, {"compression": "zstd"}])
def test_flipped_bytes_anywhere_lose_no_row_silently(tmp_path, options):
    path = tmp_path / "00000.parquet"
    whole = large_file(path, **options)
    rng = random.Random(0)
    footer = len(whole) - int.from_bytes(whole[-8:-4], "little") - 8
    places = [rng.randrange(len(whole)) for _ in range(250)]
    places += [rng.randrange(footer, len(whole)) for _ in range(250)]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            accounted_for(list(stream_of(path)))
        except UserError as error:  # a name in the footer may be another now
            assert "no column of image bytes" in str(error)  # noqa: PT017
