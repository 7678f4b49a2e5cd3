"""Image shards in: whatever a tar holds, every sample comes out, usable or with its reason."""

import errno
import gzip
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import Members, sample_members, write_tar

from shards.errors import UserError
from shards.find_shards import find_shards
from shards.image_index import ShardIndex
from shards.image_sample import ImageSample
from shards.image_shards import ShardStream
from shards.source_shard import SourceShard

IMAGE = b"\xff\xd8 the bytes of a picture"


def shard_at(path: Path) -> SourceShard:
    (shard,), _ = find_shards(str(path))
    return shard


def read(path: Path) -> list[ImageSample]:
    return list(ShardStream(shard_at(path)))


def problems_of(path: Path) -> dict[str, str]:
    return {sample.key: sample.problem for sample in read(path)}


def read_members(tmp_path: Path, *members: tuple[str, bytes]) -> list[ImageSample]:
    return read(write_tar(tmp_path / "00000.tar", members))


def three_samples() -> Members:
    return [member for key in "abc" for member in sample_members(key, IMAGE, f"caption of {key}")]


def three_large_samples() -> Members:
    return [member for key in "abc" for member in sample_members(key, os.urandom(30_000), key)]


def offsets_of(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return tar.getmembers()


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


# What a pattern finds.


def test_a_range_in_braces_names_shards_in_order(tmp_path):
    touch(tmp_path, *(f"{number:05d}.tar" for number in range(12)))
    shards, gaps = find_shards(f"{tmp_path}/{{00000..00011}}.tar")
    assert [shard.name for shard in shards] == [f"{number:05d}" for number in range(12)]
    assert shards[0].url == str(tmp_path / "00000.tar")
    assert gaps == []


def test_gaps_in_a_range_are_fine_and_said(tmp_path):
    touch(tmp_path, "00001.tar", "00004.tar")
    shards, gaps = find_shards(f"{tmp_path}/{{00000..00004}}.tar")
    assert [shard.name for shard in shards] == ["00001", "00004"]
    assert gaps == [f"{tmp_path}/{number:05d}.tar" for number in (0, 2, 3)]


def test_stars_and_lists_of_patterns_work_and_a_shard_named_twice_counts_once(tmp_path):
    touch(tmp_path / "a", "00000.tar", "00001.tar", "notes.txt")
    touch(tmp_path / "b", "x.tar.gz", "00002.tar")
    shards, gaps = find_shards(f"{tmp_path}/a/*.tar {tmp_path}/b/x.tar.gz  {tmp_path}/a/00001.tar")
    assert [shard.name for shard in shards] == ["00000", "00001", "x"]
    assert gaps == []
    shards, _ = find_shards(f"{tmp_path}/{{a,b}}/*.tar")
    assert [shard.name for shard in shards] == ["00000", "00001", "00002"]


def test_relative_paths_and_file_urls_work(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "00000.tar", three_samples())
    monkeypatch.chdir(tmp_path)
    for pattern in ("00000.tar", "./*.tar", f"file://{path}"):
        (shard,), _ = find_shards(pattern)
        assert shard.num_bytes == path.stat().st_size
        assert [sample.key for sample in ShardStream(shard)] == ["a", "b", "c"]


def test_a_shard_in_another_filesystem_is_read_alike(tmp_path):
    import fsspec

    path = write_tar(tmp_path / "00000.tar", three_samples())
    fsspec.filesystem("memory").pipe("/images/00000.tar", path.read_bytes())
    (shard,), gaps = find_shards("memory://images/{00000..00001}.tar")
    assert (shard.name, shard.num_bytes) == ("00000", path.stat().st_size)
    assert gaps == ["memory://images/00001.tar"]
    assert [sample.key for sample in ShardStream(shard)] == ["a", "b", "c"]
    (shard,), _ = find_shards("memory://images/*.tar")
    assert [sample.problem for sample in ShardStream(shard)] == ["", "", ""]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("", "no pattern given"),
        ("  ", "no pattern given"),
        ("{root}/nowhere.tar", "no such image shard"),
        ("{root}/nothing-in-it", "no such image shard"),
        ("{root}/notes", "1 files, none a shard"),
        ("{root}/*.tgz", "no such image shard"),
        ("{root}/{{7..9}}.tar", "no image shard matches"),
        ("{root}/00000.tar {root}/nowhere.tar", "no such image shard"),
        ("{root}/notes.txt", "not the name of an image shard"),
        ("{root}/null.tar", "not the name of an image shard"),
        ("{root}/ledger.tar.gz", "not the name of an image shard"),
        ("{root}/.tar", "not the name of an image shard"),
    ],
)
def test_a_pattern_without_image_shards_is_refused_with_an_example(tmp_path, pattern, found):
    touch(tmp_path, "00000.tar", "notes.txt", "null.tar", "ledger.tar.gz", ".tar")
    touch(tmp_path / "notes", "notes.txt")
    touch(tmp_path / "nothing-in-it")
    with pytest.raises(UserError, match=rf"{found}.*Remedy: for example SHARDS="):
        find_shards(pattern.format(root=tmp_path))


