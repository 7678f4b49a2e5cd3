"""Random access to image shards: the n-th sample is the n-th of the stream."""

import gzip

import pytest
from conftest import sample_members, write_tar

from shards.errors import UserError
from shards.image_index import ShardIndex
from shards.image_shards import ShardStream, find_shards

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


@pytest.mark.parametrize("data", [None, b"", b"no tar", gzip.compress(bytes(10_240))], ids=repr)
def test_what_cannot_be_read_by_position_is_refused_by_name(tmp_path, data):
    path = tmp_path / "00000.tar"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=r"00000\.tar: cannot be read by position"):
        ShardIndex(str(path))
