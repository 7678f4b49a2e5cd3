"""Errors that a user or a file can cause, and how a command reports them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """Something outside the code is wrong; the message says where, what, and the remedy.

    Args:
        where: the file, folder or option concerned.
        found: what is there.
        wanted: what was expected instead.
        remedy: what to do about it.
    """

    def __init__(self, where: object, found: str, *, wanted: str = "", remedy: str = "") -> None:
        text = f"{where}: {found}"
        if wanted:
            text += f"; wanted {wanted}"
        if remedy:
            text += f". Remedy: {remedy}"
        super().__init__(text)

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors of worker processes travel to the one that reports them."""
        return _rebuild, (type(self), str(self))


def _rebuild(kind: type[UserError], text: str) -> UserError:
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    return error


class DatasetError(UserError):
    """A latent dataset is missing, incomplete, of another version, or does not fit its reader."""


class CorruptFileError(DatasetError):
    """A file of a latent dataset is not what its receipt says."""


class StorageError(UserError):
    """A file could not be reached, read or written: the fault of a disk or network."""


class UnreadableShardError(UserError):
    """An image shard could not be read to its end: the fault of a disk or network, not its own."""


@contextmanager
def reported(program: str) -> Iterator[None]:
    """Turn a `UserError` into one line on stderr and exit status 2; other errors pass through."""
    try:
        yield
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)  # noqa: T201 - this is the report
        raise SystemExit(2) from None
