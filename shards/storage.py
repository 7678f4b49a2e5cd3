"""Files that appear whole or not at all, and their hashes.

A file is written under a temporary name beside its target, flushed to the disk, then renamed. The
temporary name is a function of the target's name, so a killed process's leftover is overwritten
by the next attempt and nothing has to be cleaned up by hand.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.errors import UserError

TEMPORARY_SUFFIX = ".partial"


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, then give it its name in one step.

    Args:
        path: the final name; its folder is made when missing.
        write: is called with the temporary path and must create that file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    write(temporary)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def write_text_whole(path: Path, text: str) -> None:
    """`write_whole` for a small text."""
    write_whole(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder durable: without it a power cut may undo them."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(document: Any) -> str:
    """The one text of a JSON document: equal documents have equal bytes and equal hashes."""
    return (
        json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    )


@contextmanager
def sole_writer(folder: Path, wait_sec: float = 0.0) -> Iterator[None]:
    """Hold a folder against a second writing process on this machine.

    The lock lives on the folder itself, so it leaves no file behind and dies with its process.

    Args:
        folder: is made when missing.
        wait_sec: how long to wait for a process that is about to end.

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
        while not _locked(descriptor):
            if time.monotonic() > deadline:
                remedy = "wait for it to end, or name another folder"
                raise UserError(folder, "another process is writing here", remedy=remedy)
            time.sleep(0.2)  # a lock with a deadline can only be polled
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
