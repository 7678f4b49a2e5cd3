"""What pyproject.toml asks for, a requirement a line: a layer of the image without our own files.

python deploy/requirements.py pyproject.toml eval,serve
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """Of the project and of these extras; an extra that is not there is a `KeyError`."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    return project["dependencies"] + [line for extra in extras for line in optional[extra]]


if __name__ == "__main__":
    file, names = sys.argv[1:]
    sys.stdout.write("\n".join(requirements(Path(file), names.split(","))) + "\n")
