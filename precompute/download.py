"""Getting images: img2dataset turns a list of URLs into image shards; we plan, check and retry.

`python -m precompute.download --help`, or `make download LIST=urls.parquet OUT=data/images`.

img2dataset runs in an environment of its own. What is left to do is read off the destination each
time, so the same command again does what is missing, whatever was killed and when.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from precompute.download_outcomes import (
    OPTED_OUT,
    SUCCESS,
    count_outcomes,
    read_outcomes,
    remove_unfinished,
    worth_another_attempt,
)
from precompute.download_process import NOTES, arguments, find_interpreter, run_img2dataset
from precompute.download_urls import UrlList, read_url_list, write_table
from shards.errors import UserError, reported
from shards.storage import (
    Location,
    is_remote,
    list_files,
    location,
    read_bytes,
    write_text_whole,
    writing_job,
)

if TYPE_CHECKING:
    import pyarrow as pa

# Settings that all shards of a destination have in common.
_SHARED = (
    *("url_col", "caption_col", "image_size", "resize_mode", "min_side"),
    *("max_aspect_ratio", "encode_quality", "samples_per_shard"),
)


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """Download a list of image URLs into image shards, with img2dataset.

    The same command again does what is missing. Example:
    python -m precompute.download --urls urls.parquet --out s3://bucket/images
    """

    urls: str
    """The list: parquet, csv, tsv, txt, json or jsonl; a file, an fsspec URL, or a glob of them."""
    out: str = "data/images"
    """Image shards: a folder, or a URL such as s3://bucket/images."""
    url_col: str = ""
    """Column of the URLs; by default url or URL."""
    caption_col: str = ""
    """Column of the captions; by default caption, text or TEXT. Other columns go along."""
    image_size: int = 0
    """Scale larger images down to this shortest side in pixels; 0 keeps the originals."""
    resize_mode: Literal["keep_ratio", "keep_ratio_largest", "center_crop"] = "keep_ratio"
    """How --image-size is reached; keep_ratio_largest takes it as the longest side."""
    min_side: int = 0
    """Leave out images whose shorter side has fewer pixels."""
    max_aspect_ratio: float = 0.0
    """Leave out images longer than this; 0 is no limit."""
    encode_quality: int = 95
    """JPEG quality of what is encoded anew: scaled images and formats other than JPEG."""
    samples_per_shard: int = 10_000
    """URLs per shard."""
    processes: int = 0
    """Shards at a time; 0 takes one per CPU."""
    threads: int = 64
    """Downloads at a time in each process."""
    timeout_sec: int = 10
    """Give up on a server that is silent for so long."""
    passes: int = 2
    """Further attempts at what failed for a reason that may pass."""
    pause_sec: float = 10.0
    """Wait before each of them."""
    user_agent_token: str = ""
    """Your crawler's name, sent to servers; X-Robots-Tag may address it."""
    min_success_frac: float = 0.0
    """Exit with status 1 when a smaller share of the URLs was downloaded."""

    def __post_init__(self) -> None:
        for name in ("samples_per_shard", "threads", "timeout_sec"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        for name in ("image_size", "min_side", "max_aspect_ratio", "processes", "passes"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative")
        if not 0 <= self.encode_quality <= 100:
            raise ValueError("--encode-quality must be between 0 and 100")
        if not 0 <= self.min_success_frac <= 1:
            raise ValueError("--min-success-frac must be between 0 and 1")
        if self.pause_sec < 0:
            raise ValueError("--pause-sec must not be negative")


def download(config: DownloadConfig) -> float:
    """Run a job to its end and print what became of the URLs.

    Returns:
        the share of the URLs that was downloaded.

    Raises:
        UserError: the list, the destination or the environment is not as it should be.
    """
    python = find_interpreter()
    out = _find_destination(config.out)
    url_list = read_url_list(config.urls, config.url_col, config.caption_col)
    with writing_job(out):
        _agree_on_plan(config, url_list, out)
        try:
            outcomes = _run_passes(config, url_list, out, python)
        except (KeyboardInterrupt, SystemExit):
            remove_unfinished(out)
            print("download: stopped; the same command resumes", file=sys.stderr)
            raise
        write_table(out / NOTES / "outcomes.parquet", outcomes)
    return _report(config, url_list, out, count_outcomes(outcomes))


def _find_destination(url: str) -> Location:
    if any(sign.isspace() or sign in "*?[]{}'" for sign in url):
        wanted = "a name without white space, quotes and *?[]{}: `make precompute` reads a pattern"
        raise UserError("--out", repr(url), wanted=wanted)
    out = location(url)
    return out if is_remote(out) else out.absolute()


def _agree_on_plan(config: DownloadConfig, url_list: UrlList, out: Location) -> None:
    """Note what the destination is made from, or refuse one that is made from something else."""
    plan = {name: getattr(config, name) for name in _SHARED}
    plan |= {"urls": url_list.sha256, "num_urls": url_list.table.num_rows}
    where = out / NOTES / "plan.json"
    try:
        found = json.loads(read_bytes(where))
    except FileNotFoundError:
        _refuse_strangers(out)
        write_table(out / NOTES / "list.parquet", url_list.table)
        write_text_whole(where, json.dumps(plan, indent=1, sort_keys=True) + "\n")
        return
    except ValueError as error:
        raise UserError(where, f"cannot be read ({error})", wanted="the notes on a job") from None
    options = [f"--{name.replace('_', '-')}" for name in plan if found.get(name) != plan[name]]
    if options:
        raise UserError(
            out,
            f"was begun with another {', '.join(options)}",
            wanted="the list and the settings that it was begun with",
            remedy="name another --out, or repeat the first command",
        )


def _refuse_strangers(out: Location) -> None:
    endings = (".tar", ".json", ".parquet")
    strangers = [name for name in list_files(out) if name.endswith(endings)]
    if strangers:
        wanted = "an empty folder, or one that this command began to fill"
        raise UserError(out, f"holds {strangers[0]}", wanted=wanted, remedy="name another --out")


def _run_passes(config: DownloadConfig, url_list: UrlList, out: Location, python: Path) -> pa.Table:
    """The list once, then what failed in passing, until nothing is left; the outcomes."""
    import pyarrow.compute as pc

    first_pass = set(range(math.ceil(url_list.table.num_rows / config.samples_per_shard)))
    before: list[str] | None = None
    while True:
        finished = remove_unfinished(out)
        if finished == before:
            raise UserError(
                out,
                "img2dataset finished no shard; why stands above",
                remedy="run the same command again, with less --processes or --threads where "
                "memory is short",
            )
        before = finished
        if first_pass - {int(shard) for shard in finished}:
            run_img2dataset(python, arguments(config, url_list, out, "list", "incremental"))
            continue
        outcomes = read_outcomes(out, finished)
        again = worth_another_attempt(outcomes, 1 + config.passes)
        if not len(again):
            return outcomes
        print(f"{len(again):,} URLs failed for reasons that may pass: trying again", flush=True)
        rows = url_list.table.filter(pc.is_in(url_list.table["url"], again))
        write_table(out / NOTES / "retry.parquet", rows)
        time.sleep(config.pause_sec)
        run_img2dataset(python, arguments(config, url_list, out, "retry", "extend"))


def _report(
    config: DownloadConfig, url_list: UrlList, out: Location, counts: Counter[str]
) -> float:
    """Print what became of the URLs, and how to go on."""
    total = url_list.table.num_rows
    downloaded, opted_out = counts.pop(SUCCESS, 0), counts.pop(OPTED_OUT, 0)
    lost = total - downloaded - opted_out - counts.total()
    failed = [*counts.most_common(), *([("lost by img2dataset", lost)] if lost else [])]
    print(f"\n{total:,} URLs in {config.urls}")
    for text, count in [("downloaded", downloaded), *failed, (OPTED_OUT, opted_out)]:
        print(f"  {count:>12,}  {count / total:>6.1%}  {text}")
    if url_list.num_duplicates or url_list.num_no_address:
        print(
            f"not tried: {url_list.num_duplicates:,} rows that repeat a URL, "
            f"{url_list.num_no_address:,} without an http(s) address"
        )
    print(f"each URL's last outcome: {out / NOTES / 'outcomes.parquet'}")
    if not url_list.has_captions:
        print("note: the list has no captions, and `make precompute` drops images without one")
    if downloaded:
        print(f"continue with: make precompute SHARDS='{out}/*.tar'")
    return downloaded / total


def _end(number: int, _frame: Any) -> None:
    raise SystemExit(0 if number == signal.SIGTERM else 128 + number)


def main(argv: list[str] | None = None) -> None:
    """Parse, run, judge."""
    config = tyro.cli(DownloadConfig, args=argv, prog="python -m precompute.download")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    with reported("download"):
        success_frac = download(config)
    if success_frac == 0 or success_frac < config.min_success_frac:
        wanted = f"at least {config.min_success_frac:.1%}" if success_frac else "one at least"
        print(f"download: {success_frac:.1%} downloaded; wanted {wanted}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
