"""Latents for other trainers: webdataset tars, or MDS for mosaicml-streaming.

One file for each shard of the dataset (MDS: at most about 1 GiB a file), each written whole; tars
that are there already stay, MDS is written again. A sample has `moments` (or `mean`) and `states`
(or `input_ids`) as float16 (uint16) arrays, int8 multiplied out; its caption; and its row of the
ledger. Latents are unscaled, captions not dropped: what the other trainer must do is in
`export.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shards.arrays import Arrays, repair_remedy
from shards.canonical import canonical_json
from shards.checksum import column_checksums
from shards.column import ImageColumn, Json, TextColumn
from shards.dataset import Column, Dataset
from shards.errors import CorruptFileError, UserError
from shards.layout import ledger_path
from shards.ledger import read_ledger
from shards.mds import MdsShard, index_text
from shards.quantize import latents_of, states_of
from shards.storage import Location, list_files, read_bytes, write_text_whole, write_whole

FORMATS = ("webdataset", "mds")
_SETTINGS = "export.json"
_MDS_PART_BYTES = 2**30


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
    there = list_files(out)
    entries: list[Json] = []
    for shard in sorted(image.shards):
        num_rows = image.shards[shard]["rows"]
        samples = _iter_samples(dataset, image, text, shard)
        if file_format == "mds":
            entries += _write_mds(out, shard, samples)
        elif num_rows and f"{shard}.tar" not in there:
            write_whole(out / f"{shard}.tar", partial(_save_tar, samples=samples))
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
        "to_train": {
            "moments": "sample the posterior from the moments, multiply by scaling_factor",
            "mean": "multiply by scaling_factor",
        }[image.spec.latents]
        + ", drop captions at train time",
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
    _refuse_damage(image, latents, shard)
    _refuse_damage(text, captions, shard)
    null = dataset.read_null(text)
    names = ("key", "caption", "url", "width", "height", "sha256")
    ledger = read_ledger(ledger_path(dataset.path, shard), columns=names)
    for at, row in enumerate(np.asarray(latents["row"]).tolist()):
        caption = int(captions["caption"][row])
        yield {
            # A dot would end the key: webdataset takes what follows for the member's suffix.
            "name": f"{shard.replace('.', '%2E')}-{row:09d}",
            "latents": (image.spec.latents, _latents(latents, image.spec, at)),
            "text": _text(captions, text.spec, null, caption),
            "caption": ledger[row]["caption"],
            "json": {"row": row, "shard": shard, **ledger[row]},
        }


def _refuse_damage(column: Column, arrays: Arrays, shard: str) -> None:
    """What leaves us carries no checksum any more."""
    sums = column_checksums(column.spec, arrays)
    wrong = np.flatnonzero(sums != arrays["checksum"])
    if len(wrong):
        where = column.path_of(shard)
        raise CorruptFileError(
            where, f"row {wrong[0]} does not match its checksum", remedy=repair_remedy(where)
        )


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


def _write_mds(out: Location, shard: str, samples: Iterator[Json]) -> list[Json]:
    """Write one shard's samples in parts that memory holds; their entries in index.json."""
    entries: list[Json] = []

    def write(part: MdsShard) -> None:
        num_bytes: list[int] = []
        write_whole(out / part.base_name, partial(_save_mds, part=part, num_bytes=num_bytes))
        entries.append(part.entry(num_bytes[0]))

    part = MdsShard(f"{shard}.mds")
    for sample in samples:
        if part.num_bytes > _MDS_PART_BYTES:
            write(part)
            part = MdsShard(f"{shard}-{len(entries)}.mds")
        part.add(_flat(sample))
    if part.num_bytes:
        write(part)
    return entries


def _save_mds(path: Path, part: MdsShard, num_bytes: list[int]) -> None:
    part.save(path)
    num_bytes.append(path.stat().st_size)
