"""Try a storage operation again when its failure may pass, a bounded number of times.

Networks fail in passing: 5xx answers, resets, stalls, short reads. What cannot pass (no such file,
no permission) is raised at once. The last error says what was tried, how often and for how long.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from shards.errors import StorageError

T = TypeVar("T")

# The caller decides what these mean.
_ANSWERS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
_PERMANENT_ERRNOS = {
    *(errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOSPC, errno.EDQUOT, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.EMSGSIZE, errno.ENOSYS),
}
# Clients of object stores raise types of their own, which are no OSError.
_NETWORK_LIBRARIES = {"aiobotocore", "aiohttp", "botocore", "gcsfs", "requests", "urllib3"}
_PASSING_STATUSES = (408, 425, 429)  # too slow, too early, too many requests
_PERMANENT_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError"}


@dataclass(frozen=True)
class RetryPolicy:
    """How often, and how long to wait in between: `first_delay_sec`, then `factor` times more.

    Waits vary by a quarter at random, so that a thousand workers do not come back all at once.
    """

    attempts: int = 5
    first_delay_sec: float = 0.5
    factor: float = 3.0

    def delay_sec(self, attempt: int) -> float:
        """Seconds to wait after the attempt of this number, from 1."""
        delay = self.first_delay_sec * self.factor ** (attempt - 1)
        return delay * random.uniform(0.75, 1.25)


REMOTE = RetryPolicy()
LOCAL = RetryPolicy(attempts=1)  # a disk's error does not pass


def retried(
    operation: Callable[[], T], *, where: object, action: str, policy: RetryPolicy | None = None
) -> T:
    """The result of `operation`.

    Args:
        operation: may be called several times.
        where: the file or URL, for the error.
        action: what is tried, such as `read`, for the error.
        policy: default `REMOTE`.

    Raises:
        FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError: as they came.
        StorageError: it failed for good.
    """
    policy = policy or REMOTE
    start = time.monotonic()
    for attempt in range(1, policy.attempts + 1):
        try:
            return operation()
        except _ANSWERS:
            raise
        except Exception as error:
            if not _is_of_storage(error):
                raise
            if attempt == policy.attempts or not _may_pass(error):
                raise _final_error(where, action, error, attempt, start) from error
            time.sleep(policy.delay_sec(attempt))
    raise AssertionError("a policy has at least one attempt")


def _is_of_storage(error: Exception) -> bool:
    library = type(error).__module__.split(".", 1)[0]
    return isinstance(error, OSError) or library in _NETWORK_LIBRARIES


def _may_pass(error: Exception) -> bool:
    if isinstance(error, PermissionError):
        return False  # some clients give it no errno
    status = getattr(error, "status", None)  # of a web server's answer
    if isinstance(status, int) and 400 <= status < 500:
        return status in _PASSING_STATUSES
    if isinstance(error, OSError):
        return error.errno not in _PERMANENT_ERRNOS
    return type(error).__name__ not in _PERMANENT_NAMES


def _final_error(
    where: object, action: str, error: Exception, attempts: int, start: float
) -> StorageError:
    times = f" {attempts} times in {time.monotonic() - start:.0f} s" if attempts > 1 else ""
    message = str(error).strip() or "no message"
    return StorageError(
        where,
        f"{action} failed{times} ({type(error).__name__}: {message.splitlines()[0]})",
        remedy="check the disk or the endpoint, credentials and network, then run the same "
        "command again; what was written before stays good",
    )
