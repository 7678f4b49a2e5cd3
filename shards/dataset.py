"""A latent dataset: a folder of columns, a ledger, and dataset.json over their receipts.

    <dataset>/dataset.json                     derived from the receipts; replaced whole, may lag
              ledger/00000.parquet + .json     a row per source sample; its receipt
              moments-256-1a2b3c4d/00000.safetensors + .json
              text-5e6f7a8b/00000.safetensors + .json, null.safetensors + .json

`moments` [N, 2C, h, w] float16 and `row` [N] int32 into the ledger; `input_ids` [U, T] uint16,
`states` [U, T, D] float16 and `caption` [rows of the ledger] int32 into U, -1 where dropped.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from shards.arrays import Arrays, map_arrays
from shards.column import (
    FORMAT_VERSION,
    ColumnSpec,
    ImageColumn,
    Json,
    TextColumn,
    column_from_json,
)
from shards.errors import CorruptFileError, DatasetError
from shards.receipt import Receipt, read_receipt, receipt_path
from shards.storage import canonical_json, write_text_whole

MANIFEST = "dataset.json"
LEDGER = "ledger"
NULL = "null"

# Scaled latents have deviation near 1. Wrongly normalised pixels, or latents that were scaled
# twice, fall far outside; unusual pictures (icons, line art) stay inside.
LATENT_STD_RANGE = (0.5, 2.0)

Spec = TypeVar("Spec", bound=ColumnSpec)


def ledger_path(dataset: Path, shard: str) -> Path:
    """The ledger of one source shard."""
    return dataset / LEDGER / f"{shard}.parquet"


def column_path(dataset: Path, column_id: str, shard: str) -> Path:
    """The data file of one source shard in one column."""
    return dataset / column_id / f"{shard}.safetensors"


def read_receipt_in_place(path: Path) -> Receipt:
    """`read_receipt`, of a receipt that lies where it belongs: in its column, under its name.

    Raises:
        DatasetError: it does not; or see `read_receipt`.
    """
    receipt = read_receipt(path)
    folder = LEDGER
    if receipt.column is not None:
        folder = column_from_json(receipt.column, path).column_id
    if (folder, receipt.shard) != (path.parent.name, path.stem):
        raise CorruptFileError(
            path,
            f"is the receipt of {folder}/{receipt.shard}",
            remedy="put it back with its data file, or delete both",
        )
    return receipt


def iter_receipts(folder: Path) -> Iterable[Receipt]:
    """The receipts of a column or of the ledger, in the order of shard names, without `null`."""
    for path in sorted(folder.glob("*.json")):
        if path.stem != NULL:
            yield read_receipt_in_place(path)


def build_manifest(dataset: Path) -> Json:
    """Derive dataset.json from the receipts alone; anyone can, at any time."""
    ledger = {r.shard: _shard_entry(r) for r in iter_receipts(dataset / LEDGER)}
    columns = {}
    for folder in sorted(p for p in dataset.iterdir() if p.is_dir() and p.name != LEDGER):
        if receipts := list(iter_receipts(folder)):
            columns[folder.name] = _column_entry(receipts)
    return {"format_version": FORMAT_VERSION, "ledger": ledger, "columns": columns}


def _shard_entry(receipt: Receipt) -> Json:
    return {"rows": receipt.rows, "rows_in": receipt.rows_in, "bytes": receipt.data_bytes}


def _column_entry(receipts: list[Receipt]) -> Json:
    absent: Counter[str] = Counter()
    for receipt in receipts:
        absent.update(receipt.absent)
    return {
        "spec": receipts[0].column,
        "model": receipts[0].model,
        "shards": {r.shard: _shard_entry(r) for r in receipts},
        "absent": dict(sorted(absent.items())),
        "stats": _pooled_stats(receipts),
    }


def _pooled_stats(receipts: list[Receipt]) -> Json:
    """Mean and deviation over all shards from those of each."""
    measured = [(r.rows, r.stats) for r in receipts if r.rows and "latent_std" in r.stats]
    if not measured:
        return {}
    total = sum(rows for rows, _ in measured)
    mean = sum(rows * stats["latent_mean"] for rows, stats in measured) / total
    square = sum(
        rows * (stats["latent_std"] ** 2 + stats["latent_mean"] ** 2) for rows, stats in measured
    )
    return {
        "latent_mean": round(mean, 6),
        "latent_std": round(math.sqrt(max(square / total - mean**2, 0.0)), 6),
    }


def write_manifest(dataset: Path) -> Json:
    """Bring dataset.json up to its receipts; leaves the file alone when it already is."""
    manifest = build_manifest(dataset)
    text, path = canonical_json(manifest), dataset / MANIFEST
    if not path.exists() or path.read_bytes() != text.encode():
        write_text_whole(path, text)
    return manifest


@dataclass(frozen=True)
class Column(Generic[Spec]):
    """One column of an open dataset: its spec and its index of shards."""

    dataset: Path
    column_id: str
    spec: Spec
    model: str
    shards: dict[str, Json]
    absent: dict[str, int]
    stats: Json

    @property
    def num_rows(self) -> int:
        """Rows over all shards."""
        return sum(entry["rows"] for entry in self.shards.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the data files."""
        return sum(entry["bytes"] for entry in self.shards.values())

    def map_shard(self, shard: str) -> Arrays:
        """Memory-map one shard and check that it is as long as the index says.

        Raises:
            CorruptFileError: the file is missing or of another length.
        """
        path = column_path(self.dataset, self.column_id, shard)
        wanted = self.shards[shard]["bytes"]
        if path.exists() and path.stat().st_size != wanted:
            raise CorruptFileError(
                path,
                f"{path.stat().st_size} bytes",
                wanted=f"{wanted}, as its receipt says",
                remedy="delete it and its receipt and run the same precompute again",
            )
        return map_arrays(path)


