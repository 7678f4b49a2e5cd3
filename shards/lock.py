"""Locks on local files: one writer at a time. They die with their process and leave nothing."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.errors import UserError


@contextmanager
def sole_writer(folder: Path, wait_sec: float = 0.0, *, shared: bool = False) -> Iterator[None]:
    """Hold a folder against a second writing process on this machine.

    The lock lives on the folder itself, so it leaves no file behind and dies with its process.

    Args:
        folder: is made when missing.
        wait_sec: how long to wait for a process that is about to end.
        shared: hold it against those alone that do not share.

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(folder, f"cannot be written to ({error.strerror})") from None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + wait_sec
        while not _try_lock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                remedy = "wait for it to end, or name another folder"
                raise UserError(folder, "another process is writing here", remedy=remedy)
            time.sleep(0.2)  # a lock with a deadline can only be polled
        yield
    finally:
        os.close(descriptor)


@contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Hold a folder that is there, waiting while another process, or thread, holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def held_file(path: Path) -> Iterator[None]:
    """Create a file, or take over one that a killed process left, and hold it.

    Waits while another process holds it. The holder may rename or delete the file.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_at(descriptor, path):
                continue  # its last holder renamed it away while we waited
            yield
            return
        finally:
            os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether a living process holds the file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return not _try_lock(descriptor)
    finally:
        os.close(descriptor)


def remove_abandoned(path: Path) -> bool:
    """Delete a file unless a living process holds it; whether it is gone.

    It is deleted while it is held: between a look and a deletion another process might take it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        if not _try_lock(descriptor):
            return False
        if _is_at(descriptor, path):
            path.unlink()
        return True
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
