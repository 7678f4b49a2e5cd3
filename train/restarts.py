"""Starting again after a failure, from the last checkpoint."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from shards.errors import StorageError, UserError

_RESTARTS = "LATENTMILL_RESTARTS"


@contextmanager
def restarted_on_failure(max_restarts: int) -> Iterator[None]:
    """Run this process's command again when what is inside fails, at most so many times.

    The process replaces itself, so nothing of the failed attempt is left, on the device neither,
    and whoever launched it sees one process. What the user must put right is not tried again, but
    for storage that cannot be reached.

    Args:
        max_restarts: 0 lets every failure through.

    Raises:
        UserError: of several processes one alone cannot start again.
    """
    if max_restarts and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "--max-restarts",
            "several processes, which must start again together",
            remedy=f"accelerate launch --max_restarts {max_restarts}, without --max-restarts",
        )
    try:
        yield
    except Exception as error:
        done = int(os.environ.get(_RESTARTS, "0"))
        is_final = isinstance(error, UserError) and not isinstance(error, StorageError)
        if is_final or done >= max_restarts:
            raise
        traceback.print_exc()
        sys.stderr.write(f"train: starting again, {done + 1} of {max_restarts}\n")
        sys.stderr.flush()
        sys.stdout.flush()
        os.environ[_RESTARTS] = str(done + 1)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
