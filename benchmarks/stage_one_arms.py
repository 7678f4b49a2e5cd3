"""The two ways of doing stage 1 that are held against each other, and ours stage by stage."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from precompute.decoding import DecodedSample, DecodePool
from precompute.filters import Filter
from precompute.image_rows import ImageRows
from precompute.shard_job import Tools, encode_shard
from precompute.shard_task import ShardTask
from precompute.text_encoder import TextStates
from precompute.text_rows import encode_captions
from precompute.time_account import TimeAccount
from precompute.transform import Crop
from precompute.worker import open_decoded_here
from precompute.worker_spec import SHARDS_IN_HAND, WorkerSpec
from shards.arrays import Arrays, save_arrays
from shards.column import ColumnSpec, ImageColumn, TextColumn
from shards.image_shards import ShardStream
from shards.source_shard import SourceShard
from shards.storage import write_whole


class NullImageEncoder:
    """Takes no time and gives zeros, so that what is left is the work of the CPUs.

    Its device is torch's `meta`: the pixels' way to a device, and what is done to them there, cost
    nothing, as on a GPU that is never behind.
    """

    device = torch.device("meta")
    has_posterior = is_exact = True

    def __init__(self, downsample_factor: int, channels: int) -> None:
        self._factor, self._channels = downsample_factor, channels

    def launch(self, pixel_values: Tensor) -> Tensor:
        """Moments [B, 2C, h, w] of zeros."""
        batch, _, height, width = pixel_values.shape
        return torch.zeros(batch, self._channels, height // self._factor, width // self._factor)

    def record_event(self) -> Any:
        """It is done."""
        return None


@dataclass(frozen=True)
class _Alarm:
    """An event of a paced device."""

    at: float

    def synchronize(self) -> None:
        """Wait for it."""
        time.sleep(max(0.0, self.at - time.perf_counter()))


class PacedImageEncoder(NullImageEncoder):
    """Takes a fixed time for a pixel, in which the CPUs are free: a device of a known speed.

    Args:
        sec_per_pixel: of an image.
    """

    def __init__(self, downsample_factor: int, channels: int, sec_per_pixel: float) -> None:
        super().__init__(downsample_factor, channels)
        self._sec_per_pixel = sec_per_pixel
        self._done_at = 0.0
        self.busy_sec = 0.0

    def launch(self, pixel_values: Tensor) -> Tensor:
        """Moments [B, 2C, h, w] of zeros, that are there after a while: behind the last ones."""
        batch, _, height, width = pixel_values.shape
        seconds = batch * height * width * self._sec_per_pixel
        self._done_at = max(self._done_at, time.perf_counter()) + seconds
        self.busy_sec += seconds
        return super().launch(pixel_values)

    def record_event(self) -> _Alarm:
        """Goes off when the last batch is done."""
        return _Alarm(self._done_at)


class NullTextEncoder:
    """Real token ids, and states of zeros."""

    def __init__(self, tokenizer: Any, column: TextColumn) -> None:
        self.tokenize = tokenizer.tokenize
        self._shape = (column.num_tokens, column.dim)

    def encode(self, input_ids: np.ndarray) -> TextStates:
        """States [B, T, D]."""
        return TextStates(torch.zeros(len(input_ids), *self._shape), None)


@dataclass(frozen=True)
class StageOne:
    """One and the same job for every arm.

    Args:
        sources: the image shards.
        columns: image columns, and a text column.
        tools: with the encoders; `dataset` and `open_decoded` are each arm's own.
    """

    sources: list[SourceShard]
    columns: list[ColumnSpec]
    tools: Tools

    @property
    def images(self) -> list[ImageColumn]:
        """The image columns."""
        return [column for column in self.columns if isinstance(column, ImageColumn)]

    @property
    def text(self) -> TextColumn:
        """The text column."""
        return next(column for column in self.columns if isinstance(column, TextColumn))


def run_ours(job: StageOne, spec: WorkerSpec, out: Path) -> dict[str, float]:
    """The pipeline, as `run_here` runs it; busy seconds by stage."""
    total = TimeAccount()
    here = partial(torch.set_num_threads, torch.get_num_threads())  # each thread has its own
    with (
        DecodePool(spec.decode_workers) as pool,
        ThreadPoolExecutor(SHARDS_IN_HAND, initializer=here) as shards,
    ):
        tools = replace(job.tools, dataset=out, open_decoded=partial(open_decoded_here, spec, pool))
        tasks = [ShardTask(source=source, columns=job.columns) for source in job.sources]
        for account in shards.map(lambda task: encode_shard(task, tools), tasks):
            total.add(account.seconds)
    return total.seconds


def run_naive(job: StageOne, out: Path, batch_size: int) -> int:
    """One thing after another: PIL, a decode for each resolution, encode, write.

    As published trainers prepare their data, at our batch size instead of 1: all images at all
    resolutions, the small ones enlarged; those are then thrown away, and all captions encoded.

    Returns:
        images that were encoded and thrown away.
    """
    out.mkdir(parents=True)
    wasted = 0
    for source in job.sources:
        samples = list(_read_samples(source.url))
        stored: dict[str, Any] = {}
        for column in job.images:
            parts = []
            for start in range(0, len(samples), batch_size):
                batch = samples[start : start + batch_size]
                found = [_naive_pixel_values(image, column.resolution) for image, _ in batch]
                large = [is_large for _, is_large in found]
                moments = _naive_moments(job.tools.image, torch.stack([p for p, _ in found]))
                parts.append(moments[large])
                wasted += large.count(False)
            stored[f"moments_{column.resolution}"] = np.concatenate(parts)
        captions = [caption for _, caption in samples]
        encoder = job.tools.text[job.text.part]
        states = [
            encoder.encode(encoder.tokenize(captions[start : start + batch_size])).states
            for start in range(0, len(captions), batch_size)
        ]
        stored["states"] = torch.cat(states).half().cpu().numpy()
        np.savez(out / f"{source.name}.npz", **stored)
    return wasted


def _naive_moments(encoder: Any, pixel_values: Tensor) -> np.ndarray:
    moments = encoder.launch(pixel_values.to(encoder.device))
    half: np.ndarray = moments.half().cpu().numpy()
    return half


def _read_samples(url: str) -> Iterator[tuple[bytes, str]]:
    with tarfile.open(url) as tar:
        parts: dict[str, bytes] = {}
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            parts[member.name.rsplit(".", 1)[1]] = file.read()
            if len(parts) == 3:  # jpg, json, txt
                yield parts["jpg"], json.loads(parts["json"])["caption"]
                parts = {}


def _naive_pixel_values(data: bytes, resolution: int) -> tuple[Tensor, bool]:
    """`pixel_values` [3, H, W], and whether the image was large enough."""
    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGB")
    shortest = min(image.size)
    width, height = (round(side * resolution / shortest) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    image = image.crop((left, top, left + resolution, top + resolution))
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    return values.contiguous(), shortest >= resolution


def stages_alone(job: StageOne, spec: WorkerSpec, out: Path) -> dict[str, float]:
    """Seconds that each stage of ours takes when nothing else runs."""
    crops = [Crop.of_column(column) for column in job.images]
    seconds = {"read": _timed(lambda: [list(ShardStream(s)) for s in job.sources])[0]}
    seconds["read, decode, transform"], decoded = _timed(lambda: _decode_all(job, spec, crops))
    seconds["encode"], encoded = _timed(lambda: [_encode(job, shard) for shard in decoded])
    seconds["write"], _ = _timed(lambda: _write(out, encoded))
    return seconds


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def _decode_all(job: StageOne, spec: WorkerSpec, crops: list[Crop]) -> list[list[DecodedSample]]:
    found = []
    with DecodePool(spec.decode_workers) as pool:
        for source in job.sources:
            with closing(open_decoded_here(spec, pool, source, crops)) as decoded:
                found.append(list(decoded))
    return found


def _encode(job: StageOne, decoded: list[DecodedSample]) -> list[Arrays]:
    account, tools = TimeAccount(), job.tools
    assert tools.image is not None
    rows = [ImageRows(column, tools.image, tools.batch_size, account) for column in job.images]
    for at, sample in enumerate(decoded):
        for number, crop in sample.crops.items():
            rows[number].add(at, *crop)
    for image in rows:
        image.flush()
    ledger = [sample.row for sample in decoded]
    encoder = tools.text[job.text.part]
    texts, _ = encode_captions(tools.dataset, job.text, ledger, encoder, account)
    return [*(image.arrays() for image in rows), texts]


def _write(out: Path, shards: list[list[Arrays]]) -> None:
    for number, columns in enumerate(shards):
        for column, arrays in enumerate(columns):
            path = out / f"{column}-{number}.safetensors"
            write_whole(path, partial(save_arrays, arrays=arrays))


def no_tools(batch_size: int) -> Tools:
    """Tools without encoders; each measurement brings its own, each run a dataset of its own."""

    def not_open(*_: object) -> Any:
        raise AssertionError("an arm opens its own")

    return Tools(
        dataset=Path(),
        image=None,
        text={},
        model_name="",
        wanted=Filter(""),
        caption_field="",
        batch_size=batch_size,
        decode_workers=1,
        open_decoded=not_open,
    )
