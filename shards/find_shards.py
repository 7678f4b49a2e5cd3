"""Which image shards patterns name: on disks, on object stores and web servers, from commands."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from shards.errors import UserError
from shards.parquet_shards import find_image_column, no_image_column, read_schema
from shards.pipe import PIPE
from shards.source_files import WEB, absolute, match_files, sizes_of, storage_of
from shards.source_shard import HINT, SourceShard, is_parquet, shard_name, split_suffix
from shards.storage import location


def find_shards(patterns: str) -> tuple[list[SourceShard], list[str]]:
    """The image shards that patterns name, and the gaps in their numbering.

    Args:
        patterns: paths, folders or fsspec URLs of tars (`.tar`, `.tar.gz`, `.tgz`) and parquet
            files, separated by white space, with `{00000..00099}`, `*`, `?` and `[01]`; and
            `pipe:` with a shell command, which takes the rest of its line. Metadata in parquet
            beside tars, as img2dataset writes them, are no shards where a `*` finds them.

    Returns:
        shards in order of their names, and what brace ranges name that does not exist.

    Raises:
        UserError: nothing there, a plain path that does not exist, a storage that cannot be
            listed, two shards of one name, or parquet without images.
    """
    expanded = [(url, pattern) for pattern in _split(patterns) for url in _expand(pattern)]
    if not expanded:
        raise UserError("--shards", "no pattern given", wanted="image shards", remedy=HINT)
    found: dict[str, SourceShard] = {}
    matched: dict[str, SourceShard] = {}
    named: dict[str, str] = {}  # by URL, the pattern
    for url, pattern in expanded:
        if url.startswith(PIPE):
            found[url] = SourceShard(url, shard_name(url), None)
        elif glob := _as_glob(url):
            for shard in _match(glob, is_range=url != pattern):
                if shard.num_bytes is None:  # a web server's listing
                    named[shard.url] = shard.url
                else:
                    matched[shard.url] = shard
        else:
            named[url] = pattern
    sizes = sizes_of(list(named))
    gaps = [url for url in named if url not in sizes]
    for url in gaps:
        if named[url] == url:
            raise UserError(url, "no such image shard", wanted="a tar or parquet", remedy=HINT)
    found |= {url: SourceShard(absolute(url), shard_name(url), size) for url, size in sizes.items()}
    found |= _without_metadata(matched, list(found.values()))
    if not found:
        raise UserError(patterns, "no image shard matches", wanted="tars or parquet", remedy=HINT)
    shards = _by_name(found.values())
    _expect_images(shards)
    return shards, gaps


def _split(patterns: str) -> Iterator[str]:
    for line in patterns.splitlines():
        rest = line.strip()
        while rest and not rest.startswith(PIPE):
            pattern, *remaining = rest.split(maxsplit=1)
            yield pattern
            rest = remaining[0] if remaining else ""
        if rest:
            yield rest


def _expand(pattern: str) -> list[str]:
    import braceexpand

    try:  # in a command a backslash is the shell's
        return list(braceexpand.braceexpand(pattern, escape=not pattern.startswith(PIPE)))
    except ValueError as error:
        raise UserError(pattern, str(error), wanted="a range in braces", remedy=HINT) from None


def _as_glob(url: str) -> str:
    """The pattern that files are matched with; empty where a URL names just one."""
    if "*" in url or (not url.startswith(WEB) and any(sign in url for sign in "?[")):
        filesystem, path = storage_of(url)
        return "" if filesystem.isfile(path) else url  # a file may be called so
    if not split_suffix(url)[1] and (url.endswith("/") or _is_local_folder(url)):
        return f"{url.rstrip('/')}/*"
    return ""


def _is_local_folder(url: str) -> bool:
    where = location(url)
    return isinstance(where, Path) and where.expanduser().is_dir()


def _match(glob: str, is_range: bool) -> list[SourceShard]:
    """The files with a shard's suffix that a pattern matches; one out of a range may have none."""
    files = match_files(glob)
    usable = [one for one in files if split_suffix(one)[1] and not _is_hidden(one)]
    if not usable and not is_range:
        what = f"{len(files)} files, none a shard" if files else "no such image shard"
        if glob.startswith(WEB):
            what += " (few web servers list their files: name them, {00000..00099}.tar)"
        raise UserError(glob, what, wanted="tars or parquet", remedy=HINT)
    return [SourceShard(url, shard_name(url), files[url]) for url in usable]


def _is_hidden(path: str) -> bool:
    return path.rsplit("/", 1)[-1].startswith(".")


def _without_metadata(
    matched: dict[str, SourceShard], named: list[SourceShard]
) -> dict[str, SourceShard]:
    """What globs matched, but for parquet beside tars that holds no images.

    img2dataset writes all its parquet files alike, so of those with a tar of the same name one is
    looked into per folder.
    """
    tars: dict[str, set[str]] = defaultdict(set)
    for shard in (*matched.values(), *named):
        if not is_parquet(shard.url):
            tars[_folder_of(shard)].add(shard.name)
    named_urls = {shard.url for shard in named}
    is_metadata: dict[str, bool] = {}
    kept = {}
    for url, shard in matched.items():
        folder = _folder_of(shard)
        if is_parquet(url) and url not in named_urls and folder in tars:
            has_tar = shard.name in tars[folder]
            asked = folder if has_tar else url
            if asked not in is_metadata:
                schema = read_schema(url)
                is_metadata[asked] = has_tar if schema is None else not find_image_column(schema)
            if is_metadata[asked]:
                continue
        kept[url] = shard
    return kept


def _folder_of(shard: SourceShard) -> str:
    return shard.url.rpartition("/")[0]


def _by_name(shards: Iterable[SourceShard]) -> list[SourceShard]:
    found: dict[str, SourceShard] = {}
    for shard in shards:
        if found.setdefault(shard.name, shard).url != shard.url:
            raise UserError(
                shard.url,
                f"has the name of {found[shard.name].url}",
                wanted="different file names: they name the latent shards",
                remedy="precompute them into two datasets (--out), or rename one",
            )
    return sorted(found.values(), key=lambda shard: shard.name)


def _expect_images(shards: list[SourceShard]) -> None:
    """Hold one parquet file of each folder to having images; the others are when they are read."""
    seen = set()
    for shard in shards:
        folder = _folder_of(shard)
        if is_parquet(shard.url) and not shard.url.startswith(PIPE) and folder not in seen:
            seen.add(folder)
            schema = read_schema(shard.url)
            if schema is not None and not find_image_column(schema):
                raise no_image_column(shard.url, schema)
