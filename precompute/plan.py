"""Which shards lack what: the difference between a job's sources and what is in the dataset."""

from __future__ import annotations

from collections.abc import Iterable

from precompute.config import PrecomputeConfig
from precompute.filters import Filter
from precompute.shard_task import ShardTask
from shards.column import ColumnSpec, Json, TextColumn
from shards.errors import DatasetError
from shards.layout import LEDGER, column_path
from shards.receipt import NULL, Receipt, finished_shards, read_receipt_of, refuse_changed_source
from shards.source_shard import SourceShard
from shards.storage import Location


def plan_tasks(
    dataset: Location,
    sources: list[SourceShard],
    columns: list[ColumnSpec],
    config: PrecomputeConfig,
) -> list[ShardTask]:
    """The shards that lack something, and what.

    Raises:
        DatasetError: a source, the filter or the caption field is not the one that the dataset was
            made from.
    """
    in_ledger = finished_shards(dataset / LEDGER)
    _refuse_another_setting(dataset, in_ledger.values(), config)
    in_column = {c.column_id: finished_shards(dataset / c.column_id) for c in columns}
    tasks = []
    for source in sources:
        found = [finished.get(source.name) for finished in (in_ledger, *in_column.values())]
        receipts = [receipt for receipt in found if receipt]
        for receipt in receipts:
            facts: Json = {"url": source.url}
            if source.num_bytes is not None:
                facts["bytes"] = source.num_bytes
            refuse_changed_source(receipt, dataset, facts)
        missing = [c for c in columns if source.name not in in_column[c.column_id]]
        has_ledger = source.name in in_ledger
        if missing or not has_ledger:
            known = receipts[0] if receipts else None
            tasks.append(
                ShardTask(source=source, columns=missing, receipt=known, has_ledger=has_ledger)
            )
    return tasks


def _refuse_another_setting(
    dataset: Location, ledgers: Iterable[Receipt], config: PrecomputeConfig
) -> None:
    """All columns and shards of a dataset hold the samples, and captions, of one choice."""
    wanted = {"filter": Filter(config.filter).expression, "caption_field": config.caption_field}
    for receipt in ledgers:
        for name, value in wanted.items():
            found = receipt.stats.get(name, "")
            option = f"--{name.replace('_', '-')}"
            if found != value:
                raise DatasetError(
                    dataset,
                    f"was made with {option} {found!r}",
                    wanted=f"{value!r}, as this command says",
                    remedy=f"the same {option}, or another --out",
                )


def null_is_there(dataset: Location, columns: list[ColumnSpec]) -> bool:
    """Whether all text columns have their empty caption."""
    texts = [column for column in columns if isinstance(column, TextColumn)]
    paths = [column_path(dataset, column.column_id, NULL) for column in texts]
    return all(read_receipt_of(path) for path in paths)
