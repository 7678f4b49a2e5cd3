"""FLOPs per image at any resolution, from three that were counted.

All operators of these networks but self-attention cost in proportion to the number of pixels, and
self-attention to its square; the text's part is the same at any. So FLOPs are a quadratic in the
number of pixels, and three counts are all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.planner.config import UNet


@dataclass(frozen=True)
class Counts:
    """FLOPs (2 per multiply-add), counted by `benchmarks.flops` on torch's meta device.

    Args:
        unet: forward and backward, by resolution.
        vae: encoding, by resolution.
        text: of a caption of 77 tokens.
    """

    unet: dict[int, int]
    vae: dict[int, int]
    text: int


_SD_VAE = {256: 272_722_165_760, 512: 1_116_658_466_816, 768: 2_609_118_314_496}
COUNTS: dict[UNet, Counts] = {
    "sd2-base": Counts(
        unet={256: 539_310_899_200, 512: 2_408_741_109_760, 768: 6_443_167_989_760},
        vae=_SD_VAE,
        text=45_127_233_536,
    ),
    "sd15": Counts(
        unet={256: 537_342_853_120, 512: 2_406_773_063_680, 768: 6_441_199_943_680},
        vae=_SD_VAE,
        text=13_298_503_680,
    ),
    "tiny": Counts(
        unet={64: 535_986_176, 128: 2_036_498_432, 256: 8_321_662_976},
        vae={64: 146_219_008, 128: 597_458_944, 256: 2_591_162_368},
        text=99_939_840,
    ),
}


def flops_at(unet: UNet, resolution: int) -> dict[str, float]:
    """FLOPs for one image: `unet` forward and backward, `vae` encoding, `text` forward."""
    counts = COUNTS[unet]
    return {
        "unet": _at(counts.unet, resolution),
        "vae": _at(counts.vae, resolution),
        "text": float(counts.text),
    }


def _at(counts: dict[int, int], resolution: int) -> float:
    pixels = [side**2 / 256**2 for side in counts]
    return float(np.polyval(np.polyfit(pixels, list(counts.values()), 2), resolution**2 / 256**2))
