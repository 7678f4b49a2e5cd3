"""Files of a dataset, on a local disk or behind any fsspec URL, that appear whole or not at all.

A `Location` is a `pathlib.Path`, or a `UPath` for a URL such as `s3://bucket/latents`; both join
with `/`. A local file is written under a temporary name beside its target, flushed to the disk and
renamed. The temporary name is a function of the target's name, so what a killed process leaves is
overwritten by the next attempt. On an object store it is a single put, conditional on request.
Operations that fail in passing are tried again (`shards.retry`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from upath import UPath

from shards.errors import StorageError, UserError
from shards.lock import held_file, sole_writer
from shards.retry import LOCAL, REMOTE, retried

T = TypeVar("T")
Location: TypeAlias = Path | UPath

TEMPORARY_SUFFIX = ".partial"

# botocore tries each request three times, so that one reset in a part of a large file does not cost
# the whole file; above that ours is the only loop (`location` switches s3fs's own off).
_S3_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,  # other workers write as well
    "config_kwargs": {
        "connect_timeout": 10,
        "read_timeout": 30,
        "retries": {"mode": "standard", "total_max_attempts": 3},
    },
}


def location(url: str | Location) -> Location:
    """A local path, or the place that a URL names.

    fsspec's own configuration applies (`FSSPEC_S3_ENDPOINT_URL`, `~/.config/fsspec/*.json`).

    Raises:
        UserError: no such protocol, or its package is not installed.
    """
    import fsspec

    if not isinstance(url, str):
        return url
    protocol, separator, _ = url.partition("://")
    if not separator:
        return Path(url)
    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        chosen = fsspec.config.conf.get("s3", {})
        options = {name: value for name, value in _S3_OPTIONS.items() if name not in chosen}
    try:
        if protocol in ("http", "https"):
            options = _web_options()
        place = UPath(url, **options)
        filesystem = place.fs
    except (ImportError, ValueError) as error:
        raise UserError(url, f"cannot be reached ({error})", wanted="a folder or URL") from None
    if protocol in ("file", "local"):
        return Path(place.path)
    if hasattr(filesystem, "retries"):
        filesystem.retries = 1
    return place


def _web_options() -> dict[str, Any]:
    """For files as they are, which may take hours as long as they come; aiohttp ends at 5 min."""
    from aiohttp import ClientTimeout

    timeout = ClientTimeout(total=None, sock_connect=10, sock_read=30)
    return {
        "client_kwargs": {"timeout": timeout, "auto_decompress": False},
        "headers": {"Accept-Encoding": "identity"},
    }


def is_remote(where: Location) -> bool:
    """Whether it is behind a URL: it cannot be mapped, locked or renamed."""
    return not isinstance(where, Path)


def size_of(where: Location) -> int | None:
    """Bytes of a file; None where there is none."""
    filesystem, path = _filesystem(where)
    try:
        info = _run(where, "looking it up", lambda: filesystem.info(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return int(info["size"]) if info["type"] == "file" else None


def list_files(folder: Location) -> dict[str, int]:
    """Bytes of each file in a folder by name, sorted; empty where there is no folder."""
    entries = _list(folder)
    return {name: int(info["size"]) for name, info in entries.items() if info["type"] == "file"}


def list_folders(folder: Location) -> list[str]:
    """Names of the folders in a folder, sorted, but for hidden ones; empty where there is none."""
    folders = [name for name, info in _list(folder).items() if info["type"] == "directory"]
    return [name for name in folders if not name.startswith(".")]


def _list(folder: Location) -> dict[str, Any]:
    filesystem, path = _filesystem(folder)

    def ls() -> list[Any]:
        filesystem.invalidate_cache(path)
        found: list[Any] = filesystem.ls(path, detail=True)
        return found

    try:
        entries = _run(folder, "listing", ls)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    named = ((info["name"].rstrip("/").rsplit("/", 1)[-1], info) for info in entries)
    # Some stores list a folder's own marker among its files.
    return dict(sorted((n, info) for n, info in named if info["name"].rstrip("/") != path))


def read_bytes(where: Location) -> bytes:
    """A whole file.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: it cannot be read.
    """
    filesystem, path = _filesystem(where)
    data: bytes = _run(where, "reading", lambda: filesystem.cat_file(path))
    return data


def read_many(folder: Location, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Whole small files of one folder, in order; many requests at a time where it is remote.

    Raises:
        FileNotFoundError: one is not there (any more).
        StorageError: one cannot be read.
    """
    if not is_remote(folder):
        for name in names:
            yield name, read_bytes(folder / name)
        return
    filesystem, _ = _filesystem(folder)
    for start in range(0, len(names), 1000):
        chunk = names[start : start + 1000]
        paths = {name: (folder / name).path for name in chunk}  # type: ignore[union-attr]
        found = _run(folder, f"reading {len(chunk)} files", partial(_cat, filesystem, paths))
        yield from ((name, found[paths[name]]) for name in chunk)


