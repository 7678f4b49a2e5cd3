"""Make a diffusers pipeline folder of a run, or the model archive of a SageMaker endpoint."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from evaluate.schedulers import DEFAULT_SCHEDULER
from shards.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of `python -m evaluate export`."""

    run: Annotated[str, tyro.conf.arg(aliases=["--source"])]
    """A training run or one of its checkpoints; a folder or a URL."""
    out: str = ""
    """The folder to make; `StableDiffusionPipeline.from_pretrained` loads it."""
    archive: str = ""
    """Also, or only, a .tar.gz with the folder's files at its top; a file or a URL."""
    model: str = ""
    """Model folder or hub id of the encoders; default: those that the run was trained with."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """auto takes the averaged ones where there are any."""
    scheduler: str = DEFAULT_SCHEDULER
    """The sampler that the folder names, on the schedule of training."""
    dtype: Literal["", "float32", "float16", "bfloat16"] = ""
    """That the weights are stored in; default: float32, or float16 with --variant fp16."""
    variant: Literal["", "fp16"] = ""
    """fp16: name the weight files so; to be loaded with variant="fp16"."""


def run(config: ExportConfig) -> None:
    """Write it and say where it is."""
    if not config.out and not config.archive:
        raise UserError("--out", "not given, nor --archive", wanted="where to write")
    if config.archive and not config.archive.endswith((".tar.gz", ".tgz")):
        raise UserError("--archive", config.archive, wanted="a name that ends in .tar.gz")
    if config.variant and config.dtype not in ("", "float16"):
        raise UserError("--variant", f"fp16 of {config.dtype}", wanted="--dtype float16")

    from evaluate.export import Export, export_pipeline

    export = Export(
        run=config.run,
        model=config.model,
        weights=config.weights,
        scheduler=config.scheduler,
        dtype=config.dtype or ("float16" if config.variant else "float32"),
        variant=config.variant,
    )
    export_pipeline(
        export, config.out, config.archive, say=lambda text: print(text, file=sys.stderr)
    )
    for path in filter(None, (config.out, config.archive)):
        print(path)
