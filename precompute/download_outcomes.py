"""What became of each URL, from what img2dataset left in the destination, and what to try again.

A finished shard is `00017.tar` (unless it has no image), `00017.parquet` (a row per URL that it
tried) and, written last, `00017_stats.json`. Later shards hold later attempts at what failed.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shards.errors import UserError
from shards.storage import Location, is_remote, list_files, read_bytes, read_many, remove

if TYPE_CHECKING:
    import pyarrow as pa

SUCCESS = "success"  # img2dataset's word
OPTED_OUT = "opted out (X-Robots-Tag)"
_SHARD_FILE = re.compile(r"(\d+)(\.tar|\.parquet|_stats\.json)")
_SCRATCH = "_tmp"
_READERS = 16  # small files of an object store are read this many at a time


@dataclass(frozen=True)
class Reason:
    """Why a URL gave no image, and whether another attempt may give one."""

    text: str
    may_pass: bool = False


# The first that is found in an error message of the download; what is not here may not pass.
_FAILURES = (
    ("disallowed by X-Robots-Tag", Reason(OPTED_OUT)),
    (r"timed out", Reason("timed out", may_pass=True)),
    (r"\[Errno -\d+\]|name resolution", Reason("no such host", may_pass=True)),
    (
        r"reset by peer|connection abort|closed connection|Broken pipe|IncompleteRead|EOF occurred"
        r"|UNEXPECTED_EOF",
        Reason("connection broken", may_pass=True),
    ),
    (r"refused|No route to host|unreachable", Reason("host not reached", may_pass=True)),
    (
        r"Too many open files|start new thread|Cannot allocate memory",
        Reason("too many --threads for this machine", may_pass=True),
    ),
    (r"CERTIFICATE_VERIFY_FAILED", Reason("certificate not valid")),
)
_PASSING_HTTP = {408, 425, 429}
_LASTING_HTTP = {501, 505}


def reason_of(status: str, message: str | None) -> Reason:
    """Judge a row of img2dataset's metadata that is no success.

    Args:
        status: `failed_to_download` or `failed_to_resize`.
        message: its `error_message`.
    """
    message = message or "no message"
    if status == "failed_to_resize":
        known = message in ("image too small", "aspect ratio too large")
        return Reason(message if known else "not an image")
    if http := re.match(r"HTTP Error (\d+)", message):
        code = int(http[1])
        passing = code in _PASSING_HTTP or (code >= 500 and code not in _LASTING_HTTP)
        return Reason(f"HTTP {code}", may_pass=passing)
    for pattern, reason in _FAILURES:
        if re.search(pattern, message, re.IGNORECASE):
            return reason
    return Reason(message[:60])


def remove_unfinished(out: Location) -> list[str]:
    """Delete what a killed process left of shards; the names of the finished ones, in order.

    A shard's statistics go first: img2dataset takes a shard with statistics for finished. The tar
    of a finished shard without an image goes as well: it is nothing that stage 1 could read. So
    does img2dataset's scratch folder.
    """
    files = list_files(out)
    shards: dict[str, list[str]] = defaultdict(list)
    for name in files:
        if match := _SHARD_FILE.fullmatch(name):
            shards[match[1]].append(name)
    with_stats = [shard for shard in shards if files.get(f"{shard}_stats.json")]
    stats = read_many(out, [f"{shard}_stats.json" for shard in with_stats])
    finished = []
    for shard, (_, data) in zip(with_stats, stats, strict=True):
        wanted = {f"{shard}_stats.json", f"{shard}.parquet"}
        num_images = _count_images(data)
        if num_images:
            wanted.add(f"{shard}.tar")
        if num_images is not None and all(files.get(name) for name in wanted):
            shards[shard] = [name for name in shards[shard] if name not in wanted]
            finished.append(shard)
    leftovers = [name for names in shards.values() for name in names]
    for name in sorted(leftovers, key=lambda name: not name.endswith("_stats.json")):
        remove(out / name)
    scratch = out / _SCRATCH
    for name in list_files(scratch):
        remove(scratch / name)
    if not is_remote(scratch) and scratch.is_dir():
        scratch.rmdir()
    return sorted(finished, key=int)


def _count_images(stats: bytes) -> int | None:
    """None where the statistics are not whole."""
    try:
        return int(json.loads(stats)["successes"])
    except ValueError:
        return None


def read_outcomes(out: Location, finished: Sequence[str]) -> pa.Table:
    """The last attempt at each URL that was tried.

    Returns:
        `url`, `status`, `error_message`, `shard` and `attempts`, in the order of the attempts.
    """
    import pyarrow as pa

    with ThreadPoolExecutor(_READERS) as pool:
        tables = list(pool.map(lambda shard: _read_attempts(out, shard), finished))
    return last_attempts(pa.concat_tables(tables)) if tables else last_attempts(_no_attempts())


def _read_attempts(out: Location, shard: str) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = out / f"{shard}.parquet"
    try:
        data = pa.BufferReader(read_bytes(where))
        table = pq.read_table(data, columns=["url", "status", "error_message"])
    except (OSError, pa.ArrowInvalid) as error:
        remedy = f"delete {out / f'{shard}_stats.json'} and run the same command again"
        raise UserError(where, f"cannot be read ({error})", remedy=remedy) from None
    return table.append_column("shard", pa.array([shard] * table.num_rows, pa.string()))


def _no_attempts() -> pa.Table:
    import pyarrow as pa

    names = ("url", "status", "error_message", "shard")
    return pa.schema([(name, pa.string()) for name in names]).empty_table()


def last_attempts(attempts: pa.Table) -> pa.Table:
    """One row per URL, its last, with the number of its `attempts`."""
    import numpy as np
    import pyarrow as pa

    rows = attempts.append_column("row", pa.array(np.arange(attempts.num_rows)))
    grouped = rows.group_by("url").aggregate([("row", "max"), ("row", "count")])
    grouped = grouped.sort_by("row_max")
    is_last = np.zeros(attempts.num_rows, bool)
    is_last[grouped["row_max"].to_numpy()] = True
    return attempts.filter(pa.array(is_last)).append_column("attempts", grouped["row_count"])


def worth_another_attempt(outcomes: pa.Table, max_attempts: int) -> pa.Array:
    """URLs that failed for a reason that may pass, and have attempts left."""
    import pyarrow as pa
    import pyarrow.compute as pc

    failed = outcomes.filter(pc.equal(outcomes["status"], "failed_to_download"))
    failed = failed.filter(pc.less(failed["attempts"], max_attempts))
    messages = pc.unique(failed["error_message"]).to_pylist()
    passing = [one for one in messages if reason_of("failed_to_download", one).may_pass]
    return failed.filter(pc.is_in(failed["error_message"], pa.array(passing, pa.string())))["url"]


def count_outcomes(outcomes: pa.Table) -> Counter[str]:
    """URLs by what became of them: `success`, or the reason's text."""
    pairs = outcomes.group_by(["status", "error_message"]).aggregate([("url", "count")])
    counts: Counter[str] = Counter()
    for row in pairs.to_pylist():
        status = row["status"]
        success = status == SUCCESS
        text = SUCCESS if success else reason_of(status, row["error_message"]).text
        counts[text] += row["url_count"]
    return counts