class Dataset:
    """An open latent dataset.

    Args:
        path: its folder.

    Raises:
        DatasetError: no dataset there, or of another format version.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        manifest = self._read_manifest()
        try:
            self.ledger: dict[str, Json] = manifest["ledger"]
            self.columns: dict[str, Column[ColumnSpec]] = {
                column_id: Column(
                    self.path,
                    column_id,
                    column_from_json(entry["spec"], self.path / MANIFEST),
                    entry["model"],
                    entry["shards"],
                    entry["absent"],
                    entry["stats"],
                )
                for column_id, entry in manifest["columns"].items()
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise self._not_a_manifest(error) from None

    def _not_a_manifest(self, error: Exception) -> CorruptFileError:
        return CorruptFileError(
            self.path / MANIFEST,
            f"not a manifest ({error!r})",
            remedy=f"python -m shards index {self.path} rebuilds it from the receipts",
        )

    def _read_manifest(self) -> Json:
        path = self.path / MANIFEST
        try:
            manifest: Json = json.loads(path.read_text(encoding="utf-8"))
            version = manifest["format_version"]
        except (FileNotFoundError, NotADirectoryError):
            raise DatasetError(
                self.path,
                "no latent dataset (no dataset.json)",
                remedy=f'make precompute SHARDS="<images>/{{00000..00099}}.tar" OUT={self.path}',
            ) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._not_a_manifest(error) from None
        if version != FORMAT_VERSION:
            raise DatasetError(
                path,
                f"format version {version}",
                wanted=f"version {FORMAT_VERSION}",
                remedy="read it with the release that wrote it, or precompute it again",
            )
        return manifest

    def image_column(self, resolution: int, column_id: str = "") -> Column[ImageColumn]:
        """The image column of one resolution; by id where there are several."""
        found = [c for c in self._of_kind(ImageColumn) if c.spec.resolution == resolution]
        return self._only(found, f"image column at {resolution} px", column_id, "--image-column")

    def text_column(self, column_id: str = "") -> Column[TextColumn]:
        """The text column; by id where there are several."""
        return self._only(self._of_kind(TextColumn), "text column", column_id, "--text-column")

    def resolutions(self) -> list[int]:
        """Resolutions that there are image columns for, ascending."""
        return sorted({c.spec.resolution for c in self._of_kind(ImageColumn)})

    def _of_kind(self, kind: type[Spec]) -> list[Column[Spec]]:
        return [c for c in self.columns.values() if isinstance(c.spec, kind)]  # type: ignore[misc]

    def _only(
        self, found: list[Column[Spec]], what: str, column_id: str, option: str
    ) -> Column[Spec]:
        if column_id:
            found = [column for column in found if column.column_id == column_id]
            what = f"{what} with id {column_id}"
        if len(found) == 1:
            return found[0]
        if found:
            ids = ", ".join(column.column_id for column in found)
            raise DatasetError(self.path, f"several: {ids}", wanted=f"one {what}", remedy=option)
        raise DatasetError(
            self.path,
            f"columns {', '.join(self.columns) or 'none'}",
            wanted=f"an {what}" if what[0] in "aeiou" else f"a {what}",
            remedy="precompute with the RESOLUTIONS and MODEL that the preset needs",
        )

    def null_states(self, text: Column[TextColumn]) -> np.ndarray:
        """States of the empty caption, [T, D]."""
        return map_arrays(column_path(self.path, text.column_id, NULL))["states"]

    def check_trainable(self, image: Column[ImageColumn], text: Column[TextColumn]) -> None:
        """What stage 2 refuses before it starts.

        Raises:
            DatasetError: shards missing from a column, sums that do not hold, no rows, or latents
                whose deviation says that the pixels were normalised wrongly.
        """
        rerun = "run the same precompute again; it finishes what is missing"
        for column in (image, text):
            missing = sorted(self.ledger.keys() - column.shards.keys())
            if missing:
                raise DatasetError(
                    self.path / column.column_id,
                    f"{len(missing)} of {len(self.ledger)} shards missing ({missing[0]}, …)",
                    remedy=rerun,
                )
            if unknown := sorted(column.shards.keys() - self.ledger.keys()):
                raise DatasetError(
                    self.path / column.column_id,
                    f"{len(unknown)} shards that the ledger lacks ({unknown[0]}, …)",
                    remedy=rerun,
                )
            rows_in = sum(self.ledger[shard]["rows_in"] for shard in column.shards)
            accounted = column.num_rows + sum(column.absent.values())
            if rows_in != accounted:
                raise DatasetError(
                    self.path / column.column_id,
                    f"{accounted} rows accounted for",
                    wanted=f"the {rows_in} of the ledger",
                    remedy=f"python -m shards verify {self.path}",
                )
        if not image.num_rows:
            raise DatasetError(self.path / image.column_id, "no rows", remedy="see the ledger")
        low, high = LATENT_STD_RANGE
        std = image.stats.get("latent_std", math.nan)
        if not low <= std <= high:
            raise DatasetError(
                self.path / image.column_id,
                f"scaled latents have standard deviation {std:.3f}",
                wanted=f"near 1 ({low} to {high})",
                remedy="check the VAE's scaling_factor and that its pixels were in [-1, 1]",
            )


def unfinished_files(folder: Path) -> list[Path]:
    """Data files without a receipt: what a killed process leaves; the next run overwrites them."""
    known = {".safetensors", ".parquet"}
    return [
        path
        for path in sorted(folder.iterdir())
        if (path.suffix in known and not receipt_path(path).exists())
        or (path.suffix not in known and path.suffix != ".json")
    ]
