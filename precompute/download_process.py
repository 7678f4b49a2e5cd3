"""img2dataset: the interpreter of its environment, its arguments, its process."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.errors import UserError
from shards.storage import Location

if TYPE_CHECKING:
    from precompute.download import DownloadConfig
    from precompute.download_urls import UrlList

# Our folder in the destination. Beside the shards, img2dataset would trip over a *.json of ours.
NOTES = "_download"
PYTHON_VARIABLE = "DOWNLOAD_PYTHON"
_OPT_OUTS = ["noai", "noimageai", "noindex", "noimageindex"]
_VENV = Path(__file__).parent.parent / ".venv-download"
_RUNNER = Path(__file__).with_name("download_runner.py")
_QUIET = {"NO_ALBUMENTATIONS_UPDATE": "1"}  # else its import asks the network for a newer release


def find_interpreter() -> Path:
    """The interpreter of img2dataset's environment.

    Raises:
        UserError: it is not there.
    """
    if named := os.environ.get(PYTHON_VARIABLE):
        if Path(named).is_file():
            return Path(named)
        raise UserError(PYTHON_VARIABLE, f"no file {named}", wanted="a Python with img2dataset")
    if not (_VENV / "ready").is_file():
        raise UserError(_VENV, "img2dataset is not installed", remedy="make download-env")
    return _VENV / "bin" / "python"


def arguments(
    config: DownloadConfig, url_list: UrlList, out: Location, name: str, mode: str
) -> dict[str, Any]:
    """Arguments of `img2dataset.download`; its defaults are not relied on.

    Args:
        config: what the user asked for.
        url_list: the list; its columns are the samples' metadata.
        out: the destination.
        name: which table in our folder there is to be downloaded: `list` or `retry`.
        mode: `incremental` does what of it is missing; `extend` adds shards.
    """
    return {
        "url_list": str(out / NOTES / f"{name}.parquet"),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption" if url_list.has_captions else None,
        "save_additional_columns": url_list.other_columns or None,
        "output_folder": str(out),
        "output_format": "webdataset",
        "incremental_mode": mode,
        "number_sample_per_shard": config.samples_per_shard,
        "processes_count": config.processes or os.cpu_count() or 1,
        "thread_count": config.threads,
        "timeout": config.timeout_sec,
        "retries": 0,  # it retries at once, whatever the reason, and opted-out images as well
        "image_size": config.image_size,
        "resize_mode": config.resize_mode if config.image_size else "no",
        "resize_only_if_bigger": True,
        "skip_reencode": True,  # a JPEG that is not scaled keeps its bytes
        "encode_format": "jpg",
        "encode_quality": config.encode_quality,
        "min_image_size": config.min_side,
        "max_aspect_ratio": config.max_aspect_ratio or math.inf,
        "extract_exif": False,
        "compute_hash": "sha256",
        "disallowed_header_directives": _OPT_OUTS,
        "user_agent_token": config.user_agent_token or None,
        "enable_wandb": False,
    }


def run_img2dataset(python: Path, settings: dict[str, Any]) -> None:
    """Run img2dataset to its end, however it ends; leaves no process of it behind."""
    process = subprocess.Popen(
        [str(python), "-P", str(_RUNNER), str(os.getpid()), json.dumps(settings)],
        stdin=subprocess.DEVNULL,
        env={**os.environ, **_QUIET},
        start_new_session=True,
    )
    try:
        process.wait()
    finally:
        _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of it: whatever that was writing is not finished, and done again."""
    # In containers nobody collects dead orphans: they stay in the group. They do no more harm.
    deadline = time.monotonic() + 0.5
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(0.01)
