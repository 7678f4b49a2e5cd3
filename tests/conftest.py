"""What the tests share: a tiny model folder, image shards, latent datasets, and a way to run us.

Everything is built on the fly and small. Folders that come from a session fixture are shared:
copy them before changing anything in them.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network for anything

from shards.arrays import save_arrays
from shards.checksum import with_checksums
from shards.column import ImageColumn, Json, TextColumn
from shards.dataset import Dataset
from shards.layout import column_path, ledger_path
from shards.ledger import OK, LedgerRow, count_reasons, save_ledger
from shards.manifest import write_manifest
from shards.receipt import NULL, Receipt, commit, receipt_path, write_receipt

REPOSITORY = Path(__file__).parent.parent
TINY_MODEL = REPOSITORY / "examples" / "tiny-model"
RESOLUTIONS = (32, 64)
NUM_SHARDS, SHARD_LENGTH = 3, 20
NUM_TOO_SMALL = {32: 0, 64: 6}  # samples of `image_shards` below a resolution


@pytest.fixture(autouse=True)
def denormal_numbers() -> Iterator[None]:
    """Training flushes them to zero, for the whole process: the next test has them again."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_flush_denormal(False)


Members = Sequence[tuple[str, bytes]]
RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


def smooth_image(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A random picture without hard edges, so that resizing and JPEG change it little."""
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def image_bytes(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    """The picture as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def sample_members(key: str, image: bytes, caption: str, metadata: Json | None = None) -> Members:
    """The members of one sample as img2dataset writes them."""
    fields = {"caption": caption, "url": f"https://images.test/{key}", **(metadata or {})}
    return [
        (f"{key}.jpg", image),
        (f"{key}.json", json.dumps(fields).encode()),
        (f"{key}.txt", caption.encode()),
    ]


def write_tar(path: Path, members: Members) -> Path:
    """A tar of these members, equal bytes for equal members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def run_python(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the interpreter at the repository's root; the caller judges the exit status."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def status_of(*args: object) -> int:
    """Exit status of `python -m shards <args>`, run in this process."""
    from shards.__main__ import main

    try:
        main(list(map(str, args)))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def rewrite_receipt(data: Path, receipt: Receipt) -> None:
    """Put another receipt in the place of the one that is there; ours never do."""
    receipt_path(data).unlink()
    assert write_receipt(data, receipt)


def build_model_folder(folder: Path) -> Path:
    """A diffusers model folder of random weights: 8x VAE with 4 channels, CLIP of width 128."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    for name in ("tokenizer", "scheduler"):
        shutil.copytree(TINY_MODEL / name, folder / name)
    shutil.copy(TINY_MODEL / "model_index.json", folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            mid_block_add_attention=False,
        ).eval()
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                hidden_size=128,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=77,
            )
        ).eval()
    rng = np.random.default_rng(0)
    pictures = np.stack([np.asarray(smooth_image(rng, 64, 64)) for _ in range(16)])
    pixel_values = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        posterior = vae.encode(pixel_values).latent_dist
    variance = posterior.mean.var() + posterior.std.square().mean()
    vae.register_to_config(scaling_factor=round(1 / variance.sqrt().item(), 4))
    vae.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
    return folder


def build_image_shards(folder: Path) -> Path:
    """`NUM_SHARDS` tars of `SHARD_LENGTH` good samples, of all sizes; every caption twice."""
    rng = np.random.default_rng(1)
    numbers = itertools.count()
    for shard in range(NUM_SHARDS):
        members: list[tuple[str, bytes]] = []
        for number in itertools.islice(numbers, SHARD_LENGTH):
            smallest = 40 if number % 10 == 9 else 64 + number % 7
            width, height = smallest, smallest + 5 * (number % 4)
            size = (height, width) if number % 2 else (width, height)
            image = image_bytes(smooth_image(rng, *size), "JPEG", quality=95)
            caption = f"a red circle above a blue square number {number // 2}"
            metadata = {"width": size[0], "height": size[1], "similarity": number / 100}
            members += sample_members(f"{number:08d}", image, caption, metadata)
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


