"""Parameters and FLOPs per image of Stable Diffusion 1.5 and 2, counted on no device.

FLOPs are 2 per multiply-add, from the operators: the U-Net's forward and backward pass, the
encoder of the VAE, the text encoder's forward pass over 77 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.flops import table
from benchmarks.result import result

_PARTS = ("unet", "vae", "text")


@dataclass(frozen=True, kw_only=True)
class FlopsConfig:
    """Count parameters and FLOPs per image of the published models."""

    out: str = ""
    """File of the result; default: its place in benchmarks/results; `-`: none."""


def measure(config: FlopsConfig) -> dict[str, Any]:
    """Count, and return the result document; the machine in it has no part in the numbers."""
    return result("flops", config, models=table())


def print_table(document: dict[str, Any]) -> None:
    """The result for people."""
    print(f"{'':<10}{'px':>5}  {'parameters':>40}  {'GFLOP per image':>30}  online/offline")
    parts = "".join(f"{part:>14}" for part in _PARTS), "".join(f"{part:>10}" for part in _PARTS)
    print(f"{'':<15}{parts[0]}  {parts[1]}  by FLOPs alone")
    for row in document["models"]:
        num_parameters = "".join(f"{row['num_parameters'][part]:>14,}" for part in _PARTS)
        gflop = "".join(f"{row['flops_per_image'][part] / 1e9:>10.2f}" for part in _PARTS)
        print(
            f"{row['unet']:<10}{row['resolution']:>5}{num_parameters}  {gflop}"
            f"  {row['predicted_ratio']:>13.3f}x"
        )
