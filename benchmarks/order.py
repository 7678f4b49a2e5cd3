"""Open and seek in a dataset of hundreds of millions of samples, and measure its shuffle.

A synthetic dataset.json of that size is written, and opened in a process of its own as training
would open it. How well the order shuffles is measured on the same order: how long one shard's
samples take to pass, and how many shards a batch is mixed from, for several windows.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.result import result, spread
from shards.arrays import save_arrays
from shards.canonical import canonical_json
from shards.column import FORMAT_VERSION, ColumnSpec, ImageColumn, Json, TextColumn
from shards.dataset import Dataset
from shards.layout import MANIFEST, column_path
from shards.order import DEFAULT_WINDOW, SampleOrder, choose_partitions
from shards.reader import LatentReader
from shards.receipt import NULL, Receipt, commit
from shards.storage import write_text_whole

_EPOCH = 3
_WINDOWS = (4096, DEFAULT_WINDOW, 65_536, 262_144)


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """Open a synthetic manifest, seek in its order, and measure the quality of the shuffle."""

    num_samples: int = 400_000_000
    """Samples of the dataset."""
    num_shards: int = 40_000
    """Shards of the dataset."""
    global_batch_size: int = 2048
    """Samples per step."""
    world_size: int = 8
    """Processes; the first one's share is what is located."""
    repeats: int = 5
    """Processes that open the dataset one after the other."""
    out: str = ""
    """File of the result; default: its place in benchmarks/results; `-`: none."""


def measure(config: OrderConfig) -> Json:
    """Run the benchmark and return the result document."""
    with tempfile.TemporaryDirectory(prefix="latentmill-") as folder:
        start = time.perf_counter()
        write_synthetic(Path(folder), config)
        written_sec = time.perf_counter() - start
        manifest_bytes = (Path(folder) / MANIFEST).stat().st_size
        runs = [_open_in_a_process(folder, config) for _ in range(config.repeats)]
    figures: Json = {name: spread([run[name] for run in runs]) for name in runs[0]}
    return result(
        "order",
        config,
        manifest_bytes=manifest_bytes,
        manifest_written_sec=round(written_sec, 2),
        runs=runs,
        **figures,
        shuffle=[measure_shuffle(config, window) for window in _WINDOWS],
    )


def write_synthetic(folder: Path, config: OrderConfig) -> None:
    """A dataset.json over shards that are not there, and the states of the empty caption."""
    encoder: Json = {"encoder_config": {}, "weights_sha256": "0" * 64}
    encoder |= {"compute_dtype": "float16", "storage_dtype": "float16"}
    image = ImageColumn(
        **encoder,
        resolution=512,
        latent_channels=4,
        latent_size=64,
        scaling_factor=0.18215,
        transform={},
    )
    text = TextColumn(**encoder, num_tokens=77, dim=1024, tokenizer_sha256="0" * 64)
    lengths = np.diff(np.linspace(0, config.num_samples, config.num_shards + 1).astype(np.int64))

    def shards(row_bytes: int) -> dict[str, Json]:
        return {
            f"{number:05d}": {
                "rows": int(rows),
                "rows_in": int(rows),
                "bytes": int(rows) * row_bytes,
                "sha256": f"{number:064x}",
            }
            for number, rows in enumerate(lengths)
        }

    def column(spec: ColumnSpec, row_bytes: int, stats: Json) -> Json:
        rest = {"shards": shards(row_bytes), "absent": {}, "stats": stats}
        return {"spec": spec.to_json(), "model": "synthetic", **rest}

    manifest = {
        "format_version": FORMAT_VERSION,
        "caption_field": "",
        "ledger": shards(300),
        "columns": {
            image.column_id: column(image, 65_548, {"latent_mean": 0.0, "latent_std": 1.0}),
            text.column_id: column(text, 157_862, {"captions": config.num_samples}),
        },
    }
    write_text_whole(folder / MANIFEST, canonical_json(manifest))
    null = {
        "input_ids": np.zeros(77, np.uint16),
        "states": np.zeros((77, 1024), np.float16),
    }
    facts: Json = {"shard": NULL, "column": text.to_json(), "source": {}, "absent": {}}
    commit(
        column_path(folder, text.column_id, NULL),
        partial(save_arrays, arrays=null),
        lambda written: Receipt(**facts, rows_in=1, rows=1, **written),
    )


