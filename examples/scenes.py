"""Draws captioned scenes into image shards, laid out as img2dataset lays them out.

    python -m examples.scenes --out data/scenes
    python -m examples.scenes --out data/pairs --grammar pairs --num-train 20000 --resolution 256

Writes, for each of the splits `train` and `held_out`:

    <out>/<split>/00000.tar         <key>.jpg, <key>.txt, <key>.json per sample
    <out>/<split>/00000.parquet     one row per sample: key, caption, url, width, height, ...
    <out>/<split>/00000_stats.json  counts
    <out>/scenes.json               the arguments, written last

The same arguments give the same bytes. The n-th sample does not depend on how many there are,
so a larger data set begins with the smaller one. No caption of `held_out` occurs in `train`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import sys
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.grammar import GRAMMARS, SPLITS, Grammar, Split, caption_of, sample_scene
from examples.render import render

RECORD = "scenes.json"
# With full chroma, colours keep within a few levels of the palette even at sharp edges.
JPEG_OPTIONS: dict[str, Any] = {"format": "JPEG", "quality": 95, "subsampling": 0}


@dataclass(frozen=True, kw_only=True)
class SceneDataset:
    """What is drawn; the whole content follows from it."""

    num_train: int = 6000
    num_held_out: int = 600
    resolution: int = 64
    grammar: Grammar = "single"
    seed: int = 0
    shard_size: int = 1000

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be written."""
        for name in ("num_train", "num_held_out", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.shard_size < 1:
            raise ValueError(f"shard_size must be 1 or more, got {self.shard_size}")
        if self.resolution < 32:
            raise ValueError(f"resolution must be 32 or more, got {self.resolution}")
        if self.grammar not in GRAMMARS:
            raise ValueError(f"grammar must be one of {', '.join(GRAMMARS)}, got {self.grammar!r}")

    def num_samples(self, split: Split) -> int:
        """Return the number of samples of a split."""
        return self.num_train if split == "train" else self.num_held_out

    def num_shards(self, split: Split) -> int:
        """Return the number of shards of a split."""
        return math.ceil(self.num_samples(split) / self.shard_size)


def write_scenes(out: Path, dataset: SceneDataset) -> bool:
    """Write all shards; return False where they are there already.

    Raises:
        ValueError: The folder holds other shards, or scenes drawn with other arguments.
    """
    record = out / RECORD
    if record.exists():
        found = json.loads(record.read_text(encoding="utf-8"))
        if found != asdict(dataset):
            raise ValueError(
                f"{record}: drawn with {found}, wanted {asdict(dataset)}; "
                "choose another --out or remove the folder"
            )
        if all(path.exists() for path in _expected_files(out, dataset)):
            return False
    expected = set(_expected_files(out, dataset))
    strangers = sorted(set(out.glob("*/*.tar")) - expected)
    if strangers:
        raise ValueError(
            f"{strangers[0]}: a shard that these arguments do not draw would be read as theirs; "
            "choose another --out or remove the folder"
        )
    for split in SPLITS:
        (out / split).mkdir(parents=True, exist_ok=True)
        for shard_idx in range(dataset.num_shards(split)):
            _write_shard(out / split, dataset, split, shard_idx)
    text = json.dumps(asdict(dataset), indent=2) + "\n"
    _write_whole(record, lambda path: path.write_text(text, encoding="utf-8"))
    return True


def _expected_files(out: Path, dataset: SceneDataset) -> list[Path]:
    return [
        out / split / f"{shard_idx:05d}{ending}"
        for split in SPLITS
        for shard_idx in range(dataset.num_shards(split))
        for ending in (".tar", ".parquet", "_stats.json")
    ]


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file of another name, then rename: a visible file is a complete one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_shard(folder: Path, dataset: SceneDataset, split: Split, shard_idx: int) -> None:
    first = shard_idx * dataset.shard_size
    count = min(dataset.shard_size, dataset.num_samples(split) - first)
    # img2dataset's keys: five digits of shard number, then as many as count one shard's samples.
    digits = math.ceil(math.log10(dataset.shard_size)) if dataset.shard_size > 1 else 1
    samples = [
        _draw_sample(dataset, split, first + i, f"{shard_idx:05d}{i:0{digits}d}")
        for i in range(count)
    ]
    rows = [row for _, row in samples]
    name = f"{shard_idx:05d}"
    _write_whole(folder / f"{name}.tar", lambda path: _write_tar(path, samples))
    _write_whole(folder / f"{name}.parquet", lambda path: _write_parquet(path, rows))
    stats = {
        "count": count,
        "successes": count,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": 0.0,
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": {"success": count},
    }
    text = json.dumps(stats, indent=4)
    _write_whole(
        folder / f"{name}_stats.json", lambda path: path.write_text(text, encoding="utf-8")
    )


def _draw_sample(
    dataset: SceneDataset, split: Split, index: int, key: str
) -> tuple[bytes, dict[str, Any]]:
    """Draw one sample, from its own generator; return the image file and the metadata."""
    rng = np.random.default_rng([dataset.seed, SPLITS.index(split), index])
    scene = sample_scene(dataset.grammar, split, rng)
    buffer = io.BytesIO()
    render(scene, rng, dataset.resolution).save(buffer, **JPEG_OPTIONS)
    image = buffer.getvalue()
    return image, {
        "caption": caption_of(scene),
        "url": f"scene:{dataset.grammar}/{dataset.seed}/{split}/{index}",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": dataset.resolution,
        "height": dataset.resolution,
        "original_width": dataset.resolution,
        "original_height": dataset.resolution,
        "exif": "{}",
        "sha256": hashlib.sha256(image).hexdigest(),
    }


def _write_tar(path: Path, samples: list[tuple[bytes, dict[str, Any]]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for image, row in samples:
            members = {
                "jpg": image,
                "txt": row["caption"].encode(),
                "json": json.dumps(row, indent=4).encode(),
            }
            for ending, content in members.items():
                info = tarfile.TarInfo(f"{row['key']}.{ending}")  # time 0: same bytes each time
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    int_columns = {"width", "height", "original_width", "original_height"}
    schema = pa.schema(
        [(name, pa.int32() if name in int_columns else pa.string()) for name in rows[0]]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def parse_args(argv: list[str] | None = None) -> tuple[Path, SceneDataset]:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.scenes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = SceneDataset()
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--num-train", type=int, default=default.num_train)
    parser.add_argument("--num-held-out", type=int, default=default.num_held_out)
    parser.add_argument("--resolution", type=int, default=default.resolution, help="side in pixels")
    parser.add_argument("--grammar", choices=GRAMMARS, default=default.grammar)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--shard-size", type=int, default=default.shard_size, help="samples a tar")
    args = vars(parser.parse_args(argv))
    out = args.pop("out")
    try:
        return out, SceneDataset(**args)
    except ValueError as error:
        parser.error(str(error))


def main(argv: list[str] | None = None) -> int:
    """Write the shards the command line asks for."""
    out, dataset = parse_args(argv)
    try:
        written = write_scenes(out, dataset)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    counts = ", ".join(
        f"{dataset.num_samples(split)} {split} in {dataset.num_shards(split)} shards"
        for split in SPLITS
    )
    print(f"{out}: {'wrote' if written else 'already complete, nothing to do:'} {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
