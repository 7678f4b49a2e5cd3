"""Hyper-parameter search: many short runs of the trainer, their losses against their cost.

python -m train.sweep --data data/demo/latents --preset tiny --trials 8 --max-steps 200
python -m train.sweep --data s3://bucket/latents --preset sd2-base-256 --max-steps 2000 \
    --search learning_rate=1e-5:1e-3:log warmup_steps --trials 32 --usd-per-gpu-hour 3.00 5.12
"""

from __future__ import annotations

import tyro

from shards.errors import reported
from train.presets import PRESETS
from train.sweep.config import SweepConfig
from train.sweep.space import default_search

_DESCRIPTION = """\
Hyper-parameter search: each trial is the trainer itself, in a run folder of its own, with other
settings; all are compared by the loss of the same held-out samples, and by what they cost. The same
command again continues a sweep that was stopped or killed. Any flag that is not below is the
trainer's and holds in all trials: --unet sd15 --seed 3.

Searched by default with the preset tiny at 300 steps (others likewise around their own settings):
{ranges}
"""


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m train.sweep`."""
    tiny = PRESETS["tiny"]
    usual = default_search(tiny, tiny.max_steps // 10)
    ranges = "\n".join(f"  {name}={text}" for name, text in usual.items())
    with reported("sweep"):
        config, passed = tyro.cli(
            SweepConfig,
            args=argv,
            prog="python -m train.sweep",
            description=_DESCRIPTION.format(ranges=ranges),
            return_unknown_args=True,
        )
        from train.sweep.runner import sweep

        sweep(config, passed)


if __name__ == "__main__":
    main()