@pytest.mark.parametrize("names", [("a/0.tar", "b/0.tar"), ("0.tar", "0.tar.gz")], ids=repr)
def test_two_shards_of_one_name_are_refused(tmp_path, names):
    for name in names:
        touch((tmp_path / name).parent, Path(name).name)
    with pytest.raises(UserError, match=r"has the name of .*they name the latent shards"):
        find_shards(" ".join(str(tmp_path / name) for name in names))


def test_an_unknown_protocol_is_refused_in_one_line():
    with pytest.raises(UserError, match="nosuch"):
        find_shards("nosuch://bucket/{00000..00009}.tar")


# What a shard holds.


def test_img2datasets_layout_is_read_in_the_order_of_its_keys(tmp_path):
    members: list[tuple[str, bytes]] = []
    for key in ("00000004", "00000002", "00000010"):  # as downloads finished
        members += sample_members(key, IMAGE + key.encode(), f"caption of {key}", {"width": 7})
    samples = read_members(tmp_path, *members)
    assert [sample.key for sample in samples] == ["00000004", "00000002", "00000010"]
    first = samples[0]
    assert (first.image, first.caption, first.problem) == (
        IMAGE + b"00000004",
        "caption of 00000004",
        "",
    )
    assert first.metadata["width"] == 7
    assert first.metadata["url"] == "https://images.test/00000004"


@pytest.mark.parametrize("suffix", ["jpg", "JPG", "jpeg", "png", "webp"])
def test_every_image_suffix_of_img2dataset_is_an_image(tmp_path, suffix):
    (sample,) = read_members(tmp_path, (f"a.{suffix}", IMAGE), ("a.txt", b"a lion"))
    assert (sample.image, sample.problem) == (IMAGE, "")


