"""What a column holds and how it was made: the spec, its fingerprint and the column's id.

A column is one encoder's output for every sample at one setting. Its id ends with the first eight
hex digits of a fingerprint over everything that the stored bytes depend on, so another setting is
another column and a stale cache cannot be read by mistake.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from shards.canonical import canonical_json
from shards.errors import DatasetError

FORMAT_VERSION = 1

Json = dict[str, Any]
RowArrays = dict[str, tuple[str, tuple[int, ...]]]
HiddenState = Literal["last", "penultimate"]


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

    @property
    def row_groups(self) -> list[RowArrays]:
        """The same, for each shape of row: the rows of the first group come first, and so on."""
        return [self.row_arrays]

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
        resolution: side of the encoded square, in pixels; of buckets, of the square of their area.
        latent_channels: C; moments have 2C channels.
        latent_size: side of the square's latents, h = w.
        scaling_factor: brings sampled latents to unit scale; **not** applied to the moments.
        transform: how pixels came about (resize, interpolation, crop, range, flip).
        buckets: [height, width] in pixels of the crops of an aspect-bucketed column.
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
    buckets: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latents not in ("moments", "mean"):
            raise ValueError(f"latents {self.latents}, wanted moments or mean")

    @property
    def name(self) -> str:
        """`moments-256`, `mean-512-int8`, `moments-512-buckets`, `moments-256-flip`."""
        kinds = {"buckets": self.buckets, "flip": self.is_flipped}
        kinds["int8"] = self.storage_dtype == "int8"
        suffixes = [f"-{kind}" for kind, is_it in kinds.items() if is_it]
        return "".join([self.latents, f"-{self.resolution}", *suffixes])

    @property
    def is_flipped(self) -> bool:
        """Whether the images were mirrored: rows to take the place of the unflipped column's."""
        return self.transform.get("flip") == "horizontal"

    @property
    def is_plain(self) -> bool:
        """Whether it holds one square of each image, as it is."""
        return not self.buckets and not self.is_flipped

    @property
    def crop_sizes(self) -> list[list[int]]:
        """[height, width] in pixels of its crops: the buckets, or the one square."""
        return self.buckets or [[self.resolution, self.resolution]]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, h, w] of one sample's latents."""
        return (self.latent_channels, self.latent_size, self.latent_size)

    @property
    def row_arrays(self) -> RowArrays:
        """`moments` or `mean` [C', h, w]; int8: also `scale` [C']. C' is 2C for moments.

        Of buckets, each array for each of them: `moments.64x48`, after h and w.
        """
        return {name: array for group in self.row_groups for name, array in group.items()}

    @property
    def row_groups(self) -> list[RowArrays]:
        """One group of arrays for the square, or for each bucket."""
        return [self._arrays_of(height, width) for height, width in self.crop_sizes]

    def array_names(self, bucket: int) -> tuple[str, str]:
        """The arrays of latents and of their int8 scales, of one bucket."""
        suffix = ""
        if self.buckets:
            height, width = (side // self.downsample_factor for side in self.buckets[bucket])
            suffix = f".{height}x{width}"
        return f"{self.latents}{suffix}", f"scale{suffix}"

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent cell, along a side."""
        return self.resolution // self.latent_size

    def _arrays_of(self, height: int, width: int) -> RowArrays:
        channels = self.latent_channels * (2 if self.latents == "moments" else 1)
        factor = self.downsample_factor
        bucket = self.crop_sizes.index([height, width])
        latents, scale = self.array_names(bucket)
        arrays: RowArrays = {
            latents: (self.storage_dtype, (channels, height // factor, width // factor))
        }
        if self.storage_dtype == "int8":
            arrays[scale] = ("float32", (channels,))
        return arrays


@dataclass(frozen=True, kw_only=True)
class TextColumn(ColumnSpec):
    """What a text encoder makes of every caption: token ids and, unless stored as `none`, states.

    Args:
        part: folder of the encoder in the model: `text_encoder`, `text_encoder_2`.
        hidden_state: `last`, after the final layer norm, or `penultimate`, the output of the last
            layer but one, without it.
        num_tokens: T, the padded length (77 for CLIP).
        dim: D, the width of one state.
        pooled_dim: P, the width of a caption's pooled, projected state; 0: there is none.
        tokenizer_sha256: over the tokenizer's files.
    """

    kind: ClassVar[str] = "text"
    storage_dtypes: ClassVar[tuple[str, ...]] = ("float16", "int8", "none")
    index_array: ClassVar[str] = "caption"
    part: str = "text_encoder"
    hidden_state: HiddenState = "last"
    num_tokens: int
    dim: int
    pooled_dim: int = 0
    tokenizer_sha256: str

    @property
    def name(self) -> str:
        """`text`, `text-int8`, `text-ids`; of `text_encoder_2`: `text2` and so on."""
        number = self.part.removeprefix("text_encoder").removeprefix("_")
        suffix = {"float16": "", "int8": "-int8", "none": "-ids"}[self.storage_dtype]
        return f"text{number}{suffix}"

    @property
    def has_states(self) -> bool:
        """Whether the encoder's states are stored, not token ids alone."""
        return self.storage_dtype != "none"

    @property
    def row_arrays(self) -> RowArrays:
        """`states` [T, D]; int8: also `scale` [T]; where there is one, `pooled` [P].

        Token ids alone: `input_ids` [T].
        """
        if not self.has_states:
            return {"input_ids": ("uint16", (self.num_tokens,))}
        arrays: RowArrays = {"states": (self.storage_dtype, (self.num_tokens, self.dim))}
        if self.storage_dtype == "int8":
            arrays["scale"] = ("float32", (self.num_tokens,))
        if self.pooled_dim:
            arrays["pooled"] = ("float16", (self.pooled_dim,))
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
