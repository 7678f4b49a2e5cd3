"""Commands of a package: a module each, with settings and `run`, loaded when it is asked for."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Mapping
from importlib import import_module
from typing import Any

import tyro

from shards.errors import UserError, reported


def run_command(
    package: str, configs: Mapping[str, str], about: str, argv: list[str] | None = None
) -> None:
    """Parse a command of `python -m <package>` and run it; without one, say what there is.

    Args:
        package: has a module `commands/x.py` for a command x, with `run(settings)`.
        configs: name of each command's settings class.
        about: begins the overview.
        argv: default: the process's own.
    """
    program = f"python -m {package}"
    arguments = sys.argv[1:] if argv is None else argv
    with reported(package):
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_overview(package, configs, about))  # noqa: T201 - this is the answer
            return
        name, *rest = arguments
        if name not in configs:
            raise unknown_command(program, name, configs)
        module = _module(package, name)
        settings: Any = tyro.cli(
            getattr(module, configs[name]),
            args=rest,
            prog=f"{program} {name}",
            description=module.__doc__,
        )
        module.run(settings)


def unknown_command(program: str, name: str, known: Collection[str]) -> UserError:
    """The error for a command that does not exist; its remedy is the one that looks most alike."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return UserError(
        "command",
        f"{name!r} is unknown",
        wanted=f"one of {', '.join(known)}",
        remedy=f"{program} {nearest[0]}" if nearest else "",
    )


def _module(package: str, name: str) -> Any:
    return import_module(f"{package}.commands.{name}")


def _overview(package: str, configs: Mapping[str, str], about: str) -> str:
    """What there is: the first line of each command's module."""
    width = max(map(len, configs)) + 2
    abouts = {name: (_module(package, name).__doc__ or "").splitlines()[0] for name in configs}
    lines = [f"usage: python -m {package} COMMAND [-h | --help] ...", "", about.strip(), ""]
    return "\n".join(lines + [f"  {name:<{width}}{line}" for name, line in abouts.items()])
