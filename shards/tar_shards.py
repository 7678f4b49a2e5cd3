"""The samples of a webdataset tar, as img2dataset writes them.

A sample is the run of members that share a key: `key.jpg`, `key.txt`, `key.json`. Names are data,
never paths.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Self, TypeVar

from shards.column import Json
from shards.image_sample import IMAGE_SUFFIXES, BrokenShardError, ImageSample

Data = TypeVar("Data")
Member = tuple[str, str, Callable[[], Data]]  # key, suffix, what reads what it holds
Group = tuple[str, dict[str, Data], str]  # key, what it holds by suffix, problem

# What reading raises for damaged bytes; a disk that fails raises other `OSError`s.
DAMAGED = (tarfile.TarError, EOFError, ValueError, zlib.error)
_NOTE = re.compile(r"__[^/]*__($|/)")
_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_WBITS = 31  # with header and checksum
_CHUNK_BYTES = 1 << 14


def iter_tar_samples(
    stream: io.RawIOBase, magic: bytes, caption_field: str
) -> Iterator[ImageSample]:
    """The samples of a tar, in order and in one pass.

    Args:
        stream: the file from its beginning.
        magic: its first bytes, which say how it is compressed.
        caption_field: see `build_sample`.

    Raises:
        BrokenShardError: it is damaged or cut short, after the samples that are whole before it.
    """
    try:
        unpacked: Any = _GunzippedStream(stream) if magic == _GZIP_MAGIC else stream
        with tarfile.open(fileobj=unpacked, mode="r|*", tarinfo=StrictTarInfo) as tar:
            for group in group_members(iter_members(tar, _read)):
                yield build_sample(*group, caption_field)
            expect_end(tar)
    except DAMAGED as error:
        raise BrokenShardError(str(error)) from None


class _GunzippedStream(io.RawIOBase):
    """What gzip made of a file, to the last byte before a break.

    `gzip` gives up what it has unpacked when the file ends early; tarfile's own reader knows
    neither checksums nor files of several parts.
    """

    def __init__(self, packed: io.RawIOBase) -> None:
        self._packed = packed
        self._parts = self._unpack()

    def read(self, size: int = -1) -> bytes:
        """Some bytes, as they come; none at the end."""
        return next(self._parts, b"")

    def _unpack(self) -> Iterator[bytes]:
        part = zlib.decompressobj(_GZIP_WBITS)
        while data := self._packed.read(_CHUNK_BYTES):
            while data:
                if part.eof:
                    if not (data := data.lstrip(b"\0")):  # padding
                        break
                    part = zlib.decompressobj(_GZIP_WBITS)
                if unpacked := part.decompress(data):
                    yield unpacked
                data = part.unused_data
        if not part.eof:
            raise EOFError("compressed file ends early")


class StrictTarInfo(tarfile.TarInfo):
    """A header that is damaged or missing is an error; to tarfile it is the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        """The next header."""
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the end mark: zeros
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} where a member or the end should be") from None


def iter_members(
    tar: tarfile.TarFile, data_of: Callable[[tarfile.TarFile, tarfile.TarInfo], Data]
) -> Iterator[Member[Data]]:
    """Key and suffix of each file of a tar, and what calls `data_of` it."""
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # it would remember every member
        if _belongs_to_sample(member):
            yield *split_name(member.name), partial(data_of, tar, member)


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def _belongs_to_sample(member: tarfile.TarInfo) -> bool:
    """Files do; not folders and links, nor `__…__`, webdataset's notes on a shard as a whole."""
    return member.isreg() and not _NOTE.match(member.name)


def expect_end(tar: tarfile.TarFile) -> None:
    """Hold what follows the last member to being zeros: else samples are behind the end mark."""
    file: Any = tar.fileobj
    while data := file.read(1 << 20):
        if any(data):
            raise tarfile.ReadError("data after the end of the archive")


def split_name(member_name: str) -> tuple[str, str]:
    """Key and suffix of a member, as webdataset splits them.

    Bytes that are no UTF-8 are spelled out, so that two names stay two names.
    """
    from webdataset.tariterators import base_plus_ext

    name = member_name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    key, suffix = base_plus_ext(name)
    # Without a suffix, or with nothing before it, the name is the key.
    return (name, "") if key is None else (key, suffix.lower())


def group_members(members: Iterable[Member[Data]]) -> Iterator[Group[Data]]:
    """Gather neighbouring members of one key; the problem is that of members or key, if any.

    webdataset's own `group_by_keys` drops what it cannot group; here everything is accounted for.
    """
    seen: set[str] = set()
    current: str | None = None
    parts: dict[str, Data] = {}
    problem = ""
    for key, suffix, read in members:
        if key != current:  # the sample before is whole, whatever becomes of this member
            if current is not None:
                yield current, parts, problem
            current, parts = key, {}
            problem = "duplicate_key" if key in seen else ""
            seen.add(key)
        if suffix in parts:
            problem = problem or "repeated_member"
        parts[suffix] = read()
    if current is not None:
        yield current, parts, problem


def build_sample(
    key: str, parts: dict[str, bytes], problem: str, caption_field: str = ""
) -> ImageSample:
    """A sample from the bytes of its members.

    Args:
        key: of all of them.
        parts: their bytes by suffix.
        problem: what is wrong with key or members already.
        caption_field: the field of `.json` that holds the caption; default: `.txt` does, or, where
            there is none, the field `caption`.
    """
    sample = ImageSample(key=key, problem=problem)
    if problem:
        return sample
    sample.image = next((parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts), None)
    try:
        sample.metadata = _parse_metadata(parts.get("json"))
    except (ValueError, RecursionError):
        sample.problem = "broken_json"
        return sample
    try:
        text = None if caption_field else parts.get("txt")
        sample.caption = _caption_of(text, sample.metadata.get(caption_field or "caption"))
    except UnicodeDecodeError:
        sample.problem = "caption_not_utf8"
    return sample.judged()


def _parse_metadata(data: bytes | None) -> Json:
    parsed: Any = json.loads(data) if data is not None else {}
    if not isinstance(parsed, dict):
        raise ValueError("not a JSON object")
    json.dumps(parsed, ensure_ascii=False).encode()  # half a surrogate pair has no UTF-8
    return parsed


def _caption_of(text: bytes | None, field: Any) -> str | None:
    if text is not None:
        return text.decode("utf-8").strip()
    return field.strip() if isinstance(field, str) else None
