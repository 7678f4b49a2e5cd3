"""A SageMaker real-time endpoint: the server, as the hosting contract wants it started."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from shards.errors import UserError

SOURCE = "LATENTMILL_SOURCE"
ARGUMENTS = "LATENTMILL_SERVE_ARGS"
# A request has 60 seconds; a container that is taken away is killed 30 seconds after SIGTERM.
_TIMEOUT_SEC, _DRAIN_SEC = 55, 25


def server_command(variables: Mapping[str, str]) -> list[str]:
    """The command that answers /ping and /invocations on the port that SageMaker asks.

    It takes no token, whatever the environment has: SageMaker lets nobody through but itself, and
    cannot send one.

    Args:
        variables: LATENTMILL_SOURCE names a pipeline, run or hub id in place of /opt/ml/model,
            where SageMaker unpacks the archive; LATENTMILL_SERVE_ARGS adds flags of the server.

    Raises:
        UserError: neither an archive nor a source, or flags with a quote that does not end.
    """
    folder = Path(variables.get("SAGEMAKER_BASE_DIR") or "/opt/ml") / "model"
    source = variables.get(SOURCE, "")
    if not source and not (folder.is_dir() and any(folder.iterdir())):
        raise UserError(
            folder,
            "empty",
            wanted="a diffusers pipeline, which a training job leaves in model.tar.gz",
            remedy=f"ModelDataUrl, or {SOURCE}=<folder, URL or hub id> in the model's environment",
        )
    try:
        more = shlex.split(variables.get(ARGUMENTS, ""))
    except ValueError as error:
        raise UserError(ARGUMENTS, f"{variables[ARGUMENTS]!r} ({error})") from None
    return [
        *(sys.executable, "-m", "serve", "run", "--source", source or str(folder)),
        *("--host", "0.0.0.0", "--port", variables.get("SAGEMAKER_BIND_TO_PORT") or "8080"),
        *("--allow-anonymous", "--token", ""),
        *("--timeout-sec", str(_TIMEOUT_SEC), "--drain-sec", str(_DRAIN_SEC)),
        *more,
    ]
