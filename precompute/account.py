"""What became of the source rows, for the end of a job."""

from __future__ import annotations

import sys
from collections import Counter

from precompute.filters import REASON
from shards.column import ColumnSpec, Json
from shards.storage import Location

_REASONS = "dropped from every column"
_MIN_SHARE = 0.0005  # what would be printed as 0.0%


def print_account(
    dataset: Location, manifest: Json, columns: list[ColumnSpec], num_unreadable: int = 0
) -> None:
    """The end table: rows in, why rows were dropped, and what each column holds of the rest.

    Args:
        dataset: its place.
        manifest: of the dataset, as it is now.
        columns: those of the job.
        num_unreadable: shards that could not be read, whose rows are in no number here.
    """
    rows_in = _rows_in(manifest)
    print(f"{dataset}: {rows_in:,} source rows in {len(manifest['ledger']):,} shards")
    if num_unreadable:
        print(f"  unreadable shards: {num_unreadable:,}, not in these numbers")
    entries = {c.column_id: manifest["columns"].get(c.column_id) for c in columns}
    width = max(map(len, [_REASONS, *entries, *manifest["dropped"]])) + 2
    _print_reasons(manifest["dropped"], rows_in, width)
    print(f"  {'column':<{width}}{'rows':>13}{'latent std':>12}{'MiB':>12}  absent beside these")
    for column_id, entry in entries.items():
        if entry:
            _print_column(column_id, entry, manifest, width)


def _print_reasons(dropped: dict[str, int], rows_in: int, width: int) -> None:
    """Most frequent first."""
    if not dropped:
        return
    print(f"  {_REASONS:<{width}}{'rows':>13}{'share':>12}")
    ranked = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    for reason, count in ranked:
        print(f"  {reason:<{width}}{count:>13,}{_percent(count / rows_in):>12}")
    if len(ranked) > 1:
        total = sum(dropped.values())
        print(f"  {'all of these':<{width}}{total:>13,}{_percent(total / rows_in):>12}")


def _print_column(column_id: str, entry: Json, manifest: Json, width: int) -> None:
    shards, stats = entry["shards"].values(), entry["stats"]
    rows, num_bytes = sum(s["rows"] for s in shards), sum(s["bytes"] for s in shards)
    std = f"{stats['latent_std']:.3f}" if "latent_std" in stats else "-"
    absent: Counter[str] = Counter(entry["absent"]) - Counter(manifest["dropped"])
    notes = [f"{count:,} {reason}" for reason, count in absent.most_common()]
    if lacking := len(manifest["ledger"]) - len(shards):
        notes.append(f"{lacking:,} shards to come")
    print(
        f"  {column_id:<{width}}{rows:>13,}{std:>12}{num_bytes / 2**20:>12,.1f}"
        f"  {', '.join(notes) or '-'}"
    )
    if "relative_error" in stats:
        print(f"    int8: relative error {stats['relative_error']:.2%}")


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= _MIN_SHARE else "<0.1%"


def _rows_in(manifest: Json) -> int:
    rows_in: int = sum(entry["rows_in"] for entry in manifest["ledger"].values())
    return rows_in


def dropped_frac(manifest: Json) -> float:
    """Share of the source rows that were wanted, by the filter, and dropped all the same."""
    unwanted = sum(n for reason, n in manifest["dropped"].items() if reason.startswith(REASON))
    wanted = _rows_in(manifest) - unwanted
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
