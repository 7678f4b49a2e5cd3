"""A run as a diffusers pipeline folder: whole or not at all."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evaluate.model_card import model_card
from evaluate.pipeline import is_pipeline, load_pipeline
from evaluate.training_run import TRAINING, TrainingRun
from shards.canonical import canonical_json
from shards.errors import StorageError, UserError
from shards.lock import sole_writer
from shards.storage import (
    TEMPORARY_SUFFIX,
    Location,
    is_remote,
    location,
    sync_folder,
    write_whole,
)
from train.checkpoint import find_unet


@dataclass(frozen=True, kw_only=True)
class Export:
    """What is exported.

    Args:
        run: a run or one of its checkpoints; local or behind a URL.
        model: of the encoders; default: the one that the run's settings name.
        weights: `auto`, `ema` or `raw`.
        scheduler: the sampler that the folder names, on the schedule of training.
        dtype: that the weights are stored in.
        variant: `fp16` puts this word into the names of weight files; empty: plain names.
    """

    run: str
    model: str = ""
    weights: str = "auto"
    scheduler: str
    dtype: str = "float32"
    variant: str = ""


def export_pipeline(
    export: Export, out: str, archive: str = "", say: Callable[[str], object] = lambda text: None
) -> None:
    """Write the folder, the archive, or both.

    Args:
        export: what.
        out: the folder; empty: only the archive.
        archive: a .tar.gz with the folder's files at its top, as SageMaker unpacks them.
        say: see `load_pipeline`.

    Raises:
        UserError: there is something in the place of the folder, the run cannot be loaded, or its
            weights do not fit into the dtype.
    """
    if is_pipeline(location(export.run)):
        raise UserError(export.run, "is a pipeline already", wanted="a training run or checkpoint")
    _refuse_inside(out, archive)
    with _new_folder(out) as folder:
        _save(export, folder, say)
        if archive:
            write_whole(location(archive), partial(_pack, folder))


def _refuse_inside(out: str, archive: str) -> None:
    """The folder gets its name once it is whole; an archive in it would have taken that before."""
    folder, file = location(out), location(archive)
    if not (out and isinstance(folder, Path) and isinstance(file, Path)):
        return
    if folder.resolve() in file.resolve().parents:
        raise UserError("--archive", f"{archive} is inside {out}", wanted="another folder")


def _save(export: Export, folder: Path, say: Callable[[str], object]) -> None:
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        say(text)

    # One checkpoint from here on: a run in progress may write the next one meanwhile.
    unet = find_unet(location(export.run), export.weights)
    pipeline = load_pipeline(
        unet.parent,
        export.model,
        weights="ema" if unet.name == "unet_ema" else "raw",
        device="cpu",
        dtype=export.dtype,
        scheduler=export.scheduler,
        say=note,
    )
    _refuse_overflow(pipeline, export.dtype)
    pipeline.save_pretrained(folder, variant=export.variant or None)
    training = TrainingRun(unet.parent)
    facts = {**training.record, "exported": {"unet": str(unet), "dtype": export.dtype}}
    (folder / TRAINING).write_text(canonical_json(facts), encoding="utf-8")
    card = model_card(pipeline, training, unet=unet, variant=export.variant, notes=notes)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _refuse_overflow(pipeline: Any, dtype: str) -> None:
    """Float16 ends at 65504: a larger weight would be stored as infinity."""
    for part in ("unet", "vae", "text_encoder"):
        for name, weight in getattr(pipeline, part).state_dict().items():
            if not weight.isfinite().all():
                remedy = "--dtype bfloat16" if dtype == "float16" else "an earlier checkpoint"
                raise UserError(f"{part}, {name}", f"not finite in {dtype}", remedy=remedy)


@contextmanager
def _new_folder(out: str) -> Iterator[Path]:
    """A folder to fill, which gets its name when all is in it; scratch where it needs none.

    What a killed export left under the temporary name is removed by the next.
    """
    if not out:
        with (
            TemporaryDirectory(prefix="latentmill-") as scratch,
            _storage_errors(scratch, "TMPDIR"),
        ):
            yield Path(scratch)
        return
    path = _local(location(out))
    if path.exists() or path.is_symlink():
        raise UserError(path, "is there already", remedy="delete it, or name another --out")
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with sole_writer(temporary):
        _clear(temporary)
        try:
            with _storage_errors(path, "--out"):
                yield temporary
                _sync(temporary)
                temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)


@contextmanager
def _storage_errors(path: Path | str, other: str) -> Iterator[None]:
    """A full disk is told by an `OSError`, or, where safetensors writes, by its own error."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        found = f"cannot be written ({getattr(error, 'strerror', None) or error})"
        raise StorageError(path, found, remedy=f"free space, or another {other}") from error


def _local(out: Location) -> Path:
    if is_remote(out) or not isinstance(out, Path):
        remedy = "--archive, which may be a URL; or copy the folder there"
        raise UserError(out, "is behind a URL", wanted="a local folder", remedy=remedy)
    return out


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(0o644)  # the libraries make weights readable for their owner alone
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)


def _pack(folder: Path, archive: Path) -> None:
    """Equal folders make equal archives. Weights hardly shrink, so little time goes into it."""
    with (
        archive.open("wb") as file,
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path in sorted(folder.rglob("*")):
            tar.add(path, str(path.relative_to(folder)), recursive=False, filter=_anonymous)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mtime = member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o755 if member.isdir() else 0o644
    return member
