"""Image shards in: webdataset tars in img2dataset's layout, read sample by sample.

A sample is the run of members that share a key: `key.jpg`, `key.txt`, `key.json`. Names are data,
never paths. Nothing is skipped: what cannot be used comes out as a sample with its `problem`.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, Self, TypeVar

from shards.column import Json
from shards.errors import UnreadableShardError, UserError
from shards.layout import LEDGER
from shards.receipt import NULL

Data = TypeVar("Data")

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_NOTE = re.compile(r"__[^/]*__($|/)")
_HINT = "for example SHARDS='/data/laion/{00000..00099}.tar'"


@dataclass(frozen=True)
class SourceShard:
    """One image shard: where it is, the name its latent shards get, and its length."""

    url: str
    name: str
    num_bytes: int


@dataclass(kw_only=True)
class ImageSample:
    """One sample as it stands in its shard.

    Args:
        key: its id, from the members' common name.
        image: undecoded bytes of the image.
        caption: from `.txt`, else the `caption` of `.json`.
        metadata: the fields of `.json`.
        problem: why it cannot be used; empty when it can, as far as is known undecoded.
    """

    key: str
    image: bytes | None = None
    caption: str | None = None
    metadata: Json = field(default_factory=dict)
    problem: str = ""


def find_shards(patterns: str) -> tuple[list[SourceShard], list[str]]:
    """The image shards that patterns name, and the gaps in their numbering.

    Args:
        patterns: paths or fsspec URLs, separated by white space, with `{00000..00099}`, `*`, `?`
            and `[01]`.

    Returns:
        shards in order, and the names out of brace ranges that do not exist.

    Raises:
        UserError: nothing there, a plain path that does not exist, or two shards of one name.
    """
    import braceexpand

    if not patterns.split():
        raise UserError("--shards", "no pattern given", wanted="image shards", remedy=_HINT)
    found: dict[str, SourceShard] = {}
    gaps = []
    for pattern in patterns.split():
        for url in braceexpand.braceexpand(pattern):
            filesystem, present = _list_files(url)
            if not present and url == pattern:
                raise UserError(url, "no such image shard", wanted="a webdataset tar", remedy=_HINT)
            if not present:
                gaps.append(url)
            for one in present:
                where = filesystem.unstrip_protocol(one) if "://" in url else one
                shard = SourceShard(where, _shard_name(where), filesystem.size(one))
                if found.setdefault(shard.name, shard).url != where:
                    raise UserError(
                        where,
                        f"has the name of {found[shard.name].url}",
                        wanted="different file names: they name the latent shards",
                        remedy="precompute them into two datasets (--out), or rename one",
                    )
    if not found:
        raise UserError(patterns, "no image shard matches", wanted="webdataset tars", remedy=_HINT)
    return sorted(found.values(), key=lambda shard: shard.name), gaps


def _list_files(url: str) -> tuple[Any, list[str]]:
    """The files that a URL with or without patterns names, and the filesystem that they are in."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        paths = sorted(filesystem.glob(path)) if _is_pattern(url, filesystem, path) else [path]
        return filesystem, [one for one in paths if filesystem.isfile(one)]
    except (ImportError, OSError, ValueError) as error:  # no such protocol, or not installed
        raise UserError(url, f"cannot be listed ({error})", wanted="image shards") from None


def _is_pattern(url: str, filesystem: Any, path: str) -> bool:
    """Whether a name is to be matched; in a web address `?` and `[` are what they are."""
    signs = "*" if url.startswith(("http://", "https://")) else "*?["
    return any(sign in path for sign in signs) and not filesystem.isfile(path)


def _shard_name(url: str) -> str:
    file_name = url.rsplit("/", 1)[-1]
    name = file_name.removesuffix(".gz").removesuffix(".tar")
    if name == file_name or name in ("", NULL, LEDGER):
        raise UserError(url, "not the name of an image shard", wanted="<name>.tar", remedy=_HINT)
    return name


