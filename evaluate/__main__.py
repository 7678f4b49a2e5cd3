"""Look at what a run has learnt, and hand it on.

python -m evaluate sample --run runs/x --prompts "a lion; a leaf"
python -m evaluate scenes --run runs/demo --scenes data/demo/scenes/held_out
"""

from __future__ import annotations

import difflib
import sys
from importlib import import_module
from typing import Any

import tyro

from shards.errors import UserError, reported

# Settings of each command; its module, of the command's name, is loaded when it is asked for.
_COMMANDS = {
    "sample": "SampleConfig",
    "scenes": "ScenesConfig",
}
_PROGRAM = "python -m evaluate"


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m evaluate`."""
    arguments = sys.argv[1:] if argv is None else argv
    with reported("evaluate"):
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_overview())
            return
        name, *rest = arguments
        module = _module(name)
        config: Any = tyro.cli(
            getattr(module, _COMMANDS[name]),
            args=rest,
            prog=f"{_PROGRAM} {name}",
            description=module.__doc__,
        )
        module.run(config)


def _module(name: str) -> Any:
    if name in _COMMANDS:
        return import_module(f"evaluate.commands.{name}")
    nearest = difflib.get_close_matches(name, _COMMANDS, n=1)
    raise UserError(
        "command",
        f"{name!r} is unknown",
        wanted=f"one of {', '.join(_COMMANDS)}",
        remedy=f"{_PROGRAM} {nearest[0]}" if nearest else "",
    )


def _overview() -> str:
    """What there is: the first line of each command's module."""
    width = max(map(len, _COMMANDS)) + 2
    lines = [f"usage: {_PROGRAM} COMMAND [-h | --help] ...", "", __doc__.strip(), ""]
    abouts = {name: (_module(name).__doc__ or "").splitlines()[0] for name in _COMMANDS}
    return "\n".join(lines + [f"  {name:<{width}}{about}" for name, about in abouts.items()])


if __name__ == "__main__":
    main()
