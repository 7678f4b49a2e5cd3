"""Entry point of the image; one image for stage 1, training, serving and SageMaker.

docker run IMAGE precompute --shards ... --out ...   python -m precompute
docker run IMAGE train tiny --data ...               train/main.py on every GPU
docker run IMAGE serve run --source ...              python -m serve
docker run IMAGE train                               as SageMaker starts a training container
docker run IMAGE serve                               as SageMaker starts an endpoint
docker run IMAGE COMMAND ...                         any command
"""

from __future__ import annotations

import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path

from shards.errors import UserError, reported

_MODULES = ("precompute", "serve", "evaluate", "benchmarks", "shards")


def main(argv: list[str] | None = None) -> None:
    """Become what the arguments ask for."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(__doc__)
        return
    if arguments == ["train"]:
        from deploy.sagemaker.training import main as train

        raise SystemExit(train())
    if arguments == ["healthy"]:
        raise SystemExit(0 if is_healthy() else 1)
    with reported("container"):
        command = command_of(arguments)
    sys.stdout.flush()
    # In our place: signals reach it, and its status is the container's.
    os.execvp(command[0], command)


def command_of(arguments: list[str]) -> list[str]:
    """The command that the container becomes.

    Raises:
        UserError: no such program, or an endpoint without a model.
    """
    name, *rest = arguments
    if arguments == ["serve"]:
        from deploy.sagemaker.hosting import server_command

        return server_command(os.environ)
    if name == "train":
        from deploy.launch import num_devices, trainer_command

        return trainer_command(rest, num_processes=num_devices())
    if name in _MODULES:
        return [sys.executable, "-m", name, *rest]
    if shutil.which(name) is None:
        wanted = f"train, {', '.join(_MODULES)}, or a program"
        raise UserError(name, "no such command", wanted=wanted)
    return arguments


def is_healthy(init: Path = Path("/proc/1/cmdline")) -> bool:
    """Whether the server answers, for Docker's HEALTHCHECK; anything else is well while it runs.

    Args:
        init: command line of the container's first process.
    """
    words = [os.fsdecode(word) for word in init.read_bytes().split(b"\0")]
    if ("serve", "run") not in pairwise(words):
        return True
    import argparse
    import urllib.error
    import urllib.request

    from serve.config import ServeConfig

    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--port", default=ServeConfig.port)
    port = flags.parse_known_args(words)[0].port
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, TimeoutError):
        return False


if __name__ == "__main__":
    main()
