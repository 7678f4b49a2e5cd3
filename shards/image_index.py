"""Random access to the samples of one local image shard, for reading it in a training order."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import IO, Any

from shards.errors import UserError
from shards.image_sample import BrokenShardError, ImageSample, sample_of_none
from shards.source_shard import PIPE, is_parquet, shard_name
from shards.storage import location
from shards.tar_shards import (
    DAMAGED,
    Group,
    StrictTarInfo,
    build_sample,
    expect_end,
    group_members,
    iter_members,
)

Span = tuple[int, int]  # offset in the file, length


class ShardIndex:
    """Where each sample of an uncompressed tar stands; rows are those that `ShardStream` yields.

    Args:
        path: a local tar.
        caption_field: as for `ShardStream`.

    Raises:
        UserError: it cannot be read, or not by position.
    """

    def __init__(self, path: str, caption_field: str = "") -> None:
        self._caption_field = caption_field
        self._samples: list[Group[Span]] = []
        self._file = _open_tar(path)  # open as long as the index lives
        # What stands for samples that are not there is the last row.
        self._stand_ins: list[ImageSample] = []
        try:
            with tarfile.open(fileobj=self._file, mode="r:", tarinfo=StrictTarInfo) as archive:
                self._samples.extend(group_members(iter_members(archive, _span)))
                expect_end(archive)
        except OSError as error:
            raise _not_by_position(path, str(error)) from None
        except DAMAGED as error:
            if not self._samples:
                raise _not_by_position(path, str(error)) from None
            self._stand_ins = [BrokenShardError(str(error)).as_sample(shard_name(path))]
        if not self._samples:
            self._stand_ins = [sample_of_none(shard_name(path))]

    def __len__(self) -> int:
        return len(self._samples) + len(self._stand_ins)

    def read(self, row: int) -> ImageSample:
        """The sample of one row of the ledger."""
        if row >= len(self._samples):
            return self._stand_ins[row - len(self._samples)]
        key, spans, problem = self._samples[row]
        parts = {suffix: self._read(span) for suffix, span in spans.items()}
        return build_sample(key, parts, problem, self._caption_field)

    def _read(self, span: Span) -> bytes:
        offset, length = span
        return os.pread(self._file.fileno(), length, offset)  # threads share the file


def _open_tar(path: str) -> IO[bytes]:
    if path.startswith(PIPE) or is_parquet(path):
        raise _not_by_position(path, "it is no tar file")
    where = location(path)
    if not isinstance(where, Path):
        raise _not_by_position(path, "it is not on a local disk")
    try:
        return where.open("rb")
    except OSError as error:
        raise _not_by_position(path, str(error)) from None


def _span(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Span:
    file: Any = archive.fileobj
    if member.offset_data + member.size > os.fstat(file.fileno()).st_size:
        raise tarfile.ReadError("unexpected end of data")
    return member.offset_data, member.size


def _not_by_position(path: str, why: str) -> UserError:
    return UserError(
        path,
        f"cannot be read by position ({why})",
        wanted="a local, uncompressed webdataset tar",
        remedy="for this comparison, unpack some shards to a local disk and precompute those",
    )
