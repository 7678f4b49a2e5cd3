"""A bounded local cache of a remote dataset's shards.

Files are named by their content's hash, checked when they arrive, and shared by all processes and
datasets on the machine. What was fetched first goes first when room is needed. A file that goes
while a process has it mapped stays readable to that process until it lets go.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from shards.arrays import repair_remedy
from shards.canonical import sha256_of
from shards.errors import CorruptFileError, UserError
from shards.lock import held_file, held_folder, remove_abandoned
from shards.retry import REMOTE
from shards.storage import TEMPORARY_SUFFIX, UPath, download

DEFAULT_MAX_BYTES = 100 * 2**30
_LOCK_SUFFIX = ".lock"


def default_cache_folder() -> Path:
    """`~/.cache/latentmill/shards`, or below `XDG_CACHE_HOME`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "latentmill" / "shards"


def bounded_cache(folder: str, gib: float) -> ShardCache:
    """The cache that `--cache-dir` and `--cache-gib` name; an empty folder is the default one."""
    return ShardCache(Path(folder) if folder else None, round(gib * 2**30))


class ShardCache:
    """Local copies of remote files, at most `max_bytes` of them.

    Args:
        folder: where; made on first use.
        max_bytes: for all processes that share the folder.
    """

    def __init__(self, folder: Path | None = None, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.folder = folder or default_cache_folder()
        self.max_bytes = max_bytes

    def fetch(self, where: UPath, num_bytes: int, sha256: str) -> Path:
        """The local copy of a file, downloaded if it is not there yet.

        Args:
            where: the remote file.
            num_bytes: its length, as its receipt says.
            sha256: its hash, as its receipt says.

        Raises:
            CorruptFileError: what arrives, time and again, is not what the receipt says.
            UserError: it is larger than the whole cache.
            StorageError: it cannot be fetched.
        """
        path = self.folder / f"{sha256}{where.suffix}"
        if path.exists():
            return path
        if num_bytes > self.max_bytes:
            raise UserError(
                self.folder,
                f"holds {self.max_bytes:,} bytes, {where} has {num_bytes:,}",
                remedy="a larger --cache-gib",
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"cannot be made ({error.strerror})"
            raise UserError(self.folder, message, remedy="another --cache-dir") from None
        lock = path.with_name(path.name + _LOCK_SUFFIX)
        with held_file(lock):  # another process may be fetching the same file
            try:
                if not path.exists():
                    with self._room(path, num_bytes) as temporary:
                        _download_intact(where, temporary, num_bytes, sha256)
                        with held_folder(self.folder):
                            temporary.replace(path)
            finally:
                lock.unlink(missing_ok=True)
        return path

    @contextmanager
    def _room(self, path: Path, num_bytes: int) -> Iterator[Path]:
        """A temporary file for a download, within the bound.

        Its final length is in its name, so that others count it before it is there.
        """
        temporary = path.with_name(f"{path.name}.{num_bytes}{TEMPORARY_SUFFIX}")
        with ExitStack() as held:
            while True:
                with held_folder(self.folder):
                    if self._make_room(num_bytes):
                        held.enter_context(held_file(temporary))
                        break
                time.sleep(0.05)  # what others are fetching will be there soon, and can go then
            try:
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> bool:
        """Delete the oldest files until `num_bytes` more fit; False when they cannot yet."""
        excess = num_bytes - self.max_bytes
        whole = []
        for path in self.folder.iterdir():
            try:
                status = path.stat()
                if path.suffix not in (TEMPORARY_SUFFIX, _LOCK_SUFFIX):
                    whole.append((status.st_mtime_ns, status.st_size, path))
                    excess += status.st_size
                elif not remove_abandoned(path) and path.suffix == TEMPORARY_SUFFIX:
                    excess += int(path.name.split(".")[-2])
            except FileNotFoundError:
                continue  # its fetch has just ended
        for _, size, path in sorted(whole):
            if excess <= 0:
                break
            path.unlink()
            excess -= size
        return excess <= 0


def _download_intact(where: UPath, to: Path, num_bytes: int, sha256: str) -> None:
    """A transfer may be cut short, or damaged, without an error; so it is held to its hash."""
    found = ""
    for _ in range(REMOTE.attempts):
        try:
            download(where, to)
        except FileNotFoundError:
            raise CorruptFileError(where, "is missing", remedy=repair_remedy(where)) from None
        if to.stat().st_size == num_bytes and sha256_of(to) == sha256:
            return
        found = f"{to.stat().st_size} bytes with sha256 {sha256_of(to)[:12]}…"
    raise CorruptFileError(
        where,
        f"{found}, {REMOTE.attempts} times",
        wanted=f"{num_bytes} bytes with {sha256[:12]}…, as its receipt says",
        remedy=repair_remedy(where),
    )
