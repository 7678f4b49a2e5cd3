"""What a column holds and how it was made: the spec, its fingerprint and the column's id.

A column is one encoder's output for every sample at one setting. Its id ends with the first eight
hex digits of a fingerprint over everything that the stored bytes depend on, so another setting is
another column and a stale cache cannot be read by mistake.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from shards.canonical import canonical_json
from shards.errors import DatasetError

FORMAT_VERSION = 1

Json = dict[str, Any]
RowArrays = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class ColumnSpec(ABC):
    """What both kinds of column share.

    Args:
        weights_sha256: over the encoder's weight files.
        encoder_config: the encoder's own configuration, without notes on who saved it.
        compute_dtype: the precision that the encoder ran in.
        storage_dtype: how numbers are stored: `float16`, `int8`, or `none` for token ids alone.
        quantization: how integers came about; empty unless the storage is `int8`.
    """

    kind: ClassVar[str]
    storage_dtypes: ClassVar[tuple[str, ...]]
    index_array: ClassVar[str]  # what connects a shard's rows with the ledger's
    weights_sha256: str
    encoder_config: Json
    compute_dtype: str
    storage_dtype: str
    quantization: Json = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.storage_dtype not in self.storage_dtypes:
            raise ValueError(f"storage {self.storage_dtype}, wanted one of {self.storage_dtypes}")

    @property
    @abstractmethod
    def name(self) -> str:
        """The human half of the column's id."""

    @property
    @abstractmethod
    def row_arrays(self) -> RowArrays:
        """The arrays that hold a row's numbers: dtype and shape of one row, by name."""

    def to_json(self) -> Json:
        """The spec as it stands in receipts and in dataset.json."""
        return {"kind": self.kind, "format_version": FORMAT_VERSION, **asdict(self)}

    @property
    def column_id(self) -> str:
        """`<name>-<first 8 hex digits of the fingerprint>`."""
        fingerprint = hashlib.sha256(canonical_json(self.to_json()).encode()).hexdigest()
        return f"{self.name}-{fingerprint[:8]}"


@dataclass(frozen=True, kw_only=True)
class ImageColumn(ColumnSpec):
    """What the VAE makes of every sample that is large enough, at one resolution.

    Args:
        latents: `moments` (mean and log-variance) or `mean`, which halves the bytes and gives up
            the posterior's noise.
        resolution: side of the encoded square, in pixels.
        latent_channels: C; moments have 2C channels.
        latent_size: side of the latents, h = w.
        scaling_factor: brings sampled latents to unit scale; **not** applied to the moments.
        transform: how pixels came about (resize, interpolation, crop, range).
    """

    kind: ClassVar[str] = "image"
    storage_dtypes: ClassVar[tuple[str, ...]] = ("float16", "int8")
    index_array: ClassVar[str] = "row"
    latents: str = "moments"
    resolution: int
    latent_channels: int
    latent_size: int
    scaling_factor: float
    transform: Json

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latents not in ("moments", "mean"):
            raise ValueError(f"latents {self.latents}, wanted moments or mean")

    @property
    def name(self) -> str:
        """`moments-256`, `mean-512-int8`."""
        suffix = "-int8" if self.storage_dtype == "int8" else ""
        return f"{self.latents}-{self.resolution}{suffix}"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, h, w] of one sample's latents."""
        return (self.latent_channels, self.latent_size, self.latent_size)

    @property
    def row_arrays(self) -> RowArrays:
        """`moments` or `mean` [C', h, w]; int8: also `scale` [C']. C' is 2C for moments."""
        channels = self.latent_channels * (2 if self.latents == "moments" else 1)
        arrays: RowArrays = {
            self.latents: (self.storage_dtype, (channels, self.latent_size, self.latent_size))
        }
        if self.storage_dtype == "int8":
            arrays["scale"] = ("float32", (channels,))
        return arrays


@dataclass(frozen=True, kw_only=True)
class TextColumn(ColumnSpec):
    """Token ids and, unless the storage is `none`, text encoder states of every caption.

    Args:
        num_tokens: T, the padded length (77 for CLIP).
        dim: D, the width of one state.
        tokenizer_sha256: over the tokenizer's files.
    """

    kind: ClassVar[str] = "text"
    storage_dtypes: ClassVar[tuple[str, ...]] = ("float16", "int8", "none")
    index_array: ClassVar[str] = "caption"
    num_tokens: int
    dim: int
    tokenizer_sha256: str

    @property
    def name(self) -> str:
        """`text`, `text-int8`, `text-ids`."""
        return {"float16": "text", "int8": "text-int8", "none": "text-ids"}[self.storage_dtype]

    @property
    def has_states(self) -> bool:
        """Whether the encoder's states are stored, not token ids alone."""
        return self.storage_dtype != "none"

    @property
    def row_arrays(self) -> RowArrays:
        """`states` [T, D]; int8: also `scale` [T]. Token ids alone: `input_ids` [T]."""
        if not self.has_states:
            return {"input_ids": ("uint16", (self.num_tokens,))}
        arrays: RowArrays = {"states": (self.storage_dtype, (self.num_tokens, self.dim))}
        if self.storage_dtype == "int8":
            arrays["scale"] = ("float32", (self.num_tokens,))
        return arrays


def column_from_json(document: Json, where: object) -> ColumnSpec:
    """Build the spec that `to_json` wrote.

    Args:
        where: the file it was read from, for the error.

    Raises:
        DatasetError: of another format version, or not a column.
    """
    fields = dict(document) if isinstance(document, dict) else {}
    version = fields.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise DatasetError(
            where,
            f"format version {version}",
            wanted=f"version {FORMAT_VERSION}",
            remedy="precompute again with this release, or read it with the release that wrote it",
        )
    kinds: dict[str, type[ColumnSpec]] = {"image": ImageColumn, "text": TextColumn}
    try:
        return kinds[fields.pop("kind")](**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            where, f"not a column spec ({error})", remedy="precompute the column again"
        ) from None
