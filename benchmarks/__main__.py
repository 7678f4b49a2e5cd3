"""Measure online against offline training: `make bench`, or `python -m benchmarks --help`.

The last line of the output is one JSON document.
"""

from __future__ import annotations

from typing import Any

import tyro

from benchmarks.online_offline import BenchConfig, measure
from benchmarks.result import publish
from shards.errors import reported


def main(argv: list[str] | None = None) -> None:
    """Parse, measure, report."""
    config = tyro.cli(BenchConfig, args=argv, prog="python -m benchmarks", description=__doc__)
    with reported("bench"):
        result = measure(config)
    print_table(result)
    publish(result, config.out)


def print_table(result: dict[str, Any]) -> None:
    """The result for people."""
    env = result["environment"]
    print(
        f"\n{result['preset']} at {result['resolution']} px, batch {result['global_batch_size']}, "
        f"{env['device']}, torch {env['versions']['torch']}"
    )
    print(f"{'arm':<10}{'it/s':>8}{'img/s':>9}   p10-p90 img/s")
    for arm, speed in result["images_per_sec"].items():
        iters = result["iters_per_sec"][arm]["median"]
        print(
            f"{arm:<10}{iters:>8.2f}{speed['median']:>9.1f}   {speed['p10']:.1f}-{speed['p90']:.1f}"
        )
    speedup, flops = result["offline_speedup"], result["flops_per_image"]
    print(
        f"offline is {speedup['median']:.2f}x as fast (p10-p90 {speedup['p10']:.2f}-"
        f"{speedup['p90']:.2f}); FLOPs alone predict {result['flops_predicted_speedup']:.2f}x"
    )
    print("GFLOP per image: " + ", ".join(f"{k} {v / 1e9:.2f}" for k, v in flops.items()))
    with_stage1 = result["totals"]["speedup_with_stage1"]
    print(
        f"with stage 1 counted ({result['stage1_images_per_sec']:.0f} img/s): "
        + ", ".join(f"{ratio:.2f}x after {epochs} epochs" for epochs, ratio in with_stage1.items())
    )
    break_even = result["totals"]["break_even_epochs"]
    print(f"break-even: {break_even:.1f} epochs" if break_even else "break-even: never")


if __name__ == "__main__":
    main()