class ShardStream:
    """Iterate the samples of one image shard in one pass, hashing its bytes on the way.

    After the iteration `sha256` is the hash of the file. A shard that is damaged or cut short
    yields the samples that are whole before the break, and then one more for all the rest, whose
    problem is `broken_shard`.
    """

    def __init__(self, shard: SourceShard) -> None:
        self.shard = shard
        self.sha256 = ""

    def __iter__(self) -> Iterator[ImageSample]:
        import fsspec

        try:
            with fsspec.open(self.shard.url, "rb") as file:
                stream = _HashedStream(file)
                try:
                    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictTarInfo) as tar:
                        for key, parts, repeated in group_members(_members(tar)):
                            yield build_sample(key, parts, repeated)
                        _expect_nothing_but_zeros(tar)
                except (tarfile.TarError, EOFError, ValueError) as error:
                    yield ImageSample(
                        key=f"<rest of {self.shard.name}>",
                        metadata={"problem": str(error)},
                        problem="broken_shard",
                    )
                stream.drain()
        except OSError as error:  # of the disk or the network: no fact about the shard
            raise UnreadableShardError(
                self.shard.url, f"cannot be read ({error})", remedy="run the same command again"
            ) from None
        self.sha256 = stream.hash.hexdigest()


class _HashedStream(io.RawIOBase):
    """A forward-only reader that hashes what passes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.hash = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.hash.update(data)
        return data

    def drain(self) -> None:
        """Read to the end: tar readers stop at the end mark or at a break, hashes must not."""
        while self.read(1 << 20):
            pass


class _StrictTarInfo(tarfile.TarInfo):
    """A header that is damaged or missing is an error; to tarfile it is the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the end mark: zeros
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} where a member or the end should be") from None


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    """Key, suffix and bytes of each file of a tar."""
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # it would remember every member
        file = tar.extractfile(member) if belongs_to_sample(member) else None
        if file is not None:
            yield *split_name(member.name), file.read()


def belongs_to_sample(member: tarfile.TarInfo) -> bool:
    """Files do; not folders and links, nor `__…__`, webdataset's notes on a shard as a whole."""
    return member.isreg() and not _NOTE.match(member.name)


def _expect_nothing_but_zeros(tar: tarfile.TarFile) -> None:
    assert tar.fileobj is not None
    while data := tar.fileobj.read(1 << 20):
        if any(data):
            raise tarfile.ReadError("data after the end of the archive")


def split_name(member_name: str) -> tuple[str, str]:
    """Key and suffix of a member, as webdataset splits them; names need not be UTF-8."""
    from webdataset.tariterators import base_plus_ext

    name = member_name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    key, suffix = base_plus_ext(name)
    # Without a suffix, or with nothing before it, the name is the key.
    return (name, "") if key is None else (key, suffix.lower())


def group_members(
    members: Iterable[tuple[str, str, Data]],
) -> Iterator[tuple[str, dict[str, Data], bool]]:
    """Gather neighbouring members of one key: the key, its parts by suffix, is one repeated?

    webdataset's own `group_by_keys` drops what it cannot group; here everything is accounted for.
    """
    current: str | None = None
    parts: dict[str, Data] = {}
    repeated = False
    for key, suffix, data in members:
        if current is not None and key != current:
            yield current, parts, repeated
            parts, repeated = {}, False
        current = key
        repeated = repeated or suffix in parts
        parts[suffix] = data
    if current is not None:
        yield current, parts, repeated


def build_sample(key: str, parts: dict[str, bytes], repeated: bool) -> ImageSample:
    """A sample from the bytes of its members."""
    sample = ImageSample(key=key)
    if repeated:
        sample.problem = "repeated_member"
        return sample
    sample.image = next((parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts), None)
    try:
        sample.metadata = _parse_metadata(parts.get("json"))
    except (ValueError, RecursionError):
        sample.problem = "broken_json"
        return sample
    try:
        sample.caption = _caption_of(parts.get("txt"), sample.metadata)
    except UnicodeDecodeError:
        sample.problem = "caption_not_utf8"
    if not sample.problem:
        if not sample.image:
            sample.problem = "no_image" if sample.image is None else "empty_image"
        elif not sample.caption:
            sample.problem = "no_caption"
    return sample


def _parse_metadata(data: bytes | None) -> Json:
    parsed: Any = json.loads(data) if data is not None else {}
    if not isinstance(parsed, dict):
        raise ValueError("not a JSON object")
    json.dumps(parsed, ensure_ascii=False).encode()  # half a surrogate pair has no UTF-8
    return parsed


def _caption_of(text: bytes | None, metadata: Json) -> str | None:
    if text is not None:
        return text.decode("utf-8").strip()
    caption = metadata.get("caption")
    return caption.strip() if isinstance(caption, str) else None
