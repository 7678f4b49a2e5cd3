"""What a column holds and how it was made: the spec, its fingerprint and the column's id.

A column is one encoder's output for every sample at one setting. Its id ends with the first eight
hex digits of a fingerprint over everything that the stored bytes depend on, so another setting is
another column and a stale cache cannot be read by mistake.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from shards.errors import DatasetError
from shards.storage import canonical_json

FORMAT_VERSION = 1

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ColumnSpec(ABC):
    """What both kinds of column share.

    Args:
        weights_sha256: over the encoder's weight files.
        encoder_config: the encoder's own configuration, without notes on who saved it.
        compute_dtype: the precision that the encoder ran in.
        storage_dtype: the precision of the stored numbers.
    """

    kind: ClassVar[str]
    weights_sha256: str
    encoder_config: Json
    compute_dtype: str
    storage_dtype: str

    @property
    @abstractmethod
    def name(self) -> str:
        """The human half of the column's id."""

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
    """VAE moments of every sample that is large enough, at one resolution.

    Args:
        resolution: side of the encoded square, in pixels.
        latent_channels: C; the moments have 2C channels.
        latent_size: side of the latents, h = w.
        scaling_factor: brings sampled latents to unit scale; **not** applied to the moments.
        transform: how pixels came about (resize, interpolation, crop, range).
    """

    kind: ClassVar[str] = "image"
    resolution: int
    latent_channels: int
    latent_size: int
    scaling_factor: float
    transform: Json

    @property
    def name(self) -> str:
        """`moments-256`."""
        return f"moments-{self.resolution}"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, h, w] of one sample's latents."""
        return (self.latent_channels, self.latent_size, self.latent_size)


@dataclass(frozen=True, kw_only=True)
class TextColumn(ColumnSpec):
    """Token ids and text encoder states of every caption.

    Args:
        num_tokens: T, the padded length (77 for CLIP).
        dim: D, the width of one state.
        tokenizer_sha256: over the tokenizer's files.
    """

    kind: ClassVar[str] = "text"
    num_tokens: int
    dim: int
    tokenizer_sha256: str

    @property
    def name(self) -> str:
        """`text`."""
        return "text"


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
    except (KeyError, TypeError) as error:
        raise DatasetError(
            where, f"not a column spec ({error})", remedy="precompute the column again"
        ) from None