def build_latent_dataset(
    path: Path,
    lengths: Sequence[int],
    *,
    resolutions: Sequence[int] = (64,),
    dropped: int = 0,
    too_small: int = 0,
    captions_per_shard: int = 4,
    latent_channels: int = 4,
    num_tokens: int = 77,
    dim: int = 128,
    scaling_factor: float = 0.2,
    model: str = "synthetic",
    seed: int = 0,
) -> Dataset:
    """Write a latent dataset of random numbers, without a model.

    Args:
        path: folder to write to.
        lengths: image rows of each shard; 0 is allowed.
        resolutions: one image column each; the latents' side is an eighth of it.
        dropped: source rows per shard that the ledger marks as `broken_image`.
        too_small: source rows per shard that are in the text column alone.
        captions_per_shard: distinct captions of each shard, shared by its rows.
        scaling_factor: the moments are such that latents scaled by it have deviation 1.
    """
    encoder: Json = {"encoder_config": {"random": seed}, "compute_dtype": "float32"}
    encoder |= {"storage_dtype": "float16", "weights_sha256": "0" * 64}
    images = [
        ImageColumn(
            **encoder,
            resolution=resolution,
            latent_channels=latent_channels,
            latent_size=resolution // 8,
            scaling_factor=scaling_factor,
            transform={"resize": "none"},
        )
        for resolution in resolutions
    ]
    text = TextColumn(**encoder, num_tokens=num_tokens, dim=dim, tokenizer_sha256="1" * 64)
    rng = np.random.default_rng(seed)

    def write(data_path: Path, arrays: dict[str, np.ndarray], **facts: Any) -> None:
        commit(
            data_path,
            lambda file: save_arrays(file, arrays),
            lambda written: Receipt(**facts, model=model, **written),
        )

    def random_texts(count: int) -> dict[str, np.ndarray]:
        states = rng.standard_normal((count, num_tokens, dim)).astype(np.float16)
        input_ids = rng.integers(0, 1000, (count, num_tokens), dtype=np.uint16)
        return {"input_ids": input_ids, "states": states}

    for index, length in enumerate(lengths):
        shard = f"{index:05d}"
        statuses = np.array([OK] * (length + too_small) + ["broken_image"] * dropped)
        rng.shuffle(statuses)
        good = np.flatnonzero(statuses == OK)
        large = np.sort(rng.permutation(good)[:length])
        num_captions = min(captions_per_shard, len(good))
        caption = np.full(len(statuses), -1, np.int32)
        caption[good] = rng.permutation(np.arange(len(good)) % max(num_captions, 1))
        ledger = [
            LedgerRow(
                key=f"{shard}{row:04d}",
                status=str(status),
                caption=f"caption {caption[row]} of {shard}",
                url=f"https://images.test/{shard}{row:04d}",
                width=64,
                height=64,
                sha256=f"{row:064x}",
                metadata={"similarity": row / 100},
            )
            for row, status in enumerate(statuses)
        ]
        facts: Json = {
            "shard": shard,
            "source": {"url": f"/nowhere/{shard}.tar", "bytes": 0, "sha256": "2" * 64},
            "rows_in": len(ledger),
        }
        reasons = count_reasons(ledger)
        data_path = ledger_path(path, shard)
        ledger_facts = {**facts, "column": None, "rows": len(good), "absent": reasons}
        commit(
            data_path,
            partial(save_ledger, rows=ledger),
            lambda written, facts=ledger_facts: Receipt(**facts, **written),
        )
        for column in images:
            shape = (length, latent_channels, column.latent_size, column.latent_size)
            mean = rng.standard_normal(shape) * (0.8 / scaling_factor)
            logvar = np.full(shape, 2 * np.log(0.6 / scaling_factor))
            moments = np.concatenate([mean, logvar], axis=1).astype(np.float16)
            stats = {"latent_mean": 0.0, "latent_std": 1.0} if length else {}
            write(
                column_path(path, column.column_id, shard),
                {
                    **with_checksums(column, {"moments": moments}, large.astype(np.int32)),
                    "row": large.astype(np.int32),
                },
                **facts,
                column=column.to_json(),
                rows=length,
                absent={**reasons, **({"too_small": too_small} if too_small else {})},
                stats=stats,
            )
        write(
            column_path(path, text.column_id, shard),
            {
                **with_checksums(text, random_texts(num_captions), caption),
                "caption": caption,
            },
            **facts,
            column=text.to_json(),
            rows=len(good),
            absent=reasons,
        )
    null = {name: array[0] for name, array in random_texts(1).items()}
    null_facts: Json = {"shard": NULL, "source": {}, "rows_in": 1, "rows": 1, "absent": {}}
    write(column_path(path, text.column_id, NULL), null, column=text.to_json(), **null_facts)
    write_manifest(path)
    return Dataset(path)


@pytest.fixture(scope="session")
def make_latent_dataset() -> Callable[..., Dataset]:
    """`make_latent_dataset(path, lengths, ...)`: see `build_latent_dataset`."""
    return build_latent_dataset


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers model folder of random weights whose scaled latents have deviation near 1.

    VAE (8x, 4 channels), CLIP text encoder (width 128, 77 tokens), tokenizer, scheduler.
    """
    return build_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def image_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with 00000.tar, 00001.tar, 00002.tar; see `build_image_shards`."""
    return build_image_shards(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def latent_dataset(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, image_shards: Path
) -> Path:
    """`image_shards` precomputed with `model_folder` at 32 and 64 pixels; fits the tiny preset."""
    from precompute.config import PrecomputeConfig
    from precompute.job import precompute

    out = tmp_path_factory.mktemp("latents") / "latents"
    precompute(
        PrecomputeConfig(
            shards=str(image_shards / "*.tar"),
            out=str(out),
            model=str(model_folder),
            resolutions=",".join(map(str, RESOLUTIONS)),
            device="cpu",
            batch_size=8,
        )
    )
    return out


@pytest.fixture(scope="session")
def emoji_shards() -> Path:
    """Folder of real img2dataset shards, from the environment variable EMOJI_SHARDS."""
    folder = os.environ.get("EMOJI_SHARDS", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("real images: set EMOJI_SHARDS to a folder with img2dataset shards")
    return Path(folder)
