"""Fill in a manifest: `python -m deploy.render FILE NAME=VALUE ... | kubectl apply --filename -`.

A manifest is text with `${NAME}`, which must be given, and `${NAME:-default}`. What is missing, and
what the manifest has no place for, is an error; nothing is left unfilled.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from shards.errors import UserError, reported

_PROGRAM = "python -m deploy.render"
_HOLE = re.compile(r"\$\{(?P<name>[A-Z][A-Z0-9_]*)(?::-(?P<default>[^}]*))?\}")
_COMMENT = re.compile(r"^\s*#.*\n", re.MULTILINE)
# Values stand inside double quotes or bare, in YAML and in shell commands within it.
_UNSAFE = re.compile(r"[\"\\\n\r`$]")


def main(argv: list[str] | None = None) -> None:
    """Print the manifest with everything filled in."""
    arguments = sys.argv[1:] if argv is None else argv
    with reported("render"):
        if not arguments or arguments[0] in ("-h", "--help"):
            sys.stdout.write(f"usage: {_PROGRAM} FILE NAME=VALUE ...\n\n{__doc__}")
            return
        file, *pairs = arguments
        sys.stdout.write(render(Path(file), parse_values(pairs)))


def parse_values(pairs: list[str]) -> dict[str, str]:
    """`["IMAGE=x"]` to a mapping.

    Raises:
        UserError: no `NAME=VALUE`, a name twice, or a value that YAML or a shell would read.
    """
    values: dict[str, str] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise UserError(repr(pair), "no value", wanted="NAME=VALUE")
        if name in values:
            raise UserError(name, "given twice")
        if found := _UNSAFE.search(value):
            raise UserError(
                name, f"{found[0]!r} in its value", wanted='none of " \\ ` $ or newline'
            )
        values[name] = value
    return values


def render(file: Path, values: Mapping[str, str]) -> str:
    """The manifest's text with all holes filled.

    Comments are dropped: they speak of the manifest, not of the job.

    Raises:
        UserError: no such file, a value is missing, or the manifest has no place for one.
    """
    try:
        text = _COMMENT.sub("", file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(file, error.strerror or str(error), wanted="a manifest") from None
    except UnicodeDecodeError:
        raise UserError(file, "not UTF-8", wanted="a manifest") from None
    defaults = holes(text)
    for name in values.keys() - defaults.keys():
        nearest = difflib.get_close_matches(name, defaults, n=1)
        raise UserError(
            file,
            f"no place for {name}",
            wanted=f"some of {', '.join(sorted(defaults))}",
            remedy=f"{nearest[0]}=..." if nearest else "",
        )
    missing = sorted(
        name for name, default in defaults.items() if not (values.get(name) or default)
    )
    if missing:
        raise UserError(
            file,
            f"no value for {', '.join(missing)}",
            remedy=" ".join([_PROGRAM, str(file), *(f"{name}=..." for name in missing)]),
        )
    return _HOLE.sub(lambda hole: values.get(hole["name"]) or defaults[hole["name"]] or "", text)


def holes(text: str) -> dict[str, str | None]:
    """Names that a manifest asks for, each with its default or None, in their order."""
    found: dict[str, str | None] = {}
    for hole in _HOLE.finditer(text):
        if hole["default"] is not None or hole["name"] not in found:
            found[hole["name"]] = hole["default"]
    return found


if __name__ == "__main__":
    main()
