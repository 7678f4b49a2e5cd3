"""Image shards in: webdataset tars and parquet files with images, read sample by sample.

`shards.find_shards` says which shards there are, `shards.image_sample` what can be wrong with a
sample.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import IO

from shards.errors import UnreadableShardError
from shards.image_sample import BrokenShardError, ImageSample, sample_of_none
from shards.parquet_shards import iter_parquet_samples
from shards.source_shard import SourceShard, is_parquet, open_source
from shards.tar_shards import iter_tar_samples


class ShardStream:
    """Iterate the samples of one image shard in one pass.

    A shard that is not a local file is first brought here whole, so the network cannot fail in
    mid-read; nothing is left of it, however the iteration ends. A shard that is damaged or cut
    short yields the samples that are whole before the break, and then one for all the rest.

    Args:
        shard: which.
        caption_field: the field of `.json`, or the parquet column, that holds the captions;
            default: `.txt`, else the field `caption`; in parquet `caption`, `text` or `TEXT`.

    Attributes:
        sha256: of the file's bytes as they are, after the iteration.
        num_bytes: how many these are.

    Raises:
        UnreadableShardError: by iterating: the disk, the network or the command failed.
        UserError: by iterating: it is a parquet file without a column of images.
    """

    def __init__(self, shard: SourceShard, caption_field: str = "") -> None:
        self.shard = shard
        self.caption_field = caption_field
        self.sha256 = ""
        self.num_bytes = 0

    def __iter__(self) -> Iterator[ImageSample]:
        with open_source(self.shard) as file:
            stream = _HashedStream(file)
            try:
                yield from self._iter_all(file, stream)
                if is_parquet(self.shard.url):
                    file.seek(0)  # its reader jumps about in the file itself
                stream.drain()
            except OSError as error:  # of the disk: no fact about the shard
                raise UnreadableShardError(
                    self.shard.url, f"cannot be read ({error})", remedy="run the same command again"
                ) from None
        self.sha256, self.num_bytes = stream.hash.hexdigest(), stream.num_bytes

    def _iter_all(self, file: IO[bytes], stream: _HashedStream) -> Iterator[ImageSample]:
        """The samples, and what stands for those that cannot be read, or for none at all."""
        is_empty = True
        try:
            for sample in self._iter_whole(file, stream):
                is_empty = False
                yield sample
        except BrokenShardError as error:
            is_empty = False
            yield error.as_sample(self.shard.name)
        if is_empty:
            yield sample_of_none(self.shard.name)

    def _iter_whole(self, file: IO[bytes], stream: _HashedStream) -> Iterator[ImageSample]:
        magic = file.read(2)
        file.seek(0)
        if not magic:
            return
        if is_parquet(self.shard.url):
            yield from iter_parquet_samples(file, self.shard.url, self.caption_field)
        else:
            yield from iter_tar_samples(stream, magic, self.caption_field)


class _HashedStream(io.RawIOBase):
    """A forward-only reader that hashes what passes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.hash = hashlib.sha256()
        self.num_bytes = 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.hash.update(data)
        self.num_bytes += len(data)
        return data

    def drain(self) -> None:
        """Read to the end: tar readers stop at the end mark or at a break, hashes must not."""
        while self.read(1 << 20):
            pass
