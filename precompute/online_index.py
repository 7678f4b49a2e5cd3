"""Which samples of image shards can be trained on: found once, before a run, from their headers.

Stage 1 judges while it decodes; here nothing is decoded before a step needs it, so this goes
through the shards once, at the speed of the disk, and reads what an image says of itself.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from precompute.online_samples import OnlineSamples, ShardRows, counted
from precompute.pixels import Picture, UnusableImageError
from precompute.progress import Progress
from precompute.transform import Crop
from shards.canonical import canonical_json
from shards.column import ImageColumn
from shards.errors import UserError
from shards.find_shards import find_shards
from shards.image_index import ShardIndex
from shards.image_sample import ImageSample
from shards.order import SampleOrder
from shards.source_shard import SourceShard

_Indexed = tuple[ShardRows, Counter[str]]


def index_samples(
    patterns: str,
    column: ImageColumn,
    *,
    seed: int,
    global_batch_size: int,
    num_partitions: int,
    window: int,
    num_threads: int,
    caption_field: str = "",
    say: Callable[[str], object] = print,
    quiet: bool = False,
) -> OnlineSamples:
    """The usable samples of image shards, in the order that their latents would have.

    Args:
        patterns: as `find_shards` takes them.
        column: what is to be made of the images.
        seed: of the order.
        global_batch_size: samples per step over all processes.
        num_partitions: see `shards.order`.
        window: shuffle window in samples.
        num_threads: shards that are gone through at a time.
        caption_field: see `ShardStream`.
        say: takes a line for the user.
        quiet: another process of the run shows progress, and says what was left out.

    Raises:
        UserError: no shards there, one that cannot be read by position, or too few usable samples.
    """
    sources, gaps = find_shards(patterns)
    if gaps and not quiet:
        say(f"online: {len(gaps)} shards of the pattern do not exist: {gaps[0]}, …")
    indexed = _index_all(sources, column, num_threads, caption_field, quiet)
    left_out = sum((reasons for _, reasons in indexed), Counter[str]())
    shards = [rows for rows, _ in indexed]
    lengths = np.array([len(shard.rows) for shard in shards], dtype=np.int64)
    num_samples = int(lengths.sum())
    if not num_samples:
        raise UserError(
            patterns,
            f"no sample that can be trained on ({counted(left_out)})",
            wanted=f"images of {column.resolution} px or more with captions",
            remedy="a smaller --resolution, or other shards",
        )
    if not quiet:
        reasons = f"; left out: {counted(left_out)}" if left_out else ""
        say(f"online: {num_samples:,} samples in {len(shards):,} image shards{reasons}")
    order = SampleOrder(
        lengths,
        seed=seed,
        global_batch_size=global_batch_size,
        num_partitions=num_partitions,
        window=window,
    )
    identity = _identity([shard.name for shard in shards], lengths, order)
    return OnlineSamples(lambda shard: shards[shard], lengths, order, identity, say)


def _index_all(
    sources: list[SourceShard],
    column: ImageColumn,
    num_threads: int,
    caption_field: str,
    quiet: bool,
) -> list[_Indexed]:
    index = partial(_index_shard, column=column, caption_field=caption_field)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="index") as pool:
        results = pool.map(index, sources)  # is in the order of the shards
        if quiet:
            return list(results)
        indexed, progress = [], Progress(sources)
        try:
            for source, (rows, reasons) in zip(sources, results, strict=True):
                indexed.append((rows, reasons))
                progress.count(len(rows.index))
                progress.finish_shard(source)
        finally:
            progress.close()
    return indexed


def _index_shard(source: SourceShard, column: ImageColumn, caption_field: str) -> _Indexed:
    """A shard's usable rows, and why the others are not."""
    index, crop = ShardIndex(source.url, caption_field), Crop.of_column(column)
    reasons = [_reason_against(index.read(row), crop) for row in range(len(index))]
    usable = np.flatnonzero([not reason for reason in reasons]).astype(np.int32)
    return ShardRows(source.name, index, usable), Counter(filter(None, reasons))


def _reason_against(sample: ImageSample, crop: Crop) -> str:
    """Why a sample cannot be trained on, in stage 1's words; empty where its header says it can."""
    if sample.problem:
        return sample.problem
    assert sample.image is not None
    try:
        picture = Picture(sample.image)
        picture.expect_usable()
    except UnusableImageError as error:
        return error.reason
    return "" if crop.place(picture.width, picture.height) else "too_small"


def _identity(names: list[str], lengths: np.ndarray, order: SampleOrder) -> str:
    """Hash of all that the sequence of samples depends on."""
    facts = {
        "shards": names,
        "lengths": lengths.tolist(),
        "seed": order.seed,
        "global_batch_size": order.global_batch_size,
        "num_partitions": order.num_partitions,
        "window": order.window,
    }
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:16]
