"""Entry point of stage 1: `python -m precompute --help`, or `make precompute SHARDS=...`."""

from __future__ import annotations

import tyro

from precompute.account import fail_if_too_much_was_dropped
from precompute.config import PrecomputeConfig
from precompute.job import precompute
from shards.errors import reported
from shards.stop import StopOnSignal


def main(argv: list[str] | None = None) -> None:
    """Parse, run, judge."""
    config = tyro.cli(PrecomputeConfig, args=argv, prog="python -m precompute")
    with reported("precompute"), StopOnSignal() as stop:
        manifest = precompute(config, stop)
    if not stop.requested:
        fail_if_too_much_was_dropped(config.out, manifest, config.max_drop_frac)


if __name__ == "__main__":
    main()
