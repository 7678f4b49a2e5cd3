"""What must hold before an arm's time counts: the same samples, latents, texts and losses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.batch import BatchSource, LatentBatch
from shards.errors import UserError

if TYPE_CHECKING:
    import torch

_REMEDY = "precompute the dataset again from the image shards that are there now"
# Root of the mean squared error over that of the numbers, of a batch and of one of its samples:
# what float16 and int8 take (0.03% and 0.6%), and room for an encoder's rounding.
_ERRORS = {"float16": (5e-3, 5e-2), "int8": (2e-2, 1e-1)}


class WatchedSource:
    """A `BatchSource` that notes what it serves.

    Args:
        source: what it serves from.
        block_length: of every block's first step the batch is kept.

    Attributes:
        samples: numbers of the samples of the steps since they were last forgotten.
        kept: the last batch that was kept.
    """

    def __init__(self, source: BatchSource, block_length: int) -> None:
        self.source, self._block_length = source, block_length
        self.latent_shape, self.scaling_factor = source.latent_shape, source.scaling_factor
        self.identity = source.identity
        self.samples: list[np.ndarray] = []
        self.kept: LatentBatch | None = None

    @property
    def null_states(self) -> np.ndarray:
        """States of the empty caption, [T, D]."""
        return self.source.null_states

    def epoch_at(self, step: int) -> float:
        """Epochs completed when `step` steps are done."""
        return self.source.epoch_at(step)

    def keys_of(self, samples: np.ndarray) -> list[str]:
        """`<shard>/<key>` of samples by their numbers."""
        return self.source.keys_of(samples)

    def iter_batches(self, first_step: int, positions: range) -> Iterator[LatentBatch]:
        """The source's batches."""
        batches: Any = self.source.iter_batches(first_step, positions)
        with closing(batches):
            for batch in batches:
                self.samples.append(batch.samples)
                if batch.step % self._block_length == 0:
                    self.kept = batch
                yield batch

    def take(self) -> tuple[np.ndarray, LatentBatch]:
        """Samples of the block that has just been served, and its first batch; both forgotten."""
        assert self.kept is not None
        samples, batch = np.stack(self.samples), self.kept
        self.samples, self.kept = [], None
        return samples, batch


def check_equal_batches(
    served: dict[str, tuple[np.ndarray, LatentBatch]], num_channels: int, storage: tuple[str, str]
) -> None:
    """All arms must have served the same samples, latents and text states.

    Args:
        served: by arm, of one block, see `WatchedSource.take`; the first one is what the others
            are held to.
        num_channels: C of the latents.
        storage: dtypes of the cache: of the latents, and of the text states.

    Raises:
        UserError: an arm served something else.
    """
    (first, (samples, batch)), *others = served.items()
    expected = _parts(batch, num_channels)
    of_latents, of_text = (_ERRORS[dtype] for dtype in storage)
    limits = {"latents": of_latents, "log-variances": of_latents, "text states": of_text}
    for name, (other_samples, other) in others:
        if not np.array_equal(samples, other_samples):
            raise _unequal(f"{name} trained on other samples than {first}")
        for part, found in _parts(other, num_channels).items():
            _compare(part, expected[part], found, limits[part], (first, name))


def _parts(batch: LatentBatch, num_channels: int) -> dict[str, torch.Tensor]:
    """Text states, means and, where they are stored, log-variances: each [B, ...] float32."""
    import torch

    from train.transfer import to_device

    cpu = torch.device("cpu")
    moments, states = (to_device(x, cpu).float() for x in (batch.moments, batch.states))
    names = ("latents", "log-variances")
    return {"text states": states, **dict(zip(names, moments.split(num_channels, 1), strict=False))}


def _compare(
    part: str,
    wanted: torch.Tensor,
    found: torch.Tensor,
    limits: tuple[float, float],
    names: tuple[str, str],
) -> None:
    scale = float(wanted.square().mean().sqrt())
    by_sample = (found - wanted).square().flatten(1).mean(1)
    of_batch, of_sample = float(by_sample.mean().sqrt()), float(by_sample.max().sqrt())
    errors = {"": of_batch, "of one sample ": of_sample}
    for (what, error), limit in zip(errors.items(), limits, strict=True):
        if not error <= limit * scale:
            raise _unequal(
                f"{part} {what}of {names[1]} differ from those of {names[0]} by "
                f"{error / scale:.3g}",
                wanted=f"at most {limit:g} of their size",
            )


def check_equal_losses(losses: dict[str, float], tolerance: float, block: int) -> None:
    """Equal samples, noise and weights have equal losses.

    Args:
        losses: by arm, of one block; the first one is what the others are held to.
        tolerance: relative.
        block: its number, from 0.

    Raises:
        UserError: they differ.
    """
    (first, expected), *others = losses.items()
    for name, loss in others:
        if not math.isclose(loss, expected, rel_tol=tolerance):
            raise _unequal(
                f"losses differ in block {block + 1}: {first} {expected:.6f}, {name} {loss:.6f}",
                wanted=f"equal within {tolerance:g}: the same samples, noise and weights",
            )


def _unequal(found: str, wanted: str = "the same work in every arm") -> UserError:
    return UserError("bench", found, wanted=wanted, remedy=_REMEDY)
