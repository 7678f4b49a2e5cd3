"""Latents for other trainers: webdataset tars, or MDS for mosaicml-streaming.

One file for each shard of the dataset, each written whole: the same command again continues. A
sample has `moments` (or `mean`) and `states` (or `input_ids`) as float16 (uint16) arrays, int8
multiplied out; its caption; and its row of the ledger. Latents are unscaled, captions not dropped:
what the other trainer must do is in `export.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shards.arrays import Arrays
from shards.canonical import canonical_json
from shards.column import ImageColumn, Json, TextColumn
from shards.dataset import Column, Dataset, ledger_path
from shards.errors import UserError
from shards.ledger import read_ledger
from shards.mds import MdsShard, index_text
from shards.quantize import latents_of, states_of
from shards.storage import Location, list_files, read_bytes, write_text_whole, write_whole

FORMATS = ("webdataset", "mds")
_SETTINGS = "export.json"


def export(
    dataset: Dataset,
    image: Column[ImageColumn],
    text: Column[TextColumn],
    out: Location,
    file_format: str,
    on_rows: Callable[[int], object] = lambda _: None,
) -> Json:
    """Write all samples that have a row in the image column.

    Args:
        dataset: open dataset.
        image: column of latents.
        text: column of captions.
        out: folder or URL; the same export may continue there, no other.
        file_format: `webdataset` or `mds`.
        on_rows: called with the number of samples of each shard, for a progress bar.

    Returns:
        the settings, as they stand in `export.json`.

    Raises:
        UserError: `out` holds another export.
        DatasetError: the dataset is not complete, or damaged.
    """
    dataset.check_trainable(image, text)
    settings = _settings(image, text, file_format)
    _claim(out, settings)
    suffix = {"webdataset": "tar", "mds": "mds"}[file_format]
    there = list_files(out)
    entries = []
    for shard in sorted(image.shards):
        name, num_rows = f"{shard}.{suffix}", image.shards[shard]["rows"]
        if num_rows and file_format == "webdataset" and name not in there:
            samples = _iter_samples(dataset, image, text, shard)
            write_whole(out / name, partial(_save_tar, samples=samples))
        elif num_rows and file_format == "mds":
            mds = MdsShard(name)
            for sample in _iter_samples(dataset, image, text, shard):
                mds.add(_flat(sample))
            num_bytes: list[int] = []
            write_whole(out / name, partial(_save_mds, shard=mds, num_bytes=num_bytes))
            entries.append(mds.entry(num_bytes[0]))
        on_rows(num_rows)
    if file_format == "mds":
        write_text_whole(out / "index.json", index_text(entries))
    return settings


def _settings(image: Column[ImageColumn], text: Column[TextColumn], file_format: str) -> Json:
    return {
        "format": file_format,
        "image_column": image.column_id,
        "text_column": text.column_id,
        "latents": image.spec.latents,
        "scaling_factor": image.spec.scaling_factor,
        "to_train": "sample the posterior from the moments, multiply by scaling_factor, drop "
        "captions at train time",
        "model": image.model,
        "rows": image.num_rows,
    }


def _claim(out: Location, settings: Json) -> None:
    """Hold a folder for one export."""
    path = out / _SETTINGS
    text = canonical_json(settings)
    if write_text_whole(path, text, replace=False):
        return
    if read_bytes(path) != text.encode():
        raise UserError(out, "holds another export", remedy="name an empty folder")


def _iter_samples(
    dataset: Dataset, image: Column[ImageColumn], text: Column[TextColumn], shard: str
) -> Iterator[Json]:
    latents, captions = image.map_shard(shard), text.map_shard(shard)
    null = dataset.read_null(text)
    names = ("key", "caption", "url", "width", "height", "sha256")
    ledger = read_ledger(ledger_path(dataset.path, shard), columns=names)
    for at, row in enumerate(np.asarray(latents["row"]).tolist()):
        caption = int(captions["caption"][row])
        yield {
            "name": f"{shard}-{row:09d}",
            "latents": (image.spec.latents, _latents(latents, image.spec, at)),
            "text": _text(captions, text.spec, null, caption),
            "caption": ledger[row]["caption"],
            "json": {"row": row, "shard": shard, **ledger[row]},
        }


def _latents(arrays: Arrays, spec: ImageColumn, at: int) -> np.ndarray:
    values = arrays[spec.latents][at]
    if spec.storage_dtype != "int8":
        return np.asarray(values)
    one = slice(at, at + 1)
    numbers = latents_of(arrays[spec.latents][one], arrays["scale"][one]).dequantize()
    return numbers[0].astype(np.float16)


def _text(arrays: Arrays, spec: TextColumn, null: Arrays, at: int) -> tuple[str, np.ndarray]:
    if not spec.has_states:
        return "input_ids", np.asarray(arrays["input_ids"][at])
    one = slice(at, at + 1)
    if spec.storage_dtype != "int8":
        return "states", np.asarray(arrays["states"][at])
    stored = states_of(arrays["states"][one], arrays["scale"][one], null["channel_scale"])
    return "states", stored.dequantize()[0].astype(np.float16)


def _save_tar(path: Path, samples: Iterator[Json]) -> None:
    from webdataset import TarWriter

    with path.open("wb") as file, TarWriter(file, mtime=0) as tar:
        for sample in samples:
            latents, text = sample["latents"], sample["text"]
            tar.write(
                {
                    "__key__": sample["name"],
                    f"{latents[0]}.npy": latents[1],
                    f"{text[0]}.npy": text[1],
                    "txt": sample["caption"],
                    "json": sample["json"],
                }
            )


def _flat(sample: Json) -> dict[str, Any]:
    """A sample as MDS fields; the ledger's row as JSON."""
    (latents, values), (text, states) = sample["latents"], sample["text"]
    row = json.dumps(sample["json"], ensure_ascii=False)
    return {latents: values, text: states, "caption": sample["caption"], "ledger": row}


def _save_mds(path: Path, shard: MdsShard, num_bytes: list[int]) -> None:
    shard.save(path)
    num_bytes.append(path.stat().st_size)
