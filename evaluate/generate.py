"""Many images into a folder: by several processes, stopped and continued, to the same bytes.

Batches are fixed ranges of ids, [0, B), [B, 2B), …, whoever makes them and when: rounding depends
on a batch's size, so a batch that lacks one image is sampled whole, and only that image written.
The bytes are then those of one process that was never stopped, on like hardware.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from tqdm import tqdm

from evaluate.generated import IMAGES, PROMPTS, SETTINGS, Generated, prompts_text
from evaluate.prompts import count_cut
from evaluate.sample import Sampling, sample_batch
from shards.canonical import canonical_json
from shards.errors import UserError
from shards.storage import Location, list_files, read_bytes, size_of, write_text_whole

_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_PACKAGES = ("torch", "diffusers", "transformers")
_MAX_SEED = 2**62  # generators take 64 bits, and ids come on top
_WRITERS = 4  # compressing a large PNG takes a core as long as a GPU takes for the image

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(Sampling):
    """What the images of a folder have in common, beside the pipeline.

    Args:
        seed: the image of id n starts from the noise of seed + n.
        batch_size: images at a time.
        source: where the pipeline is from, for the record; its weights are known by their hashes.
        weights: likewise.
    """

    seed: int = 0
    batch_size: int = 16
    source: str = ""
    weights: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed <= _MAX_SEED:
            raise UserError("--seed", f"{self.seed}", wanted=f"0 to {_MAX_SEED}")
        if self.batch_size < 1:
            raise UserError("--batch-size", f"{self.batch_size}", wanted="at least 1")


def generate_folder(
    pipeline: Any,
    prompts: Sequence[str],
    out: Location,
    settings: GenerationSettings,
    *,
    keys: Sequence[str] = (),
    process: int = 0,
    num_processes: int = 1,
    say: Callable[[str], object] = lambda text: None,
) -> Generated:
    """Make those of a folder's images that this process is to make and that are not there.

    Args:
        pipeline: from `load_pipeline`.
        prompts: one for each image.
        out: the folder; is made, or continued.
        settings: of all the images.
        keys: of the prompts in their source; see `Prompts`.
        process: which one this is, of those that share the folder.
        num_processes: that do so; each takes every `num_processes`-th batch.
        say: is told what is out of the ordinary.

    Returns:
        the folder; complete once all processes have returned.

    Raises:
        UserError: the folder is of other settings; an image is not finite; a size or scheduler that
            the pipeline does not take.
    """
    settings.check_fits(pipeline)
    if num_cut := count_cut(pipeline, prompts):
        say(f"{num_cut} of {len(prompts)} prompts are cut at the text encoder's length")
    generated = Generated(out)
    _describe(generated, pipeline, prompts, keys, settings)
    batches = _batches_of(len(prompts), settings.batch_size, process, num_processes)
    mine = {number for batch in batches for number in batch}
    listed = generated.listed() & mine
    intact = {number for number in listed if generated.is_intact(number)}
    if num_damaged := len(listed) - len(intact):
        say(f"{num_damaged} images are damaged and are made anew")
    with tqdm(total=len(mine), initial=len(intact), unit="img", **_bar_options()) as bar:
        for num_made in _make(pipeline, prompts, generated, settings, batches, mine - intact):
            bar.update(num_made)
    return generated


def _batches_of(num: int, batch_size: int, process: int, num_processes: int) -> list[range]:
    """The ranges of ids that a process makes."""
    assert 0 <= process < num_processes
    starts = range(0, num, batch_size)
    return [range(start, min(start + batch_size, num)) for start in starts][process::num_processes]


def _make(
    pipeline: Any,
    prompts: Sequence[str],
    generated: Generated,
    settings: GenerationSettings,
    batches: list[range],
    wanted: set[int],
) -> Iterator[int]:
    """Sample, while what was sampled before is written; yields how many images were made."""
    writing: list[Future[None]] = []
    with ThreadPoolExecutor(_WRITERS) as writers:
        for batch in batches:
            lacking = wanted.intersection(batch)
            if not lacking:
                continue
            texts = [prompts[number] for number in batch]
            seeds = [settings.seed + number for number in batch]
            images = _sample(pipeline, texts, seeds, settings)
            _finish(writing)
            writing = [
                writers.submit(generated.write_image, number, pixels)
                for number, pixels in zip(batch, images, strict=True)
                if number in lacking
            ]
            yield len(lacking)
        _finish(writing)


def _sample(
    pipeline: Any, texts: list[str], seeds: list[int], settings: GenerationSettings
) -> list[np.ndarray]:
    import torch

    try:
        return sample_batch(pipeline, texts, seeds, settings)
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        remedy = (
            "a smaller --batch-size, in another --out: a folder keeps the one it was begun with"
        )
        raise UserError(f"--batch-size {settings.batch_size}", reason, remedy=remedy) from None


def _finish(writing: list[Future[None]]) -> None:
    for future in writing:
        future.result()


def _bar_options() -> Json:
    """On a terminal a bar; in a log a line a minute. Of a launcher's processes here, the first."""
    on_terminal = sys.stderr.isatty()
    return {
        "dynamic_ncols": on_terminal,
        "mininterval": 0.5 if on_terminal else 60.0,
        "disable": os.environ.get("LOCAL_RANK", "0") != "0",
    }


