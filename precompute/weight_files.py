"""The files that hold a model's weights, as diffusers and transformers name them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.canonical import sha256_of

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")


@dataclass(frozen=True)
class WeightFiles:
    """All files of one set of weights.

    Args:
        paths: one file, or all its pieces, sorted.
        variant: what `from_pretrained` calls it: None, or `fp16`.
    """

    paths: tuple[Path, ...]
    variant: str | None

    def sha256(self) -> str:
        """Hash of the file, or over those of all its pieces."""
        return sha256_of(self.paths[0]) if len(self.paths) == 1 else hash_of_hashes(self.paths)


@dataclass(frozen=True)
class WeightFormat:
    """One way of saving weights."""

    suffix: str
    variant: str | None

    @property
    def patterns(self) -> list[str]:
        """What its files are called, whole ones before pieces."""
        infix = f".{self.variant}" if self.variant else ""
        stems = [f"{stem}{infix}" for stem in _STEMS]
        return [f"{stem}{pieces}.{self.suffix}" for pieces in ("", "-*-of-*") for stem in stems]

    def find(self, folder: Path) -> WeightFiles | None:
        """Its files in a folder, or None."""
        found: Iterator[tuple[Path, ...]] = (tuple(sorted(folder.glob(p))) for p in self.patterns)
        return next((WeightFiles(paths, self.variant) for paths in found if paths), None)


# Best first. Half-precision files serve where there are no others.
WEIGHT_FORMATS = tuple(
    WeightFormat(suffix, variant) for variant in (None, "fp16") for suffix in ("safetensors", "bin")
)


def hash_of_hashes(paths: tuple[Path, ...]) -> str:
    """Hash over the names and the hashes of files."""
    text = "".join(f"{path.name} {sha256_of(path)}\n" for path in paths)
    return hashlib.sha256(text.encode()).hexdigest()
