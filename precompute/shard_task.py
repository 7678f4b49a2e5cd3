"""What is to be done for one image shard; it travels to other processes and machines."""

from __future__ import annotations

from dataclasses import dataclass

from shards.column import ColumnSpec
from shards.receipt import Receipt
from shards.source_shard import SourceShard


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """Work for `encode_shard`.

    Args:
        source: the image shard.
        columns: the columns that lack it; none where it is the ledger that does.
        receipt: of this shard, of the ledger or of any column that has it already; what is read
            must be the source that it speaks of.
        has_ledger: whether the ledger has it.
    """

    source: SourceShard
    columns: list[ColumnSpec]
    receipt: Receipt | None = None
    has_ledger: bool = False