# The record ---------------------------------------------------------------------------------------


def _describe(
    generated: Generated,
    pipeline: Any,
    prompts: Sequence[str],
    keys: Sequence[str],
    settings: GenerationSettings,
) -> None:
    """Write settings and prompts, or hold them against those that are there.

    Several processes may come to this at once: one of them writes, the others compare.
    """
    text = prompts_text(prompts, settings.seed, keys)
    fixed = settings_of(pipeline, prompts, settings)
    fixed["prompts_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    notes = {
        "source": settings.source,
        "weights": settings.weights,
        "num_images": len(prompts),
        "versions": {name: version(name) for name in _PACKAGES},
    }
    folder = generated.folder
    if list_files(folder / IMAGES) and size_of(folder / SETTINGS) is None:
        raise UserError(folder, f"has {IMAGES}/ but no {SETTINGS}", remedy="another --out")
    document = canonical_json({"settings": fixed, **notes})
    if not write_text_whole(folder / SETTINGS, document, replace=False):
        _refuse_other_settings(folder, generated.settings, fixed)
    is_new = write_text_whole(folder / PROMPTS, text, replace=False)
    if not is_new and read_bytes(folder / PROMPTS) != text.encode():
        raise UserError(folder / PROMPTS, "is not as it was written", remedy="another --out")


def settings_of(pipeline: Any, prompts: Sequence[str], settings: GenerationSettings) -> Json:
    """All that the bytes of the images depend on, but for hardware and libraries."""
    height, width = settings.size_for(pipeline)
    fixed = {**asdict(settings), "height": height, "width": width}
    del fixed["source"], fixed["weights"]
    fixed["dtype"] = str(pipeline.unet.dtype).removeprefix("torch.")
    fixed["scheduler"] = type(pipeline.scheduler).__name__
    schedule = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    fixed["scheduler_sha256"] = _hash(repr(sorted(schedule.items())).encode())
    for part in _PARTS:
        if module := getattr(pipeline, part, None):
            fixed[f"{part}_sha256"] = _hash_of(module)
    ids = pipeline.tokenizer(["", *prompts]).input_ids  # a tokenizer is what it makes of texts
    fixed["input_ids_sha256"] = _hash(repr(ids).encode())
    return fixed


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _hash_of(module: Any) -> str:
    """Over names and bytes of all tensors of a module."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _refuse_other_settings(folder: Location, before: Json, now: Json) -> None:
    changed = [
        f"{name} {_short(before.get(name))} -> {_short(now.get(name))}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise UserError(
            folder,
            f"holds images of other settings: {'; '.join(changed)}",
            wanted="the settings that it was begun with",
            remedy="another --out",
        )


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else repr(value)
