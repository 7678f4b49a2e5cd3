"""A latent dataset: a folder of columns, a ledger, and dataset.json over their receipts.

    <dataset>/dataset.json                     derived from the receipts; replaced whole, may lag
              ledger/00000.parquet + .json     a row per source sample; its receipt
              moments-256-1a2b3c4d/00000.safetensors + .json
              text-5e6f7a8b/00000.safetensors + .json, null.safetensors + .json

docs/format.md has every file to the byte. The dataset may be local or behind any fsspec URL.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from shards.arrays import Arrays, map_arrays, repair_remedy
from shards.cache import ShardCache
from shards.column import (
    FORMAT_VERSION,
    ColumnSpec,
    ImageColumn,
    Json,
    TextColumn,
    column_from_json,
)
from shards.errors import CorruptFileError, DatasetError, UserError
from shards.flip import mirror_spec, no_mirror
from shards.layout import LEDGER, MANIFEST, column_path
from shards.receipt import NULL, read_committed
from shards.storage import Location, list_folders, location, read_bytes, size_of

# Scaled latents have deviation near 1. Wrongly normalised pixels, or latents that were scaled
# twice, fall far outside; unusual pictures (icons, line art) stay inside.
LATENT_STD_RANGE = (0.5, 2.0)

_MAX_EVICTIONS = 10  # of one file from a cache that is far too small for its users

Spec = TypeVar("Spec", bound=ColumnSpec)


@dataclass(frozen=True)
class Column(Generic[Spec]):
    """One column of an open dataset: its spec and its index of shards."""

    dataset: Location
    column_id: str
    spec: Spec
    model: str
    shards: dict[str, Json]
    absent: dict[str, int]
    stats: Json
    cache: ShardCache

    @property
    def num_rows(self) -> int:
        """Rows over all shards."""
        return sum(entry["rows"] for entry in self.shards.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the data files."""
        return sum(entry["bytes"] for entry in self.shards.values())

    def path_of(self, shard: str) -> Location:
        """The data file of a shard."""
        return column_path(self.dataset, self.column_id, shard)

    def fetch_shard(self, shard: str) -> Path:
        """The data file of a shard on a local disk: itself, or its copy in the cache.

        Raises:
            CorruptFileError: it is missing or of another length; where it is remote, also of
                another hash.
            StorageError: it cannot be fetched.
        """
        path, entry = self.path_of(shard), self.shards[shard]
        if not isinstance(path, Path):
            return self.cache.fetch(path, entry["bytes"], entry["sha256"])
        if path.exists() and path.stat().st_size != entry["bytes"]:
            raise CorruptFileError(
                path,
                f"{path.stat().st_size} bytes",
                wanted=f"{entry['bytes']}, as its receipt says",
                remedy=repair_remedy(path),
            )
        return path

    def map_shard(self, shard: str) -> Arrays:
        """Memory-map one shard; see `fetch_shard`."""
        where = self.path_of(shard)
        for _ in range(_MAX_EVICTIONS):
            local = self.fetch_shard(shard)
            try:
                return map_arrays(local, where)
            except CorruptFileError:
                if local == where or local.exists():
                    raise
                # Whoever shares the cache has made room between the two calls.
        raise UserError(
            self.cache.folder,
            f"{where} was evicted {_MAX_EVICTIONS} times before it could be read",
            remedy="a larger --cache-gib",
        )


