"""The samples of a parquet file with image bytes: img2dataset's, or Hugging Face's `datasets`.

The image is in a binary column of a usual name, or in one of `struct<bytes, path>`. Key, caption
and all columns that hold no bytes come with it. Read in small batches, never as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from shards.arrow_values import (
    bytes_of,
    bytes_or_values,
    is_binary,
    json_values_of,
    text_of,
    unwrapped,
)
from shards.column import Json
from shards.errors import StorageError, UserError
from shards.image_sample import IMAGE_SUFFIXES, BrokenShardError, ImageSample
from shards.retry import LOCAL, REMOTE, retried
from shards.storage import is_remote, location

IMAGE_COLUMNS = (*IMAGE_SUFFIXES, "image", "image_bytes", "bytes")
CAPTION_COLUMNS = ("caption", "text", "TEXT")
KEY_COLUMNS = ("key", "__key__", "id")
_BATCH_ROWS = 64
_BUFFER_BYTES = 1 << 20


def iter_parquet_samples(file: IO[bytes], url: str, caption_field: str) -> Iterator[ImageSample]:
    """The samples of a parquet file, in order; keys default to the row's number.

    Args:
        file: open, and seekable.
        url: for the error.
        caption_field: the column of captions; default: the first of `CAPTION_COLUMNS`.

    Raises:
        BrokenShardError: it is damaged or no parquet, after the rows that can be read.
        UserError: no column holds images.
    """
    import pyarrow as pa

    parquet = _open(file)
    schema, num_rows = parquet.schema_arrow, parquet.metadata.num_rows
    image = find_image_column(schema)
    if not image:
        raise no_image_column(url, schema)
    caption = caption_field or _first(CAPTION_COLUMNS, schema.names)
    key = _first(KEY_COLUMNS, schema.names)
    wanted = {image, caption, key}
    columns = [f.name for f in schema if f.name in wanted or not _holds_bytes(f.type)]
    row = 0
    seen: set[str] = set()
    try:
        for group in range(parquet.num_row_groups):  # no batch is of two: one may be damaged
            for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns):
                for sample in _samples_of(batch, row, image, caption, key):
                    unique = sample.key not in seen
                    seen.add(sample.key)
                    yield sample if unique else ImageSample(key=sample.key, problem="duplicate_key")
                row += batch.num_rows
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _damage(error) from None
    if row != num_rows:
        raise BrokenShardError(f"{row} rows where its footer says {num_rows}")


def _open(file: IO[bytes]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    options = {"buffer_size": _BUFFER_BYTES, "pre_buffer": False}
    try:
        parquet = pq.ParquetFile(file, page_checksum_verification=True, **options)
        _ = parquet.schema_arrow  # may be what is damaged
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damage(error) from None
    return parquet


def find_image_column(schema: Any) -> str:
    """The column of image bytes; empty where there is none."""
    usual = [name for name in IMAGE_COLUMNS if name in schema.names]
    fields = {field.name: field.type for field in schema}
    for name in (*usual, *fields):
        binary = is_binary(fields[name]) and name in usual
        if binary or _is_image_struct(fields[name]):
            return name
    return ""


def no_image_column(url: str, schema: Any) -> UserError:
    """The error of a parquet file without images."""
    found = ", ".join(f"{field.name} ({field.type})" for field in schema)
    return UserError(
        url,
        f"no column of image bytes among {found or 'none at all'}",
        wanted=f"one of {', '.join(IMAGE_COLUMNS)} (binary), or a struct<bytes, path>",
        remedy="name the tars or parquet files that hold the images; this may be their metadata",
    )


def read_schema(url: str) -> Any:
    """The columns of a parquet file; None where they cannot be read, as reading all will tell."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = location(url)

    def read() -> Any:
        with where.open("rb") as file:
            return pq.read_schema(file)

    policy = REMOTE if is_remote(where) else LOCAL
    try:
        return retried(read, where=url, action="reading its columns", policy=policy)
    except (pa.ArrowException, OSError, ValueError, StorageError):
        return None


def _damage(error: Exception) -> Exception:
    """What an error of reading says of the file; one of the disk, which has a number, stays."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return BrokenShardError(str(error).split("\n")[0])


def _first(wanted: tuple[str, ...], names: list[str]) -> str:
    return next((name for name in wanted if name in names), "")


def _is_image_struct(kind: Any) -> bool:
    from pyarrow import types

    if not types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    return is_binary(kind.field("bytes").type)


def _holds_bytes(kind: Any) -> bool:
    return is_binary(kind) or _is_image_struct(kind)


def _samples_of(batch: Any, row: int, image: str, caption: str, key: str) -> list[ImageSample]:
    """The samples of a batch whose first row has this number."""
    columns = dict(zip(batch.schema.names, map(unwrapped, batch.columns), strict=True))
    nothing = [None] * batch.num_rows
    images = bytes_of(columns.pop(image))
    captions = bytes_or_values(columns.pop(caption)) if caption in columns else nothing
    keys = bytes_or_values(columns.pop(key)) if key in columns else nothing
    metadata = {name: json_values_of(column) for name, column in columns.items()}
    return [
        _sample(
            str(row + i) if keys[i] is None else text_of(keys[i]),
            images[i],
            captions[i],
            {name: values[i] for name, values in metadata.items()},
        )
        for i in range(batch.num_rows)
    ]


def _sample(key: str, image: bytes | None, caption: Any, metadata: Json) -> ImageSample:
    sample = ImageSample(key=key, image=image, metadata=metadata)
    try:
        sample.caption = caption.decode().strip() if isinstance(caption, bytes) else None
    except UnicodeDecodeError:
        sample.problem = "caption_not_utf8"
    return sample.judged()
