"""Ask a server for images, and save them as PNGs."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from shards.errors import UserError

if TYPE_CHECKING:
    from serve.client import Client, Image, Reply


@dataclass(frozen=True, kw_only=True)
class QueryConfig:
    """Settings of `python -m serve query`; what is left out is the server's default."""

    name: tyro.conf.Positional[str] = ""
    """Of a server that `up` started; or --url."""
    prompt: str
    """Prompts, separated by semicolons, or the name of a text file with one in each line."""
    negative_prompt: str = ""
    """What the images are to lack."""
    steps: int | None = None
    """Denoising steps."""
    guidance: float | None = None
    """Guidance scale; 1 is off."""
    seed: int | None = None
    """The n-th prompt gets seed + n; drawn by the server where it is left out."""
    width: int | None = None
    """Pixels."""
    height: int | None = None
    """Pixels."""
    scheduler: str | None = None
    """Sampler by name."""
    out: str = "images"
    """Folder of the PNGs, or a .png for one prompt."""
    url: str = ""
    """Of any server of this kind, in place of a name."""
    token: str = ""
    """Bearer token of the server at --url; better in the environment, as LATENTMILL_TOKEN."""
    patience_sec: float = 60.0
    """How long to come again while the server is full."""


def run(config: QueryConfig) -> None:
    """Send the prompts, as many at a time as the server takes, and save their images."""
    from evaluate.prompts import read_prompts

    prompts = read_prompts(config.prompt, "--prompt")
    if config.out.endswith(".png") and len(prompts) > 1:
        raise UserError("--out", config.out, wanted=f"a folder for {len(prompts)} prompts")
    client = _client(config)
    at_a_time = client.max_prompts
    for start in range(0, len(prompts), at_a_time):
        reply = client.generate(
            prompts[start : start + at_a_time],
            negative_prompt=config.negative_prompt or None,
            steps=config.steps,
            guidance=config.guidance,
            seed=None if config.seed is None else config.seed + start,
            width=config.width,
            height=config.height,
            scheduler=config.scheduler,
        )
        _save(reply, Path(config.out))


def _client(config: QueryConfig) -> Client:
    from serve.client import Client
    from serve.config import TOKEN_VARIABLE
    from serve.deployment import running_deployment

    if bool(config.name) == bool(config.url):
        raise UserError("query", "a name or --url is needed", wanted="one of them")
    if config.url:
        token = config.token or os.environ.get(TOKEN_VARIABLE, "")
        return Client(config.url, token, patience_sec=config.patience_sec)
    if config.token:
        raise UserError("--token", "is for --url; a server's name stands for its token as well")
    return running_deployment(config.name).client(patience_sec=config.patience_sec)


def _save(reply: Reply, out: Path) -> None:
    out_is_file = out.suffix == ".png"
    for image in reply.images:
        path = out if out_is_file else out / _file_name(image)
        _write(path, image.png)
        note = "  blanked by the safety checker" if image.flagged else ""
        print(f"{path}  seed {image.seed}  {image.prompt!r}{note}")
    for warning in reply.warnings:
        print(f"warning: {warning}")
    settings, timings = reply.settings, reply.timings
    print(
        f"{settings['width']}x{settings['height']}, {settings['steps']} steps of "
        f"{settings['scheduler']}, guidance {settings['guidance']:g}: "
        f"queued {timings['queued_sec']:.2f} s, generated {timings['generated_sec']:.2f} s "
        f"in a batch of {timings['batch_size']:.0f}"
    )


def _write(path: Path, png: bytes) -> None:
    from shards.storage import write_whole

    def fill(temporary: Path) -> None:
        temporary.write_bytes(png)

    write_whole(path, fill)


def _file_name(image: Image) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", image.prompt.lower()).strip("-")
    return f"{image.seed}-{words[:60].rstrip('-') or 'image'}.png"
