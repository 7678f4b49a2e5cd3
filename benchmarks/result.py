"""One form for every result: what ran, where, and the numbers with their spread.

    {"format": 1, "theme": "loader", "protocol": {...}, "environment": {...}, ...figures}

`protocol` has the settings, `environment` the machine, the versions and the commit; what else there
is depends on the theme, raw samples beside every median. A result's name is
`benchmarks/results/<theme>_<hardware>_<yyyymm>.json`, the theme with its variant (a preset) where
it has one; within a month a newer one takes its place.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from shards.canonical import canonical_json
from shards.errors import UserError
from shards.storage import write_text_whole

FORMAT = 1
RESULTS = Path(__file__).parent / "results"
NOWHERE = "-"
_KEYS = ("theme", "variant", "protocol", "environment")
_GPU_FIELDS = (
    *("driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory"),
    *("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu"),
)
_PACKAGES = (
    *("torch", "diffusers", "transformers", "accelerate", "xformers", "triton", "safetensors"),
    *("webdataset", "numpy"),
)
# What says nothing of the hardware in its name.
_NOISE = re.compile(
    r"\((r|tm)\)|@.*|\b(nvidia|amd|intel|geforce|cpu|processor|\d+-core)\b", re.IGNORECASE
)


def result(theme: str, config: Any, *, variant: str = "", **figures: Any) -> dict[str, Any]:
    """A result document.

    Args:
        theme: one word for what was measured, with hyphens.
        config: dataclass of the settings.
        variant: what results of the theme do not take each other's place over; a preset.
        figures: what was found.
    """
    facts = {"format": FORMAT, "theme": theme, "variant": variant, "protocol": asdict(config)}
    return {**facts, "environment": environment(), **figures}


def publish(document: dict[str, Any], out: str) -> None:
    """Write a result and print it as the last line, even where it cannot be written.

    Args:
        document: of `result`.
        out: file; empty: its place among the results; `-`: nowhere.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        if out != NOWHERE:
            _write(document, output_file(out) if out else result_path(document))
    finally:
        print(json.dumps(document, allow_nan=False), flush=True)


def _write(document: dict[str, Any], path: Path) -> None:
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    replaced = ""
    if path.exists():
        with suppress(UserError):
            env = read_result(path)["environment"]
            replaced = f", in place of the result of {env['date']} at {env['commit']}"
    write_text_whole(path, canonical_json(document))
    print(f"written to {shown}{replaced}")


def output_file(out: str) -> Path:
    """The file that an `--out` names: what a link points to, and nothing that is no file.

    Raises:
        UserError: it names a folder, a device, or nothing.
    """
    wanted = "a file, or one that is not there yet"
    try:
        path = Path(out).resolve()
    except RuntimeError:  # a loop of links
        raise UserError("--out", f"{out} leads nowhere", wanted=wanted) from None
    if not out or (path.exists() and not path.is_file()):
        raise UserError("--out", out or "empty", wanted=wanted)
    return path


def result_path(document: dict[str, Any]) -> Path:
    """Where a result belongs when nobody says otherwise."""
    env = document["environment"]
    month = env["date"][:7].replace("-", "")
    theme = "-".join(filter(None, (document["theme"], document["variant"])))
    return RESULTS / f"{theme}_{env['hardware']}_{month}.json"


def read_result(path: Path) -> dict[str, Any]:
    """A result from its file.

    Raises:
        UserError: it is none, or of another format.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(path, f"cannot be read: {error}", wanted="a benchmark's result") from error
    if not isinstance(document, dict) or any(key not in document for key in _KEYS):
        raise UserError(path, "is no benchmark's result", wanted=f"a JSON object with {_KEYS}")
    if document.get("format") != FORMAT:
        raise UserError(
            path,
            f"format {document.get('format')}",
            wanted=f"{FORMAT}",
            remedy="measure again with this version",
        )
    return document


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    low, median, high = np.percentile(np.asarray(values), [10, 50, 90])
    return {"median": float(median), "p10": float(low), "p90": float(high)}


# The machine --------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """The machine, the versions and the commit that a result belongs to, as they are now."""
    import torch

    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else _cpu_name()
    num_devices = torch.cuda.device_count() if on_gpu else os.cpu_count() or 1
    own = ":(top,exclude)benchmarks/results"
    return {
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":/", own)),
        "hardware": hardware_name(device, num_devices, on_gpu=on_gpu),
        "device": device,
        "num_devices": num_devices if on_gpu else 0,
        "gpu": gpu_state(*_GPU_FIELDS),
        "num_cpus": os.cpu_count(),
        "cpu": _cpu_name(),
        "cpu_mhz": _cpu_mhz(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # of the last minute: ours is in it
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "versions": versions(*_PACKAGES),
    }


def hardware_name(device: str, count: int, *, on_gpu: bool) -> str:
    """For file names: `h200`, `8xa100-sxm4-80gb`, `epyc-2cpu`.

    Args:
        device: as its maker calls it.
        count: GPUs, or CPUs where there are none.
        on_gpu: which of the two.
    """
    bare = _NOISE.sub(" ", device)
    slug = "-".join(re.findall(r"[a-z0-9.]+", bare.lower())) or "unknown"
    if on_gpu:
        return slug if count == 1 else f"{count}x{slug}"
    return f"{slug}-{count}cpu"


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


def versions(*names: str) -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _git(*arguments: str) -> str:
    root = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _cpu_name() -> str:
    names = _cpu_facts("model name")
    return names[0] if names else platform.processor() or "unknown CPU"


def _cpu_mhz() -> float | None:
    """Median over the CPUs, right now."""
    clocks = [float(value) for value in _cpu_facts("cpu MHz")]
    return statistics.median(clocks) if clocks else None


def _cpu_facts(name: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith(name)]
