"""Which shards a pattern names: folders, metadata beside tars, object stores with many names."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import sample_members, write_tar
from helpers_s3 import S3, running_s3

from shards.errors import UnreadableShardError, UserError
from shards.find_shards import find_shards
from shards.image_shards import ShardStream
from shards.retry import RetryPolicy
from shards.source_shard import SourceShard, split_suffix
from shards.storage import location

FAST = RetryPolicy(attempts=2, first_delay_sec=0.01, factor=1.0)
BUCKET = "sources"
IMAGES = {"jpg": [b"x"], "text": ["x"]}
METADATA = {"url": ["https://a"], "caption": ["x"]}


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


def write_parquet(path: Path, columns: dict) -> None:
    pq.write_table(pa.table(columns), path)


def names_of(pattern: object) -> list[str]:
    return [Path(shard.url).name for shard in find_shards(str(pattern))[0]]


@pytest.fixture
def img2dataset(tmp_path) -> Path:
    """What img2dataset leaves: tars, with metadata in parquet and counts in JSON beside them."""
    for number in range(3):
        write_tar(tmp_path / f"{number:05d}.tar", sample_members("a", b"x", "x"))
        write_parquet(tmp_path / f"{number:05d}.parquet", METADATA)
        touch(tmp_path, f"{number:05d}_stats.json", f"._{number:05d}.tar")
    return tmp_path


@pytest.mark.parametrize("pattern", ["{0}/*", "{0}", "{0}/", "{0}/0000*", "{0}/*.{{tar,parquet}}"])
def test_metadata_beside_tars_are_no_shards(img2dataset, pattern):
    found = names_of(pattern.format(img2dataset))
    assert found == ["00000.tar", "00001.tar", "00002.tar"]


def test_metadata_are_none_for_one_shard_either_or_where_its_tar_is_missing(img2dataset):
    assert names_of(f"{img2dataset}/00001.*") == ["00001.tar"]
    (img2dataset / "00001.tar").unlink()
    assert names_of(f"{img2dataset}/*") == ["00000.tar", "00002.tar"]
    (img2dataset / "00001.parquet").write_bytes(b"no parquet")  # it may have held images
    assert names_of(f"{img2dataset}/*") == ["00000.tar", "00001.parquet", "00002.tar"]


def test_damaged_metadata_stand_in_no_ones_way(img2dataset):
    (img2dataset / "00000.parquet").write_bytes(b"no parquet")
    assert names_of(f"{img2dataset}/*") == ["00000.tar", "00001.tar", "00002.tar"]


def test_metadata_that_are_named_or_alone_are_refused_with_their_columns(img2dataset):
    message = r"00000\.parquet: no column of image bytes among url \(string\), caption.*wanted.*jpg"
    for pattern in ("00000.parquet", "*.parquet", "{00000..00002}.parquet"):
        with pytest.raises(UserError, match=message):
            find_shards(f"{img2dataset}/{pattern}")
    with pytest.raises(UserError, match="has the name of"):
        find_shards(f"{img2dataset}/00000.tar {img2dataset}/00000.parquet")


def test_parquet_with_images_beside_tars_is_never_left_out(img2dataset):
    write_parquet(img2dataset / "more.parquet", IMAGES)
    assert names_of(img2dataset)[-1] == "more.parquet"
    write_parquet(img2dataset / "00000.parquet", IMAGES)
    with pytest.raises(UserError, match="has the name of"):
        find_shards(f"{img2dataset}/*")


def test_parquet_with_images_is_found_and_read(tmp_path):
    for number in range(3):
        write_parquet(tmp_path / f"{number}.parquet", IMAGES)
    shards, _ = find_shards(str(tmp_path))
    assert [shard.name for shard in shards] == ["0", "1", "2"]
    assert [sample.problem for sample in ShardStream(shards[0])] == [""]


@pytest.mark.parametrize("pattern", ["{0}/empty", "{0}/empty/*", "{0}/*.tar", "{0}/x/*"])
def test_a_folder_without_shards_is_refused(tmp_path, pattern):
    touch(tmp_path / "empty")
    touch(tmp_path / "x", "a.txt", ".hidden.tar")
    with pytest.raises(UserError, match=r"no such image shard|2 files, none a shard"):
        find_shards(pattern.format(tmp_path))


@pytest.mark.parametrize("pattern", ["{0}/{{00000..00001.tar", "{0}/00000}}.tar"])
def test_a_brace_without_its_partner_is_refused(tmp_path, pattern):
    with pytest.raises(UserError, match="nbalanced braces"):
        find_shards(pattern.format(tmp_path))


def test_a_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path / "a", "0.tar")
    for pattern in ("~/a", "~/a/*.tar", "~/a/0.tar"):
        assert [shard.url for shard in find_shards(pattern)[0]] == [str(tmp_path / "a/0.tar")]


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("a/b.c.tar", ("b.c", ".tar")),
        ("a.tar.gz", ("a", ".tar.gz")),
        ("a.tgz", ("a", ".tgz")),
        ("s3://b/a.parquet", ("a", ".parquet")),
        ("a.tar/b", ("b", "")),
        ("https://h/a.tar?x=b.parquet", ("a", ".tar")),
        ("a?b.tar", ("a?b", ".tar")),
        ("a.gz", ("a.gz", "")),
        ("pipe:cat", ("", "")),
    ],
)
def test_names_and_suffixes(url, parts):
    assert split_suffix(url) == parts


def test_a_shard_is_cheap_to_send_to_a_worker():
    shard = SourceShard("s3://bucket/00000.tar", "00000", None)
    assert pickle.loads(pickle.dumps(shard)) == shard
    assert len(pickle.dumps(shard)) < 200


# On an object store.


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with running_s3(BUCKET) as running:
        filesystem = location(f"s3://{BUCKET}").fs
        for number in range(60):
            filesystem.pipe_file(f"{BUCKET}/many/{number:05d}.tar", b"x" * number)
        yield running


@pytest.fixture
def s3(server, monkeypatch) -> Iterator[S3]:
    for module in ("storage", "source_files", "parquet_shards"):
        monkeypatch.setattr(f"shards.{module}.REMOTE", FAST)
    quick = {"use_listings_cache": False, "config_kwargs": {"retries": {"total_max_attempts": 1}}}
    monkeypatch.setattr("shards.storage._S3_OPTIONS", quick)  # botocore waits longer than we do
    server.faults.clear()
    yield server
    server.faults.clear()


@pytest.mark.parametrize("pattern", ["{00000..00069}.tar", "*.tar", "", "000[0-5]?.tar"])
def test_many_names_cost_few_requests(s3, pattern):
    shards, gaps = find_shards(f"s3://{BUCKET}/many/{pattern}")
    assert [shard.num_bytes for shard in shards] == list(range(60))
    assert shards[7] == SourceShard(f"s3://{BUCKET}/many/00007.tar", "00007", 7)
    assert len(gaps) == (10 if "..000" in pattern else 0)
    assert len(s3.faults.requests) <= 6


def test_many_patterns_of_one_folder_cost_few_requests(s3):
    names = " ".join(f"s3://{BUCKET}/many/{number:05d}.tar" for number in range(60))
    assert len(find_shards(names)[0]) == 60
    assert len(s3.faults.requests) <= 6
    with pytest.raises(UserError, match=r"00099\.tar: no such image shard"):
        find_shards(f"{names} s3://{BUCKET}/many/00099.tar")


def test_few_names_are_looked_up_and_gaps_told(s3):
    shards, gaps = find_shards(f"s3://{BUCKET}/many/{{00058..00061}}.tar")
    assert [shard.num_bytes for shard in shards] == [58, 59]
    assert gaps == [f"s3://{BUCKET}/many/{number}.tar" for number in ("00060", "00061")]


def test_a_folder_that_may_not_be_listed_is_looked_up_name_by_name(s3, monkeypatch):
    def refuse(folder: object) -> None:
        from shards.errors import StorageError

        raise StorageError(folder, "listing failed") from PermissionError("AccessDenied")

    monkeypatch.setattr("shards.source_files.list_files", refuse)
    shards, gaps = find_shards(f"s3://{BUCKET}/many/{{00000..00069}}.tar")
    assert (len(shards), len(gaps)) == (60, 10)


@pytest.mark.parametrize("pattern", ["{00000..00069}.tar", "*.tar", "{00000..00001}.tar"])
def test_a_store_that_fails_for_good_is_an_error_and_no_gap(s3, pattern):
    s3.faults.plan("503", times=100)
    with pytest.raises(UserError, match=r"failed 2 times|cannot be listed"):
        find_shards(f"s3://{BUCKET}/many/{pattern}")
    s3.faults.clear()
    s3.faults.plan("reset", times=1)
    assert len(find_shards(f"s3://{BUCKET}/many/{pattern}")[0]) in (2, 60)


@pytest.mark.parametrize("kind", ["503", "reset", "short"])
def test_a_shard_comes_whole_or_not_at_all(s3, tmp_path, kind):
    members = [member for key in "abc" for member in sample_members(key, b"x" * 9000, "caption")]
    data = write_tar(tmp_path / "made.tar", members).read_bytes()
    location(f"s3://{BUCKET}").fs.pipe_file(f"{BUCKET}/whole/00000.tar", data)
    (shard,), _ = find_shards(f"s3://{BUCKET}/whole/*.tar")
    s3.faults.plan(kind, times=1, where=lambda method, path: method == "GET")
    stream = ShardStream(shard)
    assert [(sample.key, sample.problem) for sample in stream] == [(k, "") for k in "abc"]
    assert stream.num_bytes == len(data)
    s3.faults.plan(kind, times=100, where=lambda method, path: method == "GET")
    samples = []
    with pytest.raises(UnreadableShardError, match=r"^s3://.*downloading failed 2 times.*Remedy: "):
        samples += ShardStream(shard)
    assert samples == []


def test_parquet_on_an_object_store_is_held_to_having_images(s3, tmp_path):
    filesystem = location(f"s3://{BUCKET}").fs
    for name, columns in (("images", IMAGES), ("metadata", METADATA)):
        write_parquet(tmp_path / "made.parquet", columns)
        filesystem.put_file(str(tmp_path / "made.parquet"), f"{BUCKET}/{name}/0.parquet")
    filesystem.pipe_file(f"{BUCKET}/metadata/0.tar", b"x")
    (shard,), _ = find_shards(f"s3://{BUCKET}/images/")
    assert [sample.problem for sample in ShardStream(shard)] == [""]
    assert names_of(f"s3://{BUCKET}/metadata/*") == ["0.tar"]
    with pytest.raises(UserError, match="no column of image bytes among url"):
        find_shards(f"s3://{BUCKET}/metadata/0.parquet")
