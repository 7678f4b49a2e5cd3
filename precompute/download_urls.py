"""A list of URLs, as its owner has it, and in the one form in which img2dataset gets it.

That form is a table with `url`, `caption` (where there is one) and every other column. Whatever
img2dataset would trip over, lose samples over or open a local file for is put right or left out
here, because it drops a sample without a word when its metadata is no JSON.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from shards.errors import UserError
from shards.storage import Location, local_copy, location, write_whole

if TYPE_CHECKING:
    from pathlib import Path

    import pyarrow as pa

URL_NAMES = ("url", "URL")
CAPTION_NAMES = ("caption", "text", "TEXT")
FORMATS = ("parquet", "csv", "tsv", "txt", "json", "jsonl")
# img2dataset's own fields of a sample.
_RESERVED = {
    *("key", "caption", "url", "width", "height", "original_width", "original_height"),
    *("status", "error_message", "exif", "md5", "sha256", "sha512"),
}


@dataclass(frozen=True, kw_only=True)
class UrlList:
    """A list of URLs to download.

    Args:
        table: `url`, each once and `http(s)` only; `caption` where there is one; other columns.
        has_captions: whether there is a caption column.
        sha256: of the list's files, one after another.
        num_duplicates: rows left out because an earlier row has their URL.
        num_no_address: rows left out because they have no http(s) address.
    """

    table: pa.Table
    has_captions: bool
    sha256: str
    num_duplicates: int
    num_no_address: int

    @property
    def other_columns(self) -> list[str]:
        """The columns that go along with a sample as its metadata."""
        return [name for name in self.table.column_names if name not in ("url", "caption")]


def read_url_list(pattern: str, url_col: str = "", caption_col: str = "") -> UrlList:
    """Read a list of URLs.

    Args:
        pattern: a file or fsspec URL, or a glob of files; `.gz` is fine, but for Parquet.
        url_col: the column of the URLs; empty finds it.
        caption_col: the column of the captions; empty finds it, or does without.

    Raises:
        UserError: not there, of no known format, without such a column, or without a URL.
    """
    import pyarrow as pa

    if not pattern.strip():
        raise UserError("--urls", "no list given", remedy="make download LIST=urls.parquet")
    digest = hashlib.sha256()
    tables = [_read_table(where, digest) for where in _find_files(pattern)]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowInvalid as error:
        raise UserError(pattern, f"its files do not have the same columns ({error})") from None
    table, has_captions = _rename(table, pattern, url_col, caption_col)
    num_rows = table.num_rows
    table = _with_address(_as_plain(table))
    num_addresses = table.num_rows
    table = _each_url_once(table)
    if not table.num_rows:
        raise UserError(pattern, f"no http(s) address in {num_rows} rows", wanted="URLs of images")
    return UrlList(
        table=table,
        has_captions=has_captions,
        sha256=digest.hexdigest(),
        num_duplicates=num_addresses - table.num_rows,
        num_no_address=num_rows - num_addresses,
    )


def _find_files(pattern: str) -> list[Location]:
    import fsspec

    if not any(sign in pattern for sign in "*?[") or pattern.startswith(("http://", "https://")):
        return [location(pattern)]
    place = location(pattern)  # refuses an unknown protocol
    filesystem, path = fsspec.core.url_to_fs(str(place))
    files = [one for one in sorted(filesystem.glob(path)) if filesystem.isfile(one)]
    if not files:
        raise UserError(pattern, "no file matches", wanted="a list of URLs")
    remote = "://" in pattern
    return [location(filesystem.unstrip_protocol(one) if remote else one) for one in files]


def _read_table(where: Location, digest: hashlib._Hash) -> pa.Table:
    """One file of the list; its bytes go into the digest."""
    import pyarrow as pa

    ending = where.name.removesuffix(".gz").rsplit(".", 1)[-1].lower()
    if ending not in FORMATS:
        wanted = "a name ending in " + ", ".join(f".{name}" for name in FORMATS)
        raise UserError(where, "not the name of a list of URLs", wanted=wanted)
    try:
        with local_copy(where) as path:
            with path.open("rb") as file:
                while data := file.read(1 << 20):
                    digest.update(data)
            return _parse(path, ending, compressed=where.name.endswith(".gz"))
    except FileNotFoundError:
        raise UserError(where, "no such file", wanted="a list of URLs") from None
    except (OSError, ValueError, pa.ArrowException) as error:  # not UTF-8 is a ValueError
        raise UserError(where, f"cannot be read as {ending} ({error})") from None


def _parse(path: Path, ending: str, *, compressed: bool) -> pa.Table:
    import gzip
    import json

    import pyarrow as pa
    import pyarrow.csv as pa_csv
    import pyarrow.json as pa_json
    import pyarrow.parquet as pq

    if ending == "parquet":
        return pq.read_table(path)
    with gzip.open(path) if compressed else path.open("rb") as file:
        if ending == "jsonl":
            return pa_json.read_json(file)
        if ending == "json":
            rows = json.load(file)
            if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
                raise ValueError("not a list of objects")
            return pa.Table.from_pylist(rows)
        if ending == "txt":  # a line is an address, commas and all
            return pa.table({"url": file.read().decode().split()})
        options = pa_csv.ParseOptions(
            delimiter="\t" if ending == "tsv" else ",", newlines_in_values=True
        )
        return pa_csv.read_csv(file, parse_options=options)


def _rename(table: pa.Table, where: str, url_col: str, caption_col: str) -> tuple[pa.Table, bool]:
    """Give the two columns their names, and others a name that is free."""
    url = _choose(table, where, "--url-col", url_col, URL_NAMES)
    caption = _choose(table, where, "--caption-col", caption_col, CAPTION_NAMES)
    if not url:
        raise UserError(
            where,
            f"no column for the URLs among {', '.join(table.column_names)}",
            wanted=" or ".join(URL_NAMES),
            remedy="name it with --url-col",
        )
    chosen = {caption: "caption", url: "url"}
    names: list[str] = []
    for name in table.column_names:
        names.append(chosen.pop(name, "") or _free_name(name, names))
    return table.rename_columns(names), bool(caption)


def _free_name(name: str, taken: list[str]) -> str:
    while name in _RESERVED or name in taken:
        name = f"list_{name}"
    return name


def _choose(table: pa.Table, where: str, option: str, asked: str, usual: tuple[str, ...]) -> str:
    if asked and asked not in table.column_names:
        columns = ", ".join(table.column_names)
        raise UserError(where, f"no column {asked}", wanted=f"{option} out of {columns}")
    return asked or next((name for name in usual if name in table.column_names), "")


def _as_plain(table: pa.Table) -> pa.Table:
    """The same with values that JSON has: numbers without NaN, texts, booleans, lists of those."""
    for index, field in enumerate(table.schema):
        column = table.column(index)
        plain = _as_text(column) if field.name in ("url", "caption") else _as_json(column)
        table = table.set_column(index, field.name, plain)
    return table


def _as_json(column: pa.ChunkedArray) -> pa.ChunkedArray:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_floating(kind):
        wide = column.cast(pa.float64())
        return pc.if_else(pc.is_finite(wide), wide, None)
    item = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    if pa.types.is_integer(item) or pa.types.is_boolean(item) or pa.types.is_string(item):
        return column
    return _as_text(column)


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    import pyarrow as pa

    if pa.types.is_string(column.type):
        return column
    texts = (None if value is None else _text_of(value) for value in column.to_pylist())
    return pa.chunked_array([pa.array(texts, pa.string())])


def _text_of(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _with_address(table: pa.Table) -> pa.Table:
    """img2dataset opens whatever the standard library does: `file:///etc/passwd` as well."""
    import pyarrow.compute as pc

    url = pc.utf8_trim_whitespace(table["url"])
    table = table.set_column(table.column_names.index("url"), "url", url)
    return table.filter(pc.match_substring_regex(url, "(?i)^https?://."))


def _each_url_once(table: pa.Table) -> pa.Table:
    import numpy as np
    import pyarrow as pa

    rows = pa.array(np.arange(table.num_rows))
    urls = pa.table({"url": table["url"], "row": rows}).group_by("url")
    first = np.zeros(table.num_rows, bool)
    first[urls.aggregate([("row", "min")])["row_min"].to_numpy()] = True
    return table.filter(pa.array(first))


def write_table(where: Location, table: pa.Table) -> None:
    """Write a table as Parquet, whole or not at all."""
    import pyarrow.parquet as pq

    write_whole(where, partial(pq.write_table, table))
