"""Shards that a command writes: webdataset's `pipe:aws s3 cp s3://bucket/00000.tar -`."""

from __future__ import annotations

import subprocess
import tempfile
from functools import partial
from typing import IO

from shards.errors import UnreadableShardError
from shards.retry import REMOTE, retried

PIPE = "pipe:"
_MAX_STDERR = 500  # bytes of it in an error
_NOT_FOUND = (126, 127)  # bash: not executable, no such command


def run_pipe(url: str) -> IO[bytes]:
    """What the command of a `pipe:` URL writes, as a local file without a name.

    It is the user's own command line, run by bash; that any part of a pipeline fails counts.

    Raises:
        StorageError: it failed, several times.
        UnreadableShardError: there is no such command.
    """
    return retried(partial(_run, url), where=url, action="the command", policy=REMOTE)


def _run(url: str) -> IO[bytes]:
    output = tempfile.TemporaryFile()  # noqa: SIM115 - the caller's
    try:
        with tempfile.TemporaryFile() as messages:
            status = subprocess.run(
                ["bash", "-o", "pipefail", "-c", url.removeprefix(PIPE)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=messages,
                check=False,
            ).returncode
            length = messages.seek(0, 2)
            messages.seek(max(length - _MAX_STDERR, 0))
            said = messages.read().decode("utf-8", "replace")
        if status:
            raise _failure(url, status, " / ".join(said.split("\n")).strip(" /"))
    except BaseException:
        output.close()
        raise
    output.seek(0)
    return output


def _failure(url: str, status: int, said: str) -> Exception:
    how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    message = f"{how}: {said or 'nothing on stderr'}"
    if status in _NOT_FOUND:  # this does not pass
        return UnreadableShardError(
            url, message, remedy="install it, or correct the command, then run the same again"
        )
    return OSError(message)
