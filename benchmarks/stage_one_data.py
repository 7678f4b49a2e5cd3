"""Image shards as the web has them, but drawn: some images are small, some captions come twice."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np

QUALITY = 90
_SMALL = (400, 300)  # in pixels: below 512, not below 256
_ASPECTS = (4 / 3, 3 / 4, 3 / 2, 1.0, 16 / 9)
_DISTINCT = 10  # pictures per size; drawing takes longer than decoding


def write_image_shards(
    folder: Path,
    num_images: int,
    num_shards: int,
    megapixels: tuple[float, ...],
    *,
    small_frac: float,
    duplicate_frac: float,
) -> list[Path]:
    """Write tars as img2dataset does.

    Args:
        folder: is made.
        num_images: over all shards.
        num_shards: of equal length, the last may be shorter.
        megapixels: sizes, in turns.
        small_frac: share of images whose shortest side is 300 pixels.
        duplicate_frac: share of captions that another sample of the shard has as well.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pictures = _draw_pictures(rng, megapixels)
    small = [draw_jpeg(rng, *_SMALL) for _ in range(_DISTINCT)]
    length, paths = -(-num_images // num_shards), []
    for shard in range(num_shards):
        paths.append(folder / f"{shard:05d}.tar")
        with tarfile.open(paths[-1], "w", format=tarfile.GNU_FORMAT) as tar:
            for number in range(shard * length, min((shard + 1) * length, num_images)):
                is_small = rng.random() < small_frac
                image = small[number % _DISTINCT] if is_small else pictures[number % len(pictures)]
                same = rng.random() < duplicate_frac
                caption = f"a picture of shard {shard}" if same else f"picture {number}, drawn"
                _add(tar, f"{number:09d}", image, caption)
    return paths


def _draw_pictures(rng: np.random.Generator, megapixels: tuple[float, ...]) -> list[bytes]:
    pictures = []
    for number in range(_DISTINCT * len(megapixels)):
        pixels, aspect = 1e6 * megapixels[number % len(megapixels)], _ASPECTS[number % 5]
        height = round((pixels / aspect) ** 0.5)
        pictures.append(draw_jpeg(rng, round(height * aspect), height))
    return pictures


def draw_jpeg(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A picture with a photograph's spectrum (octaves of noise, falling with frequency)."""
    from PIL import Image

    total = np.zeros((height, width, 3), np.float32)
    size, weight = 4, 60.0
    while size < max(width, height):
        noise = rng.normal(0, 1, (max(2, size * height // width), size, 3)).astype(np.float32)
        for channel in range(3):
            octave = Image.fromarray(noise[..., channel]).resize(
                (width, height), Image.Resampling.BICUBIC
            )
            total[..., channel] += weight * np.asarray(octave)
        size, weight = size * 2, weight * 0.6
    pixels = (total + 128).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, key: str, image: bytes, caption: str) -> None:
    metadata = json.dumps({"caption": caption, "url": f"https://images.test/{key}"}).encode()
    for suffix, data in (("jpg", image), ("json", metadata), ("txt", caption.encode())):
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
