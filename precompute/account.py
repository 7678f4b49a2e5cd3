"""What became of the source rows, for the end of a job."""

from __future__ import annotations

import sys

from precompute.filters import REASON
from shards.column import ColumnSpec, Json
from shards.storage import Location


def print_account(dataset: Location, manifest: Json, columns: list[ColumnSpec]) -> None:
    """The end table: rows in, rows out, and the reasons for the difference."""
    rows_in = sum(entry["rows_in"] for entry in manifest["ledger"].values())
    print(f"{dataset}: {rows_in:,} source rows in {len(manifest['ledger']):,} shards")
    print(f"  {'column':<24}{'rows':>10}{'absent':>10}{'latent std':>12}{'MiB':>10}")
    written = [column for column in columns if column.column_id in manifest["columns"]]
    for column in written:
        entry = manifest["columns"][column.column_id]
        shards = entry["shards"].values()
        rows, size = sum(s["rows"] for s in shards), sum(s["bytes"] for s in shards)
        stats = entry["stats"]
        std = f"{stats['latent_std']:.3f}" if "latent_std" in stats else "-"
        print(
            f"  {column.column_id:<24}{rows:>10,}{sum(entry['absent'].values()):>10,}"
            f"{std:>12}{size / 2**20:>10.1f}"
        )
        if "relative_error" in stats:
            print(f"    int8: relative error {stats['relative_error']:.2%}")
        for reason, count in entry["absent"].items():
            print(f"    {reason:<22}{count:>20,}")


def dropped_frac(manifest: Json) -> float:
    """Share of the source rows that were wanted, by the filter, and dropped all the same."""
    unwanted = sum(n for reason, n in manifest["dropped"].items() if reason.startswith(REASON))
    wanted = sum(entry["rows_in"] for entry in manifest["ledger"].values()) - unwanted
    rows = sum(entry["rows"] for entry in manifest["ledger"].values())
    return (wanted - rows) / wanted if wanted else 1.0


def fail_if_too_much_was_dropped(dataset: str, manifest: Json, max_drop_frac: float) -> None:
    """Exit with status 1 above `max_drop_frac`; the dataset is complete and stays."""
    frac = dropped_frac(manifest)
    if frac > max_drop_frac:
        print(
            f"precompute: {frac:.1%} of the wanted source rows were dropped; wanted at most "
            f"{max_drop_frac:.1%}. Remedy: see the reasons above and the ledger in "
            f"{dataset}/ledger, or raise --max-drop-frac",
            file=sys.stderr,
        )
        sys.exit(1)
