"""Runs img2dataset: a script for the interpreter of its environment, which has nothing of ours.

`python -P download_runner.py <parent's process id> <img2dataset's settings as JSON>`
"""

from __future__ import annotations

import ctypes
import importlib
import json
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

# img2dataset imports W&B, which we never ask for. Without it every process, for each of which this
# file is loaded again, starts in two thirds of the time, and nothing can phone home.
sys.modules["wandb"] = ModuleType("wandb")


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to kill this process when its parent ends.

    An orphan would go on writing shards while the next attempt writes them too. Linux alone has
    this; elsewhere only a `kill -9` of the parent leaves orphans.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)  # it ended before we asked


class NoLogger:
    """Stands in for img2dataset's logger, a process that counts earlier passes' shards as well."""

    def __init__(self, *_arguments: object) -> None:
        self.done_shards: set[int] = set()

    def start(self) -> None:
        """It has nothing to start."""

    def join(self) -> None:
        """It has nothing to wait for."""


def run_shards(
    processes: int,
    downloader: Any,
    shards: Iterable[tuple[int, str]],
    _subjob_size: int,
    _max_shard_retry: int,
) -> None:
    """Download shards, each in a process of its own; stands in for img2dataset's distributor.

    img2dataset's own is a `multiprocessing.Pool`, which waits for ever when a worker was killed,
    as the kernel does when memory runs out.

    Raises:
        RuntimeError: a process died.
    """
    from tqdm import tqdm

    context = multiprocessing.get_context("spawn")
    waiting = list(shards)
    running: dict[Any, tuple[int, BaseProcess]] = {}
    counts: Counter[str] = Counter()
    seconds_between_lines = 1 if sys.stderr.isatty() else 10
    with tqdm(total=len(waiting), unit="shard", mininterval=seconds_between_lines) as bar:
        while waiting or running:
            while waiting and len(running) < processes:
                shard = waiting.pop(0)
                started = context.Process(
                    target=download_shard, args=(downloader, shard), daemon=True
                )
                started.start()
                running[started.sentinel] = (shard[0], started)
            for sentinel in wait(list(running)):
                number, process = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    raise RuntimeError(f"a process of img2dataset ended with {process.exitcode}")
                counts.update(_read_counts(downloader, number))
                text = f"{counts['successes']:,} images of {counts['count']:,} URLs"
                bar.set_postfix_str(text, refresh=False)
                bar.update()


def download_shard(downloader: Any, shard: tuple[int, str]) -> None:
    """What a process for one shard does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    die_with_parent(parent.pid)
    downloader(shard)


def _read_counts(downloader: Any, number: int) -> dict[str, int]:
    """How many URLs a shard has, and how many gave an image; nothing where it failed."""
    import fsspec

    name = f"{number:0{downloader.oom_shard_count}d}_stats.json"
    filesystem, folder = fsspec.core.url_to_fs(downloader.output_folder)
    try:
        stats = json.loads(filesystem.cat_file(f"{folder}/{name}"))
    except FileNotFoundError:  # what went wrong is printed already
        return {}
    return {key: stats[key] for key in ("count", "successes")}


def main() -> None:
    """Run img2dataset to its end, with two of its parts replaced."""
    # The package has a function of its module's name: `import img2dataset.main` gives that.
    img2dataset: Any = importlib.import_module("img2dataset.main")
    parts = {"multiprocessing_distributor": run_shards, "LoggerProcess": NoLogger}
    for name, ours in parts.items():
        assert hasattr(img2dataset, name)
        setattr(img2dataset, name, ours)
    img2dataset.download(**json.loads(sys.argv[2]))


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    main()
