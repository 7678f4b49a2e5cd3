"""Look at a latent dataset, verify it, or rebuild its index.

python -m shards info   data/latents
python -m shards verify data/latents          # receipts, lengths, sums
python -m shards verify --full data/latents   # also every byte
python -m shards index  data/latents          # rebuild dataset.json from the receipts
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shards.column import ImageColumn
from shards.dataset import LEDGER, Dataset, write_manifest
from shards.errors import DatasetError, reported
from shards.verify import iter_problems


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m shards`."""
    parser = argparse.ArgumentParser(
        prog="python -m shards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("info", "columns, rows, bytes, what was dropped and why"),
        ("verify", "hold the dataset to its receipts; exit status 1 when something is wrong"),
        ("index", "rebuild dataset.json from the receipts"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("dataset", type=Path, help="folder of the latent dataset")
        if name == "verify":
            command.add_argument("--full", action="store_true", help="read and hash every byte")
    args = parser.parse_args(argv)
    with reported(f"shards {args.command}"):
        if args.command == "info":
            print_info(Dataset(args.dataset))
        elif args.command == "verify":
            sys.exit(verify(args.dataset, full=args.full))
        else:
            index(args.dataset)


def print_info(dataset: Dataset) -> None:
    """A table of the columns and the account of the source rows."""
    rows_in = sum(entry["rows_in"] for entry in dataset.ledger.values())
    good = sum(entry["rows"] for entry in dataset.ledger.values())
    print(f"{dataset.path}: {rows_in:,} source rows in {len(dataset.ledger):,} shards, {good:,} ok")
    print(f"{'column':<24}{'rows':>12}{'GiB':>9}{'B/row':>9}{'latent std':>12}  encoder")
    for column in dataset.columns.values():
        per_row = column.num_bytes / max(column.num_rows, 1)
        std = f"{column.stats['latent_std']:.3f}" if column.stats else "-"
        print(
            f"{column.column_id:<24}{column.num_rows:>12,}{column.num_bytes / 2**30:>9.3f}"
            f"{per_row:>9,.0f}{std:>12}  {column.model}"
        )
    for column in dataset.columns.values():
        for reason, count in column.absent.items():
            side = (
                f" at {column.spec.resolution} px" if isinstance(column.spec, ImageColumn) else ""
            )
            print(f"  absent from {column.column_id}: {count:,} {reason}{side}")


def verify(dataset: Path, *, full: bool) -> int:
    """Print what is wrong; 1 when anything is."""
    problems = 0
    for problem in iter_problems(dataset, full=full):
        print(problem)
        problems += 1
    what = "every byte" if full else "receipts, lengths and sums"
    print(f"{dataset}: {problems} problems" if problems else f"{dataset}: clean ({what} checked)")
    return 1 if problems else 0


def index(dataset: Path) -> None:
    """Rebuild dataset.json."""
    if not (dataset / LEDGER).is_dir():
        raise DatasetError(dataset, "no latent dataset (no ledger folder)")
    manifest = write_manifest(dataset)
    print(f"{dataset}: {len(manifest['columns'])} columns, {len(manifest['ledger'])} shards")


if __name__ == "__main__":
    main()
