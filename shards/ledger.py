"""The ledger: one row per *source* sample, what became of it and why.

Own columns: `key, caption, url, width, height, sha256, status`. The source's own metadata follow
as further columns (`source_<name>` where a name is taken). `status` is `ok` or the reason why the
sample is in no column; being too small for one resolution is no such reason (see `Receipt.absent`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from shards.arrays import repair_remedy
from shards.column import Json
from shards.errors import CorruptFileError
from shards.storage import Location, local_copy

OK = "ok"


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """One source sample.

    Args:
        key: the sample's id in its shard; data, never a path.
        status: `ok` or a reason.
        width: of the image as decoded, in pixels; None when it could not be decoded.
        sha256: of the image's bytes as they stand in the source.
        metadata: the source's own fields.
    """

    key: str
    status: str
    caption: str | None = None
    url: str | None = None
    width: int | None = None
    height: int | None = None
    sha256: str | None = None
    metadata: Json = field(default_factory=dict)


_OWN = [f.name for f in fields(LedgerRow) if f.name != "metadata"]


def count_reasons(rows: Sequence[LedgerRow]) -> dict[str, int]:
    """Dropped samples by reason, in the order of their names."""
    return dict(sorted(Counter(row.status for row in rows if row.status != OK).items()))


def save_ledger(path: Path, rows: Sequence[LedgerRow]) -> None:
    """Write the rows as one local parquet file; `shards.receipt.commit` makes it count."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"width": pa.int32(), "height": pa.int32()}
    table = {
        name: pa.array([getattr(row, name) for row in rows], types.get(name, pa.string()))
        for name in _OWN
    }
    for name in sorted({name for row in rows for name in row.metadata}):
        free = name
        while free in table:
            free = f"source_{free}"
        table[free] = _metadata_array([row.metadata.get(name) for row in rows])
    pq.write_table(pa.table(table), path)


def _metadata_array(values: list[Any]) -> Any:
    """A typed column where all values agree on a plain type, else their JSON texts."""
    import pyarrow as pa

    plain = {type(value) for value in values if value is not None}
    if plain <= {int, float}:
        wanted = pa.float64() if float in plain else pa.int64()
        fits = all(value is None or abs(value) < 2**53 for value in values)
        if plain and fits:
            return pa.array(values, wanted)
    elif plain in ({str}, {bool}):
        return pa.array(values)
    texts = [None if v is None else v if isinstance(v, str) else json.dumps(v) for v in values]
    return pa.array(texts, pa.string())


def read_ledger(
    where: Location, columns: Sequence[str] = ("key", "status", "caption")
) -> list[Json]:
    """Read some columns of a ledger file, one dict per row.

    Raises:
        CorruptFileError: missing or not parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with local_copy(where) as path:
            rows: list[Json] = pq.read_table(path, columns=list(columns)).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise CorruptFileError(
            where, f"cannot be read ({str(error).splitlines()[0]})", remedy=repair_remedy(where)
        ) from None
    return rows
