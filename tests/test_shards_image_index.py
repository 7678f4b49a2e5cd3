"""Random access to image shards: the n-th sample is the n-th of the stream."""

import gzip

import pytest
from conftest import sample_members, write_tar

from shards.errors import UserError
from shards.find_shards import find_shards
from shards.image_index import ShardIndex
from shards.image_shards import ShardStream
from shards.source_shard import SourceShard

MEMBERS = [
    ("__notes__", b"on the shard"),
    *sample_members("00000002", b"two", "caption two"),
    ("unusable.jpg", b"no caption"),
    *sample_members("../00000001", b"one", "caption one", {"width": 3}),
    ("repeated.jpg", b"a"),
    ("repeated.jpg", b"b"),
    ("broken.jpg", b"a"),
    ("broken.json", b"{"),
    *sample_members("00000009", b"", "no image"),
]


def test_each_row_is_the_sample_that_the_stream_yields_there(tmp_path):
    path = write_tar(tmp_path / "00000.tar", MEMBERS)
    (shard,), _ = find_shards(str(path))
    streamed = list(ShardStream(shard))
    index = ShardIndex(str(path))
    assert len(index) == len(streamed) == 6
    for row in (5, 0, 3, 3, 1, 4, 2):
        assert index.read(row) == streamed[row]


def test_a_shard_of_a_job_is_indexed_like_its_ledger(image_shards):
    index = ShardIndex(str(image_shards / "00001.tar"))
    assert [index.read(row).key for row in range(len(index))] == [f"{n:08d}" for n in range(20, 40)]


@pytest.mark.parametrize(
    "data", [None, b"", b"no tar", gzip.compress(bytes(10_240), mtime=0)], ids=repr
)
def test_what_cannot_be_read_by_position_is_refused_by_name(tmp_path, data):
    path = tmp_path / "00000.tar"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=r"00000\.tar: cannot be read by position"):
        ShardIndex(str(path))


@pytest.mark.parametrize("url", ["s3://bucket/00000.tar", "pipe:cat 00000.tar", "a/00000.parquet"])
def test_what_is_no_local_tar_is_refused_by_name(url):
    with pytest.raises(UserError, match=r"cannot be read by position.*wanted a local, uncompr"):
        ShardIndex(url)


def test_rows_are_those_of_the_stream_whatever_is_wrong_with_a_shard(tmp_path):
    path = tmp_path / "00000.tar"
    whole = write_tar(path, [*MEMBERS, *MEMBERS[1:4], ("again.jpg", b"x")]).read_bytes()
    ends = [len(whole), *range(len(whole) - 1024, 1024, -1024), *range(700, len(whole), 1100)]
    variants = [whole[:end] for end in ends] + [whole + b"x"]
    for data in [*variants, write_tar(path, MEMBERS[:1]).read_bytes()]:
        path.write_bytes(data)
        streamed = list(ShardStream(SourceShard(str(path), "00000", None)))
        if len(streamed) > 1 or streamed[0].problem == "no_samples":
            index = ShardIndex(f"file://{path}")
            assert [index.read(row) for row in range(len(index))] == streamed


def test_a_caption_field_is_passed_on(tmp_path):
    members = [("a.jpg", b"x"), ("a.txt", b"from txt"), ("a.json", b'{"blip": "from blip"}')]
    path = str(write_tar(tmp_path / "00000.tar", members))
    assert ShardIndex(path, caption_field="blip").read(0).caption == "from blip"
    assert ShardIndex(path).read(0).caption == "from txt"
