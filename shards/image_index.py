"""Random access to the samples of one local image shard, for reading it in a training order."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import UserError
from shards.image_sample import BrokenShardError, ImageSample, sample_of_none
from shards.source_shard import PIPE, is_parquet, shard_name
from shards.storage import location
from shards.tar_shards import (
    DAMAGED,
    StrictTarInfo,
    build_sample,
    expect_end,
    group_members,
    iter_members,
)

Span = tuple[int, int]  # first byte in the file, and the one behind the last

_END_MARK = bytes(2 * tarfile.BLOCKSIZE)


class ShardIndex:
    """Where each sample of an uncompressed tar stands; rows are those that `ShardStream` yields.

    It takes 16 bytes a sample and keeps no file open, so a run may index all of its shards.

    Args:
        path: a local tar.
        caption_field: as for `ShardStream`.

    Raises:
        UserError: it cannot be read, or not by position.
    """

    def __init__(self, path: str, caption_field: str = "") -> None:
        self._path, self._caption_field = _local_tar(path), caption_field
        spans: list[Span] = []
        # What reading a sample alone would not show: that its key is an earlier one's, say.
        self._unusable: dict[int, ImageSample] = {}
        # What stands for samples that are not there is the last row.
        self._stand_ins: list[ImageSample] = []
        try:
            with (
                self._path.open("rb") as file,
                tarfile.open(fileobj=file, mode="r:", tarinfo=StrictTarInfo) as archive,
            ):
                for key, members, problem in group_members(iter_members(archive, _span)):
                    if problem:
                        self._unusable[len(spans)] = build_sample(key, {}, problem)
                    firsts, ends = zip(*members.values(), strict=True)
                    spans.append((min(firsts), max(ends)))
                expect_end(archive)
        except OSError as error:
            raise _not_by_position(path, str(error)) from None
        except DAMAGED as error:
            if not spans:
                raise _not_by_position(path, str(error)) from None
            self._stand_ins = [BrokenShardError(str(error)).as_sample(shard_name(path))]
        if not spans:
            self._stand_ins = [sample_of_none(shard_name(path))]
        self._spans = np.array(spans, dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans) + len(self._stand_ins)

    def read(self, row: int) -> ImageSample:
        """The sample of one row of the ledger.

        Raises:
            UserError: the file is gone, or not the one that was indexed.
        """
        if row >= len(self._spans):
            return self._stand_ins[row - len(self._spans)]
        if row in self._unusable:
            return self._unusable[row]
        first, end = self._spans[row].tolist()
        try:
            with self._path.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), end - first, first) + _END_MARK
            with tarfile.open(
                fileobj=io.BytesIO(data), mode="r:", tarinfo=StrictTarInfo
            ) as archive:
                (group,) = group_members(iter_members(archive, lambda _, m: _cut_out(data, m)))
        except (OSError, *DAMAGED) as error:
            raise UserError(
                self._path,
                f"the sample at byte {first} cannot be read any more ({error})",
                wanted="the file as it was when it was indexed",
                remedy="put it back, and run the same command again",
            ) from None
        return build_sample(*group, self._caption_field)


def _local_tar(path: str) -> Path:
    if path.startswith(PIPE) or is_parquet(path):
        raise _not_by_position(path, "it is no tar file")
    where = location(path)
    if not isinstance(where, Path):
        raise _not_by_position(path, "it is not on a local disk")
    return where


def _span(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Span:
    """From a member's header to the next one's."""
    file: Any = archive.fileobj
    if member.offset_data + member.size > os.fstat(file.fileno()).st_size:
        raise tarfile.ReadError("unexpected end of data")
    return member.offset, archive.offset


def _cut_out(data: bytes, member: tarfile.TarInfo) -> bytes:
    return data[member.offset_data : member.offset_data + member.size]


def _not_by_position(path: str, why: str) -> UserError:
    return UserError(
        path,
        f"cannot be read by position ({why})",
        wanted="a local, uncompressed webdataset tar",
        remedy="copy or unpack the shards to a local disk; or precompute them, which stage 1 does "
        "wherever they are",
    )