def _open_in_a_process(folder: str, config: OrderConfig) -> dict[str, float]:
    program = (
        "import json, sys; from benchmarks.order import OrderConfig, open_and_seek; "
        "print(json.dumps(open_and_seek(sys.argv[1], OrderConfig(**json.loads(sys.argv[2])))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, folder, json.dumps(asdict(config))],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def open_and_seek(folder: str, config: OrderConfig) -> dict[str, float]:
    """What a training process does before its first batch, and what a resumed one does.

    Returns:
        `open_sec`, `seek_sec` to the middle of the fourth epoch (number 3), `next_ms` for the step
        after it, and this process's `peak_rss_mb`.
    """
    start = time.perf_counter()
    dataset = Dataset(folder)
    reader = LatentReader(
        dataset,
        dataset.image_column(512),
        dataset.text_column(),
        seed=0,
        global_batch_size=config.global_batch_size,
        num_partitions=choose_partitions(config.global_batch_size),
    )
    opened = time.perf_counter()
    steps_per_epoch = reader.order.samples_per_epoch / config.global_batch_size
    step = int((_EPOCH + 0.5) * steps_per_epoch)
    positions = range(config.global_batch_size // config.world_size)
    shards, rows = reader.order.locate(step, positions)
    sought = time.perf_counter()
    assert len(shards) == len(rows) == len(positions)
    reader.order.locate(step + 1, positions)
    located = time.perf_counter()
    return {
        "open_sec": opened - start,
        "seek_sec": sought - opened,
        "next_ms": 1000 * (located - sought),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def measure_shuffle(config: OrderConfig, window: int) -> Json:
    """How well the order mixes with one window.

    Returns:
        `steps_of_a_shard`: steps from the first to the last sample of a shard in an epoch;
        `epoch_frac_of_a_shard`: the same as a share of the epoch; `shards_in_a_batch`: distinct
        shards in a global batch; `shards_open_per_rank`: what a rank reads from at a time.
    """
    lengths = np.diff(np.linspace(0, config.num_samples, config.num_shards + 1).astype(np.int64))
    order = SampleOrder(
        lengths,
        seed=0,
        global_batch_size=config.global_batch_size,
        num_partitions=choose_partitions(config.global_batch_size),
        window=window,
    )
    rng = np.random.default_rng(0)
    steps_per_epoch = order.samples_per_epoch / config.global_batch_size
    steps = rng.integers(0, int(steps_per_epoch), 20).tolist()
    positions = range(config.global_batch_size)
    mixed = [len(np.unique(order.locate(step, positions)[0])) for step in steps]
    passing = [_steps_of_a_shard(order, step) for step in steps[:4]]
    share = range(config.global_batch_size // config.world_size)
    return {
        "window": window,
        "steps_of_a_shard": spread(passing),
        "epoch_frac_of_a_shard": spread([steps / steps_per_epoch for steps in passing]),
        "shards_in_a_batch": spread(mixed),
        "shards_open_per_rank": spread([len(next(order.shards_ahead(s, share))[1]) for s in steps]),
    }


def _steps_of_a_shard(order: SampleOrder, step: int) -> int:
    """Steps that the first shard of a step's first partition takes to pass, both ways from it."""
    per_partition = order.global_batch_size // order.num_partitions
    first = range(per_partition)
    shard = order.locate(step, first)[0][0]
    # Its samples lie in the windows that its pieces touch: these and their neighbours.
    reach = 3 * order.window // per_partition + 1
    seen = [
        at
        for at in range(max(step - reach, 0), step + reach)
        if (order.locate(at, first)[0] == shard).any()
    ]
    return seen[-1] - seen[0] + 1


def print_table(document: Json) -> None:
    """The result for people."""
    protocol = document["protocol"]
    print(
        f"{protocol['num_samples']:,} samples in {protocol['num_shards']:,} shards, dataset.json "
        f"{document['manifest_bytes'] / 1e6:.0f} MB"
    )
    for name, unit in (
        ("open_sec", "s"),
        ("seek_sec", "s"),
        ("next_ms", "ms"),
        ("peak_rss_mb", "MB"),
    ):
        value: dict[str, Any] = document[name]
        print(f"  {name:<12}{value['median']:>9.3f} {unit} ({value['p10']:.3f}-{value['p90']:.3f})")
    print(
        f"  {'window':>9}{'steps a shard takes':>21}{'of the epoch':>14}{'shards in a batch':>19}"
        f"{'open per rank':>15}"
    )
    for row in document["shuffle"]:
        print(
            f"  {row['window']:>9,}{row['steps_of_a_shard']['median']:>21,.0f}"
            f"{row['epoch_frac_of_a_shard']['median']:>14.3%}"
            f"{row['shards_in_a_batch']['median']:>19.0f}"
            f"{row['shards_open_per_rank']['median']:>15.0f}"
        )