def _cat(filesystem: Any, paths: dict[str, str]) -> dict[str, bytes]:
    found: dict[str, bytes] = filesystem.cat(list(paths.values()), on_error="raise")
    return found


def download(where: Location, to: Path) -> None:
    """Copy a file to a local path; the copy may be cut short when this raises.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: it cannot be read, or written here.
    """
    filesystem, path = _filesystem(where)
    _run(where, "downloading", lambda: filesystem.get_file(path, str(to)))


@contextmanager
def local_copy(where: Location) -> Iterator[Path]:
    """A file as a local path: itself, or a download that is gone afterwards."""
    if isinstance(where, Path):
        yield where
        return
    with _scratch_file(where, "read") as copy:
        download(where, copy)
        yield copy


def write_whole(where: Location, fill: Callable[[Path], None], *, replace: bool = True) -> bool:
    """Let `fill` make a temporary file, then give it its name in one step.

    Args:
        where: the final name; its folder is made when missing.
        fill: is called with a local path and must create that file.
        replace: False leaves a file that is there already as it is, even against another worker
            who writes it at this very moment.

    Returns:
        whether the file is the one that `fill` made.

    Raises:
        StorageError: it cannot be written.
    """
    write = _write_local if isinstance(where, Path) else _write_remote
    try:
        return write(where, fill, replace)  # type: ignore[arg-type]
    except OSError as error:
        message = f"cannot be written ({error.strerror or error})"
        raise StorageError(where, message, remedy="free space, or name another place") from error


def _write_local(path: Path, fill: Callable[[Path], None], replace: bool) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with held_file(temporary):
        try:
            if not replace and path.exists():
                temporary.unlink()
                return False
            fill(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)
    return True


def _write_remote(where: UPath, fill: Callable[[Path], None], replace: bool) -> bool:
    filesystem, path = _filesystem(where)
    mode = "overwrite" if replace else "create"
    with _scratch_file(where, "write") as made:
        fill(made)
        try:
            _run(where, "writing", lambda: _put(filesystem, made, path, mode))
        except FileExistsError:
            return False
    return True


@contextmanager
def _scratch_file(where: UPath, purpose: str) -> Iterator[Path]:
    """A local file for a remote one; what a killed process leaves is overwritten by the next."""
    folder = Path(tempfile.gettempdir()) / f"latentmill-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    place = hashlib.sha256(f"{purpose} {where}".encode()).hexdigest()[:32]
    path = folder / f"{place}-{where.name[-50:]}{TEMPORARY_SUFFIX}"  # signed URLs are long
    with held_file(path):
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


def _put(filesystem: Any, made: Path, path: str, mode: str) -> None:
    try:
        filesystem.put_file(str(made), path, mode=mode)
    except OSError as error:  # some stores word the refusal in a way that s3fs does not know
        answer = getattr(error.__cause__, "response", None) or {}
        if answer.get("Error", {}).get("Code") in ("PreconditionFailed", "412"):
            raise FileExistsError(path) from None
        raise


def write_text_whole(where: Location, text: str, *, replace: bool = True) -> bool:
    """`write_whole` for a small text."""
    return write_whole(where, partial(_write_text, text=text), replace=replace)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def remove(where: Location) -> None:
    """Delete a file; one that is gone already is fine."""
    filesystem, path = _filesystem(where)
    try:
        _run(where, "deleting", lambda: filesystem.rm_file(path))
    except FileNotFoundError:
        return


def move(where: Location, to: Location) -> None:
    """Give a file another place in the same storage; on an object store it is copied first."""
    if isinstance(where, Path) and isinstance(to, Path):
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(where, to)
        return
    filesystem, path = _filesystem(where)
    _, target = _filesystem(to)
    _run(where, f"copying to {to}", lambda: filesystem.cp_file(path, target))
    remove(where)


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder durable: without it a power cut may undo them."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing_job(dataset: Location, *, shared: bool = False) -> Iterator[None]:
    """One job at a time on a local dataset, or several that share it.

    On an object store nothing can be locked: there two jobs may do the same work, but no shard is
    committed twice (`shards.receipt.commit`).

    Args:
        dataset: a folder or a URL.
        shared: let other jobs that say so write at the same time, each to shards of its own.
    """
    with sole_writer(dataset, shared=shared) if isinstance(dataset, Path) else nullcontext():
        yield


def _filesystem(where: Location) -> tuple[Any, str]:
    import fsspec

    if isinstance(where, Path):
        return fsspec.filesystem("file"), str(where.absolute())
    return where.fs, where.path


def _run(where: Location, action: str, operation: Callable[[], T]) -> T:
    policy = REMOTE if is_remote(where) else LOCAL
    return retried(operation, where=where, action=action, policy=policy)