def test_the_caption_comes_from_txt_and_else_from_json(tmp_path):
    samples = read_members(
        tmp_path,
        ("a.jpg", IMAGE),
        ("a.json", b'{"caption": "from json"}'),
        ("a.txt", b" from txt\n"),
        ("b.jpg", IMAGE),
        ("b.json", '{"caption": " from json ü "}'.encode()),
    )
    assert [sample.caption for sample in samples] == ["from txt", "from json ü"]


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([("a.txt", b"x")], "no_image"),
        ([("a.jpg", b""), ("a.txt", b"x")], "empty_image"),
        ([("a.jpg", IMAGE)], "no_caption"),
        ([("a.jpg", IMAGE), ("a.txt", b"")], "no_caption"),
        ([("a.jpg", IMAGE), ("a.txt", b" \n\t")], "no_caption"),
        ([("a.jpg", IMAGE), ("a.json", b"{}")], "no_caption"),
        ([("a.jpg", IMAGE), ("a.json", b'{"caption": null}')], "no_caption"),
        ([("a.jpg", IMAGE), ("a.json", b'{"caption": 7}')], "no_caption"),
        ([("a.jpg", IMAGE), ("a.txt", b"gr\xfcn")], "caption_not_utf8"),
        ([("a.jpg", IMAGE), ("a.txt", b"x"), ("a.json", b"{")], "broken_json"),
        ([("a.jpg", IMAGE), ("a.txt", b"x"), ("a.json", b"[]")], "broken_json"),
        ([("a.jpg", IMAGE), ("a.txt", b"x"), ("a.json", b"")], "broken_json"),
        ([("a.jpg", IMAGE), ("a.txt", b"x"), ("a.json", b'{"a": "\xff"}')], "broken_json"),
        ([("a.jpg", IMAGE), ("a.txt", b"x"), ("a.json", b'{"a": "\\ud800"}')], "broken_json"),
        ([("a.jpg", IMAGE), ("a.json", b'{"caption": "\\udc00"}')], "broken_json"),
        ([("a.jpg", IMAGE), ("a.txt", b"x"), ("a.json", b"[" * 100_000)], "broken_json"),
        ([("a.jpg", IMAGE), ("a.txt", b"x"), ("a.jpg", IMAGE)], "repeated_member"),
        ([("a.jpg", IMAGE), ("a.txt", b"x"), ("a.TXT", b"y")], "repeated_member"),
        ([("no suffix", IMAGE)], "no_image"),
        ([(".jpg", IMAGE)], "no_image"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_sample_that_cannot_be_used_comes_out_with_its_reason(tmp_path, members, problem):
    before, after = sample_members("0", IMAGE, "x"), sample_members("z", IMAGE, "x")
    samples = read_members(tmp_path, *before, *members, *after)
    assert [sample.problem for sample in samples] == ["", problem, ""]


def test_names_are_data_and_never_paths(tmp_path):
    folder = tmp_path / "in" / "here"
    keys = ["../../escaped", "/absolute", "a/../b", "./c", "ü/🦁", "d\ne", "-rf", "C:\\x"]
    members = [member for key in keys for member in sample_members(key, IMAGE, "x")]
    write_tar(folder / "00000.tar", members)
    before = {path for path in tmp_path.rglob("*")}
    samples = read(folder / "00000.tar")
    assert [sample.key for sample in samples] == keys
    assert {path for path in tmp_path.rglob("*")} == before
    assert not Path("/absolute.jpg").exists()


def test_a_name_that_is_not_utf8_is_still_a_key_of_text(tmp_path):
    path = write_tar(tmp_path / "00000.tar", sample_members("AAA", IMAGE, "x"))
    data = bytearray(path.read_bytes())
    for info in offsets_of(path):
        header = data[info.offset : info.offset + 512]
        header[:3] = b"A\xffA"
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
        data[info.offset : info.offset + 512] = header
    path.write_bytes(data)
    (sample,) = read(path)
    assert sample.key == "A\\xffA"
    assert sample.problem == ""


def test_links_folders_and_notes_on_the_shard_are_no_samples(tmp_path):
    path = tmp_path / "00000.tar"
    notes = [("__notes__", b"x"), ("__notes__/a.jpg", b"x")]
    with tarfile.open(path, "w") as tar:
        for kind, name in ((tarfile.DIRTYPE, "folder"), (tarfile.SYMTYPE, "link.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name, data in [*notes, *sample_members("a", IMAGE, "x")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert problems_of(path) == {"a": ""}


def test_long_names_and_other_tar_formats_are_read(tmp_path):
    key = "folder/" * 40 + "a"
    for number, tar_format in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=tar_format) as tar:
            for name, data in sample_members(key, IMAGE, "x"):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        assert problems_of(path) == {key: ""}


def test_a_compressed_shard_is_read_alike(tmp_path):
    path = write_tar(tmp_path / "00000.tar", three_samples())
    packed = tmp_path / "00001.tar.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [s.image for s in read(packed)] == [s.image for s in read(path)]
    assert problems_of(packed) == {"a": "", "b": "", "c": ""}


def test_the_hash_is_that_of_the_file(tmp_path):
    plain = write_tar(tmp_path / "00000.tar", three_samples())
    large = write_tar(tmp_path / "00001.tar", [*three_samples(), ("d.jpg", os.urandom(3_000_000))])
    packed = tmp_path / "00002.tar.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    padded = tmp_path / "00003.tar"
    padded.write_bytes(plain.read_bytes() + bytes(50_000))
    damaged = tmp_path / "00004.tar"
    damaged.write_bytes(b"no tar" + bytes(100_000))
    for path in (plain, large, packed, padded, damaged):
        stream = ShardStream(shard_at(path))
        assert list(stream)
        assert stream.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


# Keys, and captions from a field.


def test_a_key_that_comes_again_is_kept_once_and_its_return_has_a_reason(tmp_path):
    a, b = sample_members("a", IMAGE, "x"), sample_members("b", IMAGE, "x")
    samples = read_members(tmp_path, *a, *b, *a, *a, *b)
    assert [(s.key, s.problem) for s in samples] == [
        ("a", ""),
        ("b", ""),
        ("a", "duplicate_key"),  # with itself once more behind it
        ("b", "duplicate_key"),
    ]
    assert samples[2].image is None


def test_images_first_and_captions_after_are_all_accounted_for(tmp_path):
    images = [(f"{key}.jpg", IMAGE) for key in "abc"]
    captions = [(f"{key}.txt", b"x") for key in "abc"]
    samples = read_members(tmp_path, *images, *captions)
    assert [s.problem for s in samples] == ["no_caption"] * 3 + ["duplicate_key"] * 3


def test_odd_keys_come_through_as_they_are(tmp_path):
    keys = ["a" * 100_000, "../" * 500 + "x", "a\0b", "\0", "", " ", "\u202e", "a\\xffb"]
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for key in keys:
            for name, data in sample_members(key + "/k", IMAGE, "x"):
                info = tarfile.TarInfo("replaced")
                info.pax_headers, info.size = {"path": name}, len(data)
                tar.addfile(info, io.BytesIO(data))
    samples = read(path)
    assert [sample.key for sample in samples] == [key + "/k" for key in keys]
    assert {sample.problem for sample in samples} == {""}


def test_two_names_that_are_no_utf8_stay_two_keys(tmp_path):
    path = tmp_path / "00000.tar"
    members = [
        (f"A{byte}A.{suffix}", IMAGE) for byte in "\udcff\udcfe" for suffix in ("jpg", "txt")
    ]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    samples = read(path)
    assert [(s.key, s.problem) for s in samples] == [
        ("A\\xffA", "caption_not_utf8"),
        ("A\\xfeA", "caption_not_utf8"),
    ]
    assert all(sample.key.encode() for sample in samples)


def test_samples_of_unknown_suffixes_alone_have_no_image(tmp_path):
    members = [("a.gif", b"x"), ("a.txt", b"x"), ("b.cls", b"1"), ("c.heic", b"x")]
    samples = read_members(tmp_path, *members)
    assert [(s.key, s.problem) for s in samples] == [(key, "no_image") for key in "abc"]


@pytest.mark.parametrize(
    ("fields", "caption", "problem"),
    [
        ({"blip": " a lion "}, "a lion", ""),
        ({"blip": ""}, "", "no_caption"),
        ({"blip": None}, None, "no_caption"),
        ({"blip": ["a lion"]}, None, "no_caption"),
        ({"caption": "a tiger"}, None, "no_caption"),
    ],
    ids=str,
)
def test_a_named_caption_field_is_the_only_one(tmp_path, fields, caption, problem):
    document = json.dumps(fields).encode()
    members = [("a.jpg", IMAGE), ("a.txt", b"\xff not even text"), ("a.json", document)]
    path = write_tar(tmp_path / "00000.tar", members)
    (sample,) = ShardStream(shard_at(path), caption_field="blip")
    assert (sample.caption, sample.problem) == (caption, problem)
    assert ShardIndex(str(path), caption_field="blip").read(0) == sample


# What is left of a broken shard.


def test_a_shard_without_samples_says_so(tmp_path):
    notes = [("__notes__", b"x"), ("__more__/a.jpg", IMAGE)]
    for number, members in enumerate(([], notes)):
        path = write_tar(tmp_path / f"{number}.tar", members)
        assert problems_of(path) == {f"<shard {number}>": "no_samples"}
    packed = tmp_path / "2.tgz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert problems_of(packed) == {"<shard 2>": "no_samples"}
    for name in ("3.tar", "4.tar.gz", "5.tgz", "6.parquet"):
        touch(tmp_path, name)
        assert problems_of(tmp_path / name) == {f"<shard {name[0]}>": "no_samples"}


@pytest.mark.parametrize(
    "data", [b"not a tar", b"\x89PNG\r\n" * 1000, b"\0" * 100, b"\x1f\x8b\x08broken"], ids=repr
)
@pytest.mark.parametrize("name", ["00000.tar", "00000.tar.gz"])
def test_what_is_no_tar_is_one_broken_shard(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    assert list(problems_of(path).values()) == ["broken_shard"]


def accounted_for(found: Sequence[ImageSample]) -> None:
    """All of a, b, c; or those before the break and a last one that says so."""
    keys = [sample.key for sample in found if not sample.problem]
    assert keys == ["a", "b", "c"][: len(keys)]
    if len(keys) < 3:
        assert found[-1].problem == "broken_shard"
        assert found[-1].key == "<rest of 00000>"


def test_a_tar_cut_short_anywhere_yields_what_comes_before_and_says_so(tmp_path):
    path = write_tar(tmp_path / "00000.tar", three_samples())
    whole = path.read_bytes()
    end = max(info.offset_data + 512 for info in offsets_of(path))
    for length in [1, *range(400, end, 400), *range(512, end, 512), end - 1, end]:
        path.write_bytes(whole[:length])
        found = read(path)
        accounted_for(found)
        assert found[-1].problem == "broken_shard"


def test_a_compressed_tar_cut_short_says_so(tmp_path):
    path = write_tar(tmp_path / "plain.tar", three_samples())
    whole = path.read_bytes()
    packed = tmp_path / "00000.tar.gz"
    packed.write_bytes(gzip.compress(whole)[:-20])
    assert read(packed)[-1].problem == "broken_shard"
    end = offsets_of(path)[5].offset  # a whole gzip file of half a tar
    packed.write_bytes(gzip.compress(whole[:end]))
    accounted_for(read(packed))
    assert read(packed)[-1].problem == "broken_shard"


def test_a_compressed_tar_cut_short_anywhere_yields_all_that_comes_before(tmp_path):
    path = write_tar(tmp_path / "plain.tar", three_large_samples())
    packed = tmp_path / "00000.tar.gz"
    whole = gzip.compress(path.read_bytes(), mtime=0)
    for length in [*range(1, 30), *range(0, len(whole), 1777)[1:], *range(-900, 0, 7)]:
        packed.write_bytes(whole[:length])
        stream = ShardStream(SourceShard(str(packed), "00000", None))
        found = list(stream)
        unpacked = zlib.decompressobj(31).decompress(whole[:length])
        path.write_bytes(unpacked)
        before = read(path)
        assert found[-1].problem == "broken_shard"
        assert found[:-1] == [sample for sample in before if not sample.problem]
        assert stream.sha256 == hashlib.sha256(packed.read_bytes()).hexdigest()
        assert stream.num_bytes == packed.stat().st_size


def test_a_compressed_tar_with_a_flipped_byte_loses_nothing_silently(tmp_path):
    path = write_tar(tmp_path / "plain.tar", three_samples())
    packed = tmp_path / "00000.tar.gz"
    whole = gzip.compress(path.read_bytes(), mtime=0)
    sound, damaged = read(path), 0
    for place in range(len(whole)):
        packed.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        found = read(packed)
        # Another code for the same bytes is no damage.
        assert found == sound or found[-1].problem == "broken_shard"
        damaged += found != sound
    assert damaged > len(whole) / 2


def test_gzip_of_several_parts_is_read_to_its_end(tmp_path):
    whole = write_tar(tmp_path / "plain.tar", three_samples()).read_bytes()
    packed = tmp_path / "00000.tgz"
    for padding in (b"", bytes(100_000)):
        packed.write_bytes(gzip.compress(whole[:700]) + gzip.compress(whole[700:]) + padding)
        assert problems_of(packed) == {"a": "", "b": "", "c": ""}
    packed.write_bytes(gzip.compress(whole) + b"x")
    assert [sample.problem for sample in read(packed)] == ["", "", "", "broken_shard"]


def test_a_damaged_header_anywhere_loses_no_sample_silently(tmp_path):
    path = write_tar(tmp_path / "00000.tar", three_samples())
    whole = path.read_bytes()
    for info in offsets_of(path):
        for place in (0, 124, 148, 257, 511):  # name, size, checksum, magic, padding
            data = bytearray(whole)
            data[info.offset + place] ^= 0x15
            path.write_bytes(data)
            accounted_for(read(path))


def test_samples_after_the_end_mark_are_not_dropped_silently(tmp_path):
    path = write_tar(tmp_path / "00000.tar", three_samples()[:3])
    path.write_bytes(
        path.read_bytes() + write_tar(tmp_path / "x.tar", three_samples()).read_bytes()
    )
    samples = read(path)
    assert [sample.problem for sample in samples] == ["", "broken_shard"]


def test_the_account_of_a_broken_shard_is_the_same_every_time(tmp_path):
    path = write_tar(tmp_path / "00000.tar", [*three_samples(), ("d.jpg", bytes(50_000))])
    whole = path.read_bytes()
    for length in (100, 1000, 5 * 512, 30_000):
        path.write_bytes(whole[:length])
        first, second = read(path), read(path)
        assert first == second
        assert " at 0x" not in str(first)


def test_a_shard_that_cannot_be_read_now_is_an_error_and_not_a_broken_shard(tmp_path):
    path = write_tar(tmp_path / "00000.tar", three_samples())
    shard = shard_at(path)
    path.unlink()
    with pytest.raises(UserError, match=r"00000\.tar: cannot be read.*Remedy: "):
        list(ShardStream(shard))


@pytest.mark.parametrize("name", ["00000.tar", "00000.tar.gz"])
def test_a_disk_that_fails_in_mid_read_is_an_error_and_not_a_broken_shard(
    tmp_path, monkeypatch, name
):
    path = write_tar(tmp_path / "plain.tar", [*three_samples(), ("d.jpg", os.urandom(100_000))])
    whole = path.read_bytes()
    path = tmp_path / name
    path.write_bytes(gzip.compress(whole) if name.endswith("gz") else whole)
    shard = shard_at(path)

    class FailingFile(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 40_000:
                raise OSError(errno.EIO, "input/output error")
            return super().read(size)

    monkeypatch.setattr(
        "shards.image_shards.open_source", lambda shard: FailingFile(Path(shard.url).read_bytes())
    )
    found = []
    with pytest.raises(UserError, match=r"cannot be read .*input/output error"):
        found += ShardStream(shard)
    assert "broken_shard" not in {sample.problem for sample in found}


def test_a_shard_can_be_read_twice(tmp_path):
    stream = ShardStream(shard_at(write_tar(tmp_path / "00000.tar", three_samples())))
    first = [sample.key for sample in stream]
    assert [sample.key for sample in stream] == first == ["a", "b", "c"]


def test_real_shards_of_img2dataset_are_read_whole(emoji_shards):
    shard = shard_at(emoji_shards / "00000.tar")
    stream = ShardStream(shard)
    samples = list(stream)
    stats = json.loads((emoji_shards / "00000_stats.json").read_text())
    assert len(samples) == stats["successes"] == 492
    assert all(sample.problem == "" for sample in samples)
    assert len({sample.key for sample in samples}) == 492
    assert {"url", "key", "status"} <= samples[0].metadata.keys()
    whole = (emoji_shards / "00000.tar").read_bytes()
    assert stream.sha256 == hashlib.sha256(whole).hexdigest()


def test_globs_of_all_kinds_name_shards_and_a_file_of_that_very_name_is_meant(tmp_path):
    for name in ("00000", "00001", "00002", "00010", "odd[1]"):
        write_tar(tmp_path / f"{name}.tar", three_samples())

    def names(pattern: str) -> list[str]:
        return [shard.name for shard in find_shards(f"{tmp_path}/{pattern}")[0]]

    assert names("0000[01].tar") == ["00000", "00001"]
    assert names("0000?.tar") == ["00000", "00001", "00002"]
    assert names("000*{0,2}.tar") == ["00000", "00002", "00010"]
    assert names("odd[1].tar") == ["odd[1]"]
    with pytest.raises(UserError, match="no such image shard"):
        names("0001[5-9].tar")
