"""One image shard as a file: what it is called, and how its bytes get here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shards.errors import StorageError, UnreadableShardError, UserError
from shards.layout import LEDGER
from shards.pipe import PIPE, run_pipe
from shards.receipt import NULL
from shards.storage import local_copy, location

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".parquet")
HINT = "for example SHARDS='/data/laion/{00000..00099}.tar'"
_WORDS = re.compile(r"""[^\s'"|;&<>()]+""")


@dataclass(frozen=True)
class SourceShard:
    """One image shard.

    Args:
        url: local path, fsspec URL, or `pipe:` and a command that writes the file.
        name: what its latent shards are called.
        num_bytes: its length; None where that is not known before it is read.
    """

    url: str
    name: str
    num_bytes: int | None


def split_suffix(url: str) -> tuple[str, str]:
    """Name and suffix of the file that a URL speaks of; without a known suffix it is empty."""
    words = [url]
    if url.startswith(PIPE):  # the last that is a shard's name
        words = [word for word in _WORDS.findall(url.removeprefix(PIPE)) if split_suffix(word)[1]]
    last = words[-1] if words else ""
    if "://" in last:
        last = last.partition("?")[0]
    file_name = last.rsplit("/", 1)[-1]
    suffix = max((s for s in SUFFIXES if file_name.endswith(s)), key=len, default="")
    return file_name.removesuffix(suffix), suffix


def is_parquet(url: str) -> bool:
    """Whether a shard is read as parquet; all others are tars."""
    return split_suffix(url)[1] == ".parquet"


def shard_name(url: str) -> str:
    """The name of a shard.

    Raises:
        UserError: it has no known suffix, or a name that a dataset keeps for itself.
    """
    name, suffix = split_suffix(url)
    if not suffix or name in ("", NULL, LEDGER):
        wanted = "<name>" + " or ".join(SUFFIXES)
        if url.startswith(PIPE):
            wanted = f"a command with a word such as {wanted}"
        raise UserError(url, "not the name of an image shard", wanted=wanted, remedy=HINT)
    return name


def open_source(shard: SourceShard) -> IO[bytes]:
    """The whole shard as an open local file.

    What was brought here has no name any more, so nothing is left of it when this process ends,
    in whatever way.

    Raises:
        UnreadableShardError: it cannot be brought here, after several attempts, or not whole.
    """
    url = shard.url
    try:
        if url.startswith(PIPE):
            return run_pipe(url)
        where = location(url)
        with local_copy(where) as path:
            file = path.open("rb")
            num_bytes = path.stat().st_size
    except StorageError as error:  # its remedy is the one here as well
        raise UnreadableShardError(url, str(error).removeprefix(f"{url}: ")) from None
    except OSError as error:
        raise UnreadableShardError(
            url, f"cannot be read ({error})", remedy="run the same command again"
        ) from None
    if not isinstance(where, Path) and shard.num_bytes not in (None, num_bytes):
        file.close()
        raise UnreadableShardError(
            url,
            f"{num_bytes:,} bytes arrived",
            wanted=f"{shard.num_bytes:,}, as its storage says",
            remedy="run the same command again",
        )
    return file
