"""Measure: online against offline training when no command is named, else what the command says.

Commands: `loader` (our reader of latent shards against other loaders), `order` (open and seek in
400 million samples), `precompute` (stage 1 against a naive one), `train-step` (the U-Net trainer's
speed by micro-batch, attention, precision, compiling and EMA); see `python -m benchmarks loader
--help`. The last line of the output is one JSON document.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tyro

from benchmarks import loader, online_offline, order, stage_one, train_step
from benchmarks.result import publish
from shards.errors import reported


@dataclass(frozen=True)
class _Command:
    """One benchmark: its settings, what measures, and what prints the result for people."""

    config: type[Any]
    measure: Callable[[Any], dict[str, Any]]
    print_table: Callable[[dict[str, Any]], None]
    description: str | None


_DEFAULT = _Command(
    online_offline.BenchConfig, online_offline.measure, online_offline.print_table, __doc__
)
_COMMANDS = {
    "loader": _Command(loader.LoaderConfig, loader.measure, loader.print_table, loader.__doc__),
    "order": _Command(order.OrderConfig, order.measure, order.print_table, order.__doc__),
    "precompute": _Command(
        stage_one.StageOneConfig, stage_one.measure, stage_one.print_table, stage_one.__doc__
    ),
    "train-step": _Command(
        train_step.TrainStepConfig, train_step.measure, train_step.print_table, train_step.__doc__
    ),
}


def main(argv: list[str] | None = None) -> None:
    """Parse, measure, report."""
    arguments = sys.argv[1:] if argv is None else argv
    command, prog = _DEFAULT, "python -m benchmarks"
    if arguments and arguments[0] in _COMMANDS:
        name, *arguments = arguments
        command, prog = _COMMANDS[name], f"{prog} {name}"
    config: Any = tyro.cli(
        command.config, args=arguments, prog=prog, description=command.description
    )
    with reported("bench"):
        result = command.measure(config)
    command.print_table(result)
    publish(result, config.out)


if __name__ == "__main__":
    main()
