"""Where the files of a latent dataset stand; docs/format.md has every file to the byte."""

from __future__ import annotations

from shards.storage import Location

MANIFEST = "dataset.json"
LEDGER = "ledger"


def ledger_path(dataset: Location, shard: str) -> Location:
    """The ledger of one source shard."""
    return dataset / LEDGER / f"{shard}.parquet"


def column_path(dataset: Location, column_id: str, shard: str) -> Location:
    """The data file of one source shard in one column."""
    return dataset / column_id / f"{shard}.safetensors"
