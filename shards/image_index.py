"""Random access to the samples of one local image shard, for reading it in a training order."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator

from shards.errors import UserError
from shards.image_shards import (
    ImageSample,
    belongs_to_sample,
    build_sample,
    group_members,
    split_name,
)

Span = tuple[int, int]  # offset in the file, length


class ShardIndex:
    """Where each sample of an uncompressed tar stands.

    Args:
        path: a local tar.

    Raises:
        UserError: it cannot be read, or not by position.
    """

    def __init__(self, path: str) -> None:
        try:
            with tarfile.open(path, mode="r:") as archive:
                self._samples = list(group_members(_spans(archive)))
            self._file = open(path, "rb")  # noqa: SIM115, PTH123 - open as long as the index lives
        except (OSError, tarfile.TarError) as error:
            raise UserError(
                path,
                f"cannot be read by position ({error})",
                wanted="a local, uncompressed webdataset tar",
            ) from None

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, row: int) -> ImageSample:
        """The sample of one row of the ledger."""
        key, spans, repeated = self._samples[row]
        return build_sample(key, {s: self._read(span) for s, span in spans.items()}, repeated)

    def _read(self, span: Span) -> bytes:
        offset, length = span
        return os.pread(self._file.fileno(), length, offset)  # threads share the file


def _spans(archive: tarfile.TarFile) -> Iterator[tuple[str, str, Span]]:
    for member in archive:
        if belongs_to_sample(member):
            yield *split_name(member.name), (member.offset_data, member.size)
