"""Measure: online against offline training when no command is named, else what the command says.

Commands: `train-step` (the U-Net trainer's speed, beside the plain diffusers loop), `scaling` (on
several processes), `precompute` (stage 1 against a naive one), `loader` (our reader of latent
shards against other loaders), `order` (open and seek in 400 million samples), `flops` (counted, of
the real configurations), `traffic` (bytes that the U-Net's step moves, counted as well), `latency`
(what an image takes, plain and on the fast path), `load` (a server at its capacity and above),
`env` (what this machine is and reaches), `plan` (time, bytes and money before the job), `report`
(runs and results as one page). See `python -m benchmarks loader --help`.

A benchmark's last line is its result as one JSON document, which it also writes to
benchmarks/results.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import tyro

from benchmarks.result import NOWHERE, output_file, publish
from shards.command_line import unknown_command
from shards.errors import reported

# Module and settings of each command. A module measures (`measure`, `print_table`) or just runs
# (`run`); it is loaded when it is asked for.
_DEFAULT = ("online_offline", "BenchConfig")
_COMMANDS = {
    "train-step": ("train_step.train_step", "TrainStepConfig"),
    "scaling": ("scaling.scaling", "ScalingConfig"),
    "precompute": ("stage_one", "StageOneConfig"),
    "loader": ("loader", "LoaderConfig"),
    "order": ("order", "OrderConfig"),
    "flops": ("flops_table", "FlopsConfig"),
    "traffic": ("train_step.traffic", "TrafficConfig"),
    "load": ("load.load", "LoadConfig"),
    "latency": ("latency.latency", "LatencyConfig"),
    "env": ("environment.environment", "EnvConfig"),
    "plan": ("planner.plan", "PlanConfig"),
    "report": ("report.report", "ReportConfig"),
}


def main(argv: list[str] | None = None) -> None:
    """Parse, then measure and report, or run."""
    arguments = sys.argv[1:] if argv is None else argv
    with reported("bench"):
        command, prog = _DEFAULT, "python -m benchmarks"
        if arguments and not arguments[0].startswith("-"):
            name, *arguments = arguments
            command, prog = _command(name), f"{prog} {name}"
        module = import_module(f"benchmarks.{command[0]}")
        about = module.__doc__ if command != _DEFAULT else f"{module.__doc__}\n\n{__doc__}"
        config: Any = tyro.cli(
            getattr(module, command[1]), args=arguments, prog=prog, description=about
        )
        if hasattr(module, "run"):
            module.run(config)
            return
        if config.out not in ("", NOWHERE):
            output_file(config.out)  # a mistake is told before anything takes time
        document = module.measure(config)
        module.print_table(document)
        publish(document, config.out)


def _command(name: str) -> tuple[str, str]:
    if name not in _COMMANDS:
        raise unknown_command("python -m benchmarks", name, _COMMANDS)
    return _COMMANDS[name]


if __name__ == "__main__":
    main()
