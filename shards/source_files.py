"""Which files exist, and how long they are: on disks, object stores and web servers.

With as few requests as may be, and those at a time: a dataset has tens of thousands of shards.
"""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shards.errors import StorageError, UserError
from shards.retry import LOCAL, REMOTE, retried
from shards.storage import is_remote, list_files, location, size_of

WEB = ("http://", "https://")
_NUM_THREADS = 32  # requests at a time
_LIST_FROM = 32  # names wanted of a folder, from which on it is listed as a whole


def storage_of(url: str) -> tuple[Any, str]:
    """A filesystem, and the path in it; local ones are absolute."""
    import fsspec

    where = location(url)
    if isinstance(where, Path):
        filesystem = fsspec.filesystem("file")
        return filesystem, filesystem._strip_protocol(str(where))
    return where.fs, where.path


def absolute(url: str) -> str:
    """A URL as it is, a local path from the root."""
    return url if is_remote(location(url)) else str(storage_of(url)[1])


def match_files(glob: str) -> dict[str, int | None]:
    """Lengths, by URL, of the files that a pattern matches; None where a server does not say it.

    Raises:
        UserError: its storage cannot be listed.
    """
    filesystem, path = storage_of(glob)
    remote = is_remote(location(glob))
    action = "listing"
    if glob.startswith(WEB):
        action += " (few web servers list their files: name them)"
    try:
        infos: dict[str, Any] = retried(
            lambda: filesystem.glob(path, detail=True),
            where=glob,
            action=action,
            policy=REMOTE if remote else LOCAL,
        )
    except OSError as error:
        raise UserError(glob, f"cannot be listed ({error})", wanted="image shards") from None
    return {
        filesystem.unstrip_protocol(one) if remote else one: info["size"]
        for one, info in infos.items()
        if info["type"] == "file"
    }


def sizes_of(urls: list[str]) -> dict[str, int | None]:
    """Lengths of those files that exist, None where a server does not say it, or not now.

    Folders on object stores are listed: 40,000 names must not cost 40,000 requests in a row.
    """
    by_folder: dict[str, list[str]] = defaultdict(list)
    for url in urls:
        by_folder[url.rpartition("/")[0]].append(url)
    sizes: dict[str, int | None] = {}
    one_by_one = []
    for folder, wanted in by_folder.items():
        listed = _list(folder) if len(wanted) >= _LIST_FROM else None
        if listed is None:
            one_by_one += wanted
        else:
            sizes |= {u: listed[n] for u in wanted if (n := u.rpartition("/")[2]) in listed}
    return sizes | _look_up(one_by_one)


def _look_up(urls: list[str]) -> dict[str, int | None]:
    """Lengths of files, one by one.

    What cannot be looked up while other files can is left to the reading: it costs that shard.
    """
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        found = dict(zip(urls, pool.map(_size_or_error, urls), strict=True))
    errors = [size for size in found.values() if isinstance(size, StorageError)]
    if errors and len(errors) == len(found):
        raise errors[0]
    known = {url: size for url, size in found.items() if size is not None}
    return {url: None if isinstance(size, StorageError) else size[0] for url, size in known.items()}


def _size_or_error(url: str) -> tuple[int | None] | StorageError | None:
    try:
        return _size(url)
    except StorageError as error:
        return error


def _list(folder: str) -> dict[str, int] | None:
    """Lengths of the files in a folder, or None where these are better looked up one by one."""
    if folder.startswith(WEB) or "://" not in folder:
        return None
    try:
        return list_files(location(folder))
    except StorageError as error:
        if isinstance(error.__cause__, PermissionError):  # to list, but maybe not to read
            return None
        raise


def _size(url: str) -> tuple[int | None] | None:
    """The length of a file, in brackets; None where there is none."""
    if not url.startswith(WEB):
        size = size_of(location(absolute(url)))
        return None if size is None else (size,)
    filesystem, path = storage_of(url)

    def info() -> Any:
        try:
            return filesystem.info(path)["size"]
        except FileNotFoundError as error:  # fsspec's word for any failure
            raise _meaning(error) from None

    try:
        return (retried(info, where=url, action="looking it up", policy=REMOTE),)
    except FileNotFoundError:
        return None


def _meaning(error: FileNotFoundError) -> BaseException:
    status = getattr(error.__cause__, "status", None)
    if error.__cause__ is None or status in (404, 410):
        return error
    if status is not None and 400 <= status < 500 and status not in (408, 429):
        return PermissionError(f"HTTP status {status}")  # this does not pass
    return error.__cause__
