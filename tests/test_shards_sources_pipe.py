"""Shards that a command writes: all it wrote and a good end, or an error that says what it said."""

import gzip
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import sample_members, write_tar

from shards.errors import UnreadableShardError, UserError
from shards.find_shards import find_shards
from shards.image_shards import ShardStream
from shards.retry import RetryPolicy
from shards.source_shard import SourceShard

FAST = RetryPolicy(attempts=3, first_delay_sec=0.01, factor=1.0)


@pytest.fixture(autouse=True)
def scratch(monkeypatch, tmp_path) -> Iterator[Path]:
    monkeypatch.setattr("shards.pipe.REMOTE", FAST)
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.rglob("*")) == []


@pytest.fixture
def tar(tmp_path) -> Path:
    members = [member for key in "abc" for member in sample_members(key, b"x" * 9000, "caption")]
    return write_tar(tmp_path / "00000.tar", members)


def stream_of(command: str) -> ShardStream:
    return ShardStream(SourceShard(f"pipe:{command}", "00000", None))


def open_files() -> int:
    """Files that this process has open and that have no name any more; others' sockets are none."""
    links = Path("/proc/self/fd").iterdir()
    return sum("(deleted)" in str(link.readlink()) for link in links if link.is_symlink())


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("pipe:aws s3 cp s3://b/{00000..00002}.tar -", ["00000", "00001", "00002"]),
        ("pipe:cat 'a b/0.tar.gz' | gunzip -c > 1.tar", ["1"]),
        ('pipe:curl -s "https://h/00007.tgz?sig=a/b.tar&x=1" | cat', ["00007"]),
        ("pipe:cat a/x.parquet | tee log.txt", ["x"]),
        ("pipe:cat x.tar; awk '{print $1}' ${HOME}", ["x"]),
        ("pipe:cat 1.tar\n  pipe:cat 0.tar  ", ["0", "1"]),
    ],
)
def test_a_command_is_the_rest_of_its_line_and_names_its_shard(pattern, names):
    shards, gaps = find_shards(pattern)
    assert [shard.name for shard in shards] == names
    assert gaps == []
    lines = [line.strip() for line in pattern.splitlines()]
    if "{0" not in pattern:
        assert sorted(shard.url for shard in shards) == sorted(lines)
    assert {shard.num_bytes for shard in shards} == {None}


def test_files_and_commands_go_together_and_backslashes_are_the_shells(tar):
    command = rf"pipe:cat {tar.parent}/x.tar | tr '\n' '\n'"
    shards, _ = find_shards(f"{tar} {command}\n")
    assert [shard.url for shard in shards] == [str(tar), command]


@pytest.mark.parametrize("pattern", ["pipe:", "pipe:cat x.zip", "pipe:cat null.tar"])
def test_a_command_that_names_no_shard_is_refused(pattern):
    with pytest.raises(UserError, match="not the name of an image shard; wanted a command"):
        find_shards(pattern)


def test_two_commands_of_one_name_are_refused():
    with pytest.raises(UserError, match="has the name of pipe:cat a/0"):
        find_shards("pipe:cat a/0.tar\npipe:cat b/0.tar")


def test_a_command_is_read_like_the_file_that_it_writes(tar):
    for command in (f"cat '{tar}'", f"gzip -c < {tar} | cat", f"(head -c 700; cat) < {tar}"):
        stream = stream_of(command)
        assert [(sample.key, sample.problem) for sample in stream] == [(k, "") for k in "abc"]
    assert stream.sha256 == hashlib.sha256(tar.read_bytes()).hexdigest()
    assert stream.num_bytes == tar.stat().st_size
    (tar.parent / "x.tgz").write_bytes(gzip.compress(tar.read_bytes()))
    assert len(list(stream_of(f"cat {tar.parent}/x.tgz"))) == 3


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("echo no such bucket >&2; exit 3", "exit status 3: no such bucket"),
        ("cat {tar}; echo late >&2; exit 1", "exit status 1: late"),
        ("cat {tar} | (cat; exit 4) | cat", "exit status 4: nothing on stderr"),
        ("head -c 5000 {tar}; kill -9 $$", "killed by signal 9: nothing on stderr"),
        ("cat {tar}; kill -TERM $$", "killed by signal 15"),
        ("cat {tar}.gone", "exit status 1: cat: .*No such file"),
        ("echo a >&2; echo b >&2; false", "exit status 1: a / b"),
        ("for i in {{1..999}}; do echo line $i >&2; done; false", "line 998 / line 999"),
    ],
)
def test_a_command_that_fails_is_tried_again_and_then_an_error_with_its_words(
    tar, command, found, tmp_path
):
    tries = tmp_path / "tries"
    command = command.format(tar=tar)
    samples, before = [], open_files()
    message = rf"(?s)^pipe:.*the command failed 3 times in .*{found}.*Remedy: "
    with pytest.raises(UnreadableShardError, match=message) as caught:
        samples += stream_of(f"echo x >> {tries}; {command}")
    assert samples == []
    assert tries.read_text() == "x\n" * FAST.attempts
    assert len(str(caught.value)) < 1500
    assert open_files() == before


def test_a_command_that_fails_in_passing_is_read_whole(tar, tmp_path):
    flag = tmp_path / "flag"
    command = f"test -e {flag} || (touch {flag}; head -c 9999 {tar}; false) && cat {tar}"
    assert [sample.key for sample in stream_of(command)] == ["a", "b", "c"]


@pytest.mark.parametrize("command", ["no-such-command-here x.tar", "no-such-command | cat", "/"])
def test_a_command_that_is_not_there_is_an_error_at_once(command, monkeypatch):
    monkeypatch.setattr("shards.retry.time.sleep", lambda _: pytest.fail("tried again"))
    with pytest.raises(UnreadableShardError, match=r"exit status 12[67]: .*Remedy: install it"):
        list(stream_of(command))


def test_a_command_that_writes_nothing_is_a_shard_without_samples():
    assert [sample.problem for sample in stream_of("true")] == ["no_samples"]


def test_a_command_cannot_read_what_is_typed_and_its_words_may_be_any_bytes():
    with pytest.raises(UnreadableShardError, match="exit status 1"):
        list(stream_of("read line; printf '\\xff\\xfe' >&2; exit 1"))


def test_nothing_stays_open_of_a_reader_that_stops(tar):
    before = open_files()
    samples = iter(stream_of(f"cat {tar}"))
    assert next(samples).key == "a"
    assert open_files() > before
    del samples
    assert open_files() == before
