"""One form for every result: what ran, where, and the numbers with their spread."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from shards.canonical import canonical_json
from shards.storage import write_text_whole

_GPU_FIELDS = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    low, median, high = np.percentile(np.asarray(values), [10, 50, 90])
    return {"median": float(median), "p10": float(low), "p90": float(high)}


def environment() -> dict[str, Any]:
    """The machine, the versions and the commit that a result belongs to."""
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "device": torch.cuda.get_device_name() if on_gpu else _cpu_name(),
        "gpu": gpu_state(*_GPU_FIELDS),
        "num_cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": _versions("torch", "diffusers", "transformers", "accelerate", "xformers"),
    }


def gpu_state(*fields: str) -> dict[str, str]:
    """What nvidia-smi says of the current CUDA device; nothing where there is none to ask.

    Args:
        fields: as `nvidia-smi --help-query-gpu` names them.
    """
    import torch

    if not torch.cuda.is_available():
        return {}
    which = f"--id=GPU-{torch.cuda.get_device_properties().uuid}"
    query = [which, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return {}
    if done.returncode:
        return {}
    values = [value.strip() for value in done.stdout.split(",")]
    return dict(zip(fields, values, strict=True))


def _versions(*names: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _git(*arguments: str) -> str:
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown CPU"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown CPU"


def publish(result: dict[str, Any], out: str) -> None:
    """Write the result to a file where one is named, and print it as the last line."""
    if out:
        write_text_whole(Path(out), canonical_json(result))
    print(json.dumps(result), flush=True)