class Dataset:
    """An open latent dataset.

    Args:
        path: its folder, or a URL.
        cache: for the shards of a remote dataset; default: one in the user's cache folder.

    Raises:
        DatasetError: no dataset there, or of another format version.
        StorageError: it cannot be reached.
    """

    def __init__(self, path: Location | str, cache: ShardCache | None = None) -> None:
        self.path = location(path)
        cache = cache or ShardCache()
        manifest = self._read_manifest()
        try:
            self.caption_field: str = manifest["caption_field"]
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
                    cache,
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
            manifest: Json = json.loads(read_bytes(path))
            version = manifest["format_version"]
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
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
        """The image column of one resolution: plain squares, unless another is named by its id."""
        found = [c for c in self._of_kind(ImageColumn) if c.spec.resolution == resolution]
        if not column_id:
            found = [c for c in found if c.spec.is_plain]
        return self._only(found, f"image column at {resolution} px", column_id, "--image-column")

    def flipped_column(self, image: Column[ImageColumn]) -> Column[ImageColumn]:
        """The column of an image column's images, mirrored: equal settings but for the flip.

        Raises:
            DatasetError: there is none.
        """
        column = self.columns.get(mirror_spec(image.spec).column_id)
        if column is None or image.spec.is_flipped:
            found = f"columns {', '.join(self.columns)}"
            raise no_mirror(self.path, found, image)
        return column  # type: ignore[return-value]  # the id is that of an image column

    def text_column(self, column_id: str = "", holding: str = "auto") -> Column[TextColumn]:
        """The text column; by id where there are several.

        Args:
            column_id: empty where there is one.
            holding: `states`, `ids` (token ids alone), or `auto`: states where there are any.
        """
        found = self._of_kind(TextColumn)
        if holding != "auto":
            found = [c for c in found if c.spec.has_states == (holding == "states")]
        elif not column_id:
            found = [c for c in found if c.spec.has_states] or found
        what = "text column" if holding == "auto" else f"text column of {holding}"
        return self._only(found, what, column_id, "--text-column")

    def resolutions(self) -> list[int]:
        """Resolutions that there are image columns of plain squares for, ascending."""
        columns = self._of_kind(ImageColumn)
        return sorted({c.spec.resolution for c in columns if c.spec.is_plain})

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
            remedy="precompute with the RESOLUTIONS and MODEL that the preset needs (and --text, "
            "--latents)",
        )

    def read_null(self, text: Column[TextColumn]) -> Arrays:
        """What a text column stores of the empty caption.

        Returns:
            `input_ids` [T]; with states also `states` [T, D] float16, and `pooled` [P] float16
            where the encoder has one; with int8 states also `channel_scale` [D] float32.

        Raises:
            CorruptFileError: it is missing, or not that.
        """
        spec, path = text.spec, text.path_of(NULL)
        null = read_committed(path)
        wanted: dict[str, tuple[int, ...]] = {"input_ids": (spec.num_tokens,)}
        if spec.has_states:
            wanted["states"] = (spec.num_tokens, spec.dim)
            if spec.pooled_dim:
                wanted["pooled"] = (spec.pooled_dim,)
        if spec.storage_dtype == "int8":
            wanted["channel_scale"] = (spec.dim,)
        found = {name: array.shape for name, array in null.items()}
        if found != wanted:
            raise CorruptFileError(path, f"{found}", wanted=f"{wanted}", remedy=repair_remedy(path))
        return null

    def check_trainable(self, image: Column[ImageColumn], text: Column[TextColumn]) -> None:
        """What stage 2 refuses before it starts.

        Raises:
            DatasetError: shards missing from a column, sums that do not hold, no rows, or latents
                whose deviation says that the pixels were normalised wrongly.
        """
        if image.spec.buckets:
            raise DatasetError(
                self.path / image.column_id,
                f"holds {len(image.spec.buckets)} shapes of latents",
                wanted="one: the batches of this release have one shape",
                remedy="--image-column <one without -buckets>",
            )
        if text.spec.pooled_dim:
            raise DatasetError(
                self.path / text.column_id,
                "holds pooled states beside the others, as SDXL takes them",
                wanted="the states of one text encoder",
                remedy="--text-column <one without pooled states>",
            )
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


def expect_dataset(dataset: Location) -> None:
    """Refuse a place that is no latent dataset, before anything is made or deleted there."""
    if size_of(dataset / MANIFEST) is None and LEDGER not in list_folders(dataset):
        Dataset(dataset)  # says what is missing and how to get it
