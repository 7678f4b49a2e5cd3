"""A phase of training: how much of it there is, and how fast it goes on so many GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

Arm = Literal["offline", "ids", "online"]
ARMS: tuple[Arm, ...] = ("online", "offline", "ids")


@dataclass(frozen=True)
class Curve:
    """Images per second of one GPU, by how many there are.

    Between known counts the speed goes in a straight line over the doublings; below them it is
    that of the fewest.

    Args:
        points: number of GPUs → images per second of one of them.
        efficiency: what is left at each doubling beyond the most that is known; None: it is not
            known, and taken to be all.
        scaled: numbers among the points whose speed follows from that of another one.
    """

    points: Mapping[int, float]
    efficiency: float | None = None
    scaled: frozenset[int] = frozenset()

    def per_gpu(self, num_gpus: int) -> float:
        """Images per second of each of so many."""
        known = sorted(self.points)
        doublings = np.log2(known)
        here = float(np.log2(num_gpus))
        speed = float(np.interp(here, doublings, [self.points[count] for count in known]))
        left = 1.0 if self.efficiency is None else self.efficiency
        return speed * left ** max(0.0, here - float(doublings[-1]))

    def share(self, num_gpus: int) -> float:
        """Of the speed of a GPU among the fewest that are known."""
        return self.per_gpu(num_gpus) / self.points[min(self.points)]

    def is_known(self, num_gpus: int) -> bool:
        """Whether the speed is known of this very number, not computed from others."""
        return num_gpus in self.points and num_gpus not in self.scaled

    def is_assumed(self, num_gpus: int) -> bool:
        """Whether nothing is known of how the speed scales to this number."""
        return self.efficiency is None and num_gpus > max(self.points)


@dataclass(frozen=True)
class Phase:
    """Training at one resolution.

    Args:
        resolution: in pixels.
        num_images: that are there.
        images_seen: in all steps.
        offline: speed from latents.
        factors: time over that of an offline step, by arm.
    """

    resolution: int
    num_images: float
    images_seen: float
    offline: Curve
    factors: Mapping[Arm, float]

    @property
    def epochs(self) -> float:
        """Passes over the images; less than one leaves some unseen."""
        return self.images_seen / self.num_images

    @property
    def num_encoded(self) -> float:
        """Images that training sees at all: the others need no latents."""
        return min(self.num_images, self.images_seen)

    def hours(self, num_gpus: int, arm: Arm = "offline") -> float:
        """Of wall time."""
        images_per_sec = num_gpus * self.offline.per_gpu(num_gpus)
        return self.images_seen * self.factors[arm] / images_per_sec / 3600
