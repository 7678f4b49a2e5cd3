"""The crop that the VAE sees is that of an independent reference, whatever the image's size."""

import hashlib
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import image_bytes, run_python, sample_members, smooth_image, write_tar
from PIL import Image, ImageDraw

from precompute.columns import image_columns
from precompute.config import PrecomputeConfig
from precompute.decoding import decode_sample
from precompute.filters import Filter
from precompute.job import precompute
from precompute.model_folder import find_model
from precompute.pixels import Picture
from precompute.transform import Crop, Cropper, build_buckets
from shards.dataset import Dataset
from shards.image_sample import ImageSample
from shards.quantize import latents_of
from shards.verify import iter_problems

# What precompute/transform.py states of reduced decodes.
MIN_PSNR_DB, WORST_PSNR_DB = 45, 30


def square(resolution: int, flip: bool = False) -> Crop:
    return Crop(((resolution, resolution),), flip)


def cut(data: bytes, *crops: Crop) -> list[np.ndarray | None]:
    """Each crop of an image file, as a job makes them."""
    decoded = decode_sample(ImageSample(key="a", image=data, caption="a"), list(crops), Filter(""))
    assert decoded.row.status == "ok"
    return [decoded.crops[n][1] if n in decoded.crops else None for n in range(len(crops))]


def reference(image: Image.Image, height: int, width: int) -> np.ndarray:
    """The same by PIL alone: cover, bicubic with antialiasing, centre crop.

    First one side and then the other: which comes first, and is rounded, PIL decides by the shape.
    """
    scale = max(height / image.height, width / image.width)
    resized_width = max(width, round(image.width * scale))
    resized_height = max(height, round(image.height * scale))
    rgb = image.convert("RGB")
    narrow = rgb.resize((resized_width, rgb.height), Image.Resampling.BICUBIC)
    resized = narrow.resize((resized_width, resized_height), Image.Resampling.BICUBIC)
    left, top = (resized_width - width) // 2, (resized_height - height) // 2
    return np.asarray(resized.crop((left, top, left + width, top + height))).astype(int)


def assert_equal_but_for_rounding(found: np.ndarray | None, wanted: np.ndarray) -> None:
    """One level off at most, and two now and then: torch's weights have 16 bits, PIL's 22."""
    assert found is not None
    assert (found.dtype, found.shape) == (np.uint8, wanted.shape)
    off = np.abs(found - wanted)
    assert off.max() <= 2
    assert (off == 2).mean() < 1e-3
    assert off.mean() < 0.3


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def psnr_db(found: np.ndarray, wanted: np.ndarray) -> float:
    error = np.square(found.astype(float) - wanted).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


# Against PIL.

SIZES = [(64, 64), (65, 64), (64, 65), (63, 64), (127, 129), (128, 128), (200, 71), (71, 333)]
SIZES += [(641, 480), (96, 1000), (777, 778), (1000, 67)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("resolution", [8, 56, 64])
def test_the_crop_is_pils_but_for_rounding(size, resolution):
    for image in (noise(*size), smooth_image(np.random.default_rng(0), *size)):
        (found,) = cut(image_bytes(image), square(resolution))
        if min(size) < resolution:
            assert found is None
        else:
            assert_equal_but_for_rounding(found, reference(image, resolution, resolution))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_crop_of_every_bucket_is_pils_but_for_rounding(size):
    image, crop = noise(*size), Crop(tuple((h, w) for h, w in build_buckets(64, 16)))
    picture = Picture(image_bytes(image))
    placement = crop.place(picture.width, picture.height)
    (found,) = cut(image_bytes(image), crop)
    if placement is None:
        assert found is None
    else:
        assert_equal_but_for_rounding(found, reference(image, *crop.sizes[placement.bucket]))


def test_an_image_of_just_the_resolution_is_not_touched():
    image = noise(64, 64)
    (found,) = cut(image_bytes(image), square(64))
    assert np.array_equal(found, np.asarray(image))
    (found,) = cut(image_bytes(noise(64, 75)), square(64))  # cut from row (75 - 64) // 2
    assert np.array_equal(found, np.asarray(noise(64, 75))[5:69])


@pytest.mark.parametrize("width", [60, 61, 97, 128, 200])
def test_a_point_stays_where_it_is(width):
    """The centre of mass of an impulse, in the coordinates of the crop: no shift by a half."""
    for x in (width // 3, width // 2, 2 * width // 3):
        pixels = np.zeros((width, width, 3), np.uint8)
        pixels[x, width - 1 - x] = 255
        pixels = np.asarray(Image.fromarray(pixels).resize((width * 4,) * 2, 0))  # a visible one
        (found,) = cut(image_bytes(Image.fromarray(pixels)), square(56))
        assert found is not None
        mass = found[..., 0].astype(float)
        centres = (np.arange(56) + 0.5) * width / 56
        assert (mass.sum(1) * centres).sum() / mass.sum() == pytest.approx(x + 0.5, abs=0.2)
        mirrored = width - 1 - x + 0.5
        assert (mass.sum(0) * centres).sum() / mass.sum() == pytest.approx(mirrored, abs=0.2)


CASES = [((2055, 2060), orientation) for orientation in range(1, 9)]
CASES += [((4103, 4097), 1), ((4103, 4097), 6), ((8199, 8195), 8)]


@pytest.mark.parametrize(("size", "orientation"), CASES, ids=str)
def test_a_reduced_decode_shifts_nothing(size, orientation):
    """Sides with a remainder: of libjpeg's last column less than a pixel belongs to the image."""
    waves = [128 + 100 * np.sin(np.linspace(0, 16 * np.pi, side)) for side in size]
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = waves[0][None], waves[1][:, None]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = image_bytes(Image.fromarray(pixels), "JPEG", quality=95, subsampling=0, exif=exif)
    picture = Picture(data)
    cropper, crop = Cropper(picture), square(512)
    placement = crop.place(picture.width, picture.height)
    assert placement
    assert cropper._divisor(placement) == max(d for d in (2, 4, 8) if min(size) >= d * 1024)
    (found,) = cut(data, crop)
    wanted = reference(turned(Image.fromarray(pixels), orientation), 512, 512)
    assert found is not None
    assert psnr_db(found, wanted) > MIN_PSNR_DB
    for axis, channel in ((1, 0), (0, 1)) if orientation < 5 else ((0, 0), (1, 1)):
        slope = np.gradient(wanted[..., channel].astype(float), axis=axis)
        difference = (found - wanted)[..., channel]
        for part in (slice(0, 64), slice(-64, None), slice(200, 300)):
            at = (part, slice(None)) if axis == 0 else (slice(None), part)
            shift = (difference[at] * slope[at]).sum() / np.square(slope[at]).sum()
            assert abs(shift) < 0.02  # of a pixel of the crop


def turned(stored: Image.Image, orientation: int) -> Image.Image:
    """PIL's own view of how to turn an image upright."""
    moves = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Image.Transpose
    if orientation == 1:
        return stored
    return stored.transpose(Image.Transpose(moves[orientation]))


def test_another_instruction_set_gives_the_same_bytes():
    program = """
import hashlib, torch
from test_precompute_transform import *
print(torch.backends.cpu.get_cpu_capability())
hashes = hashlib.sha256()
for width, height in [*SIZES, (2055, 2060)]:
    for found in cut(image_bytes(noise(width, height), "JPEG"), square(32), square(56)):
        hashes.update(found.tobytes())
print(hashes.hexdigest())
"""
    runs = {}
    for capability in ("default", ""):
        environment = {"ATEN_CPU_CAPABILITY": capability} if capability else {}
        done = run_python("-c", program, PYTHONPATH=f"{Path(__file__).parent}", **environment)
        assert done.returncode == 0, done.stderr
        name, digest = done.stdout.split()
        runs[name] = digest
    assert "DEFAULT" in runs
    assert len(set(runs.values())) == 1, runs


# Never upsampled.


@pytest.mark.parametrize(
    ("size", "fits"),
    [((64, 64), True), ((63, 64), False), ((64, 63), False), ((63, 900), False), ((64, 900), True)],
    ids=str,
)
def test_what_is_a_pixel_too_small_is_left_out(size, fits):
    placement = square(64).place(*size)
    assert (placement is not None) == fits


def test_no_side_is_ever_enlarged_and_the_crop_is_always_covered():
    crops = [square(64), square(8), Crop(tuple((h, w) for h, w in build_buckets(64, 8)))]
    for width, height in itertools.product(range(1, 200, 3), repeat=2):
        for crop in crops:
            placement = crop.place(width, height)
            nearest = min(
                crop.sizes, key=lambda size: abs(np.log(size[1] / size[0] * height / width))
            )
            if placement is None:
                assert width < nearest[1] or height < nearest[0] or len(crop.sizes) > 1
                continue
            height_wanted, width_wanted = crop.sizes[placement.bucket]
            assert height_wanted <= placement.height <= height
            assert width_wanted <= placement.width <= width
            assert placement.height == height_wanted or placement.width == width_wanted
            ratio = width / height
            assert abs(placement.width - placement.height * ratio) <= max(1, ratio)


# Reduced decodes.


def natural(width: int, height: int, seed: int) -> Image.Image:
    """Something like a photo: broad areas, texture at all scales, hard edges and thin lines."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32).copy()
    for octave in range(2, 11):
        cells = rng.normal(128, 80, (2**octave, 2**octave)).clip(0, 255).astype(np.uint8)
        layer = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
        pixels += (np.asarray(layer, np.float32)[..., None] - 128) / 2 ** (octave / 2)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for number in range(60):
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        side, colour = int(rng.integers(9, height // 6)), tuple(rng.integers(0, 256, 3).tolist())
        shapes: list[Any] = [draw.ellipse, draw.rectangle]
        if number % 3 < 2:
            shapes[number % 3]((x, y, x + side, y + side), fill=colour)
        else:
            draw.line((x, y, x + 2 * side, y + side), fill=colour, width=number % 7 + 1)
    return image


LARGE = [(3000, 2050), (3001, 4501), (5003, 4099), (8999, 8201)]


@pytest.mark.parametrize(
    ("size", "subsampling"),
    [*((size, 2) for size in LARGE), *((size, 0) for size in LARGE[:-1])],
    ids=str,
)
def test_a_reduced_decode_is_close_to_the_whole_transform(size, subsampling):
    image = natural(*(min(side, 3001) for side in size), seed=size[0]).resize(size)
    data = image_bytes(image, "JPEG", quality=90, subsampling=subsampling)
    whole = Image.fromarray(Picture(data).decode().upright())
    reduced = 0
    for resolution in (64, 256, 512, 1024):
        (found,) = cut(data, square(resolution))
        assert found is not None
        db = psnr_db(found, reference(whole, resolution, resolution))
        reduced += db < 70  # else it was not reduced
        assert db >= MIN_PSNR_DB, (resolution, db)
    assert reduced >= 3


def test_the_worst_case_of_a_reduced_decode_is_as_stated():
    """Black and white at the pixel's scale, where averaging before bicubic differs the most."""
    rng = np.random.default_rng(0)
    for cell in (1, 2, 3, 4):
        cells = rng.integers(0, 2, (2111 // cell + 1,) * 2, dtype=np.uint8) * 255
        pixels = cells.repeat(cell, 0).repeat(cell, 1)[:2111, :2111]
        data = image_bytes(Image.fromarray(pixels), "JPEG", quality=92)
        whole = Image.fromarray(Picture(data).decode().upright())
        (found,) = cut(data, square(512))
        assert found is not None
        assert psnr_db(found, reference(whole, 512, 512)) >= WORST_PSNR_DB


def test_real_pictures_enlarged_are_as_close(emoji_shards):
    import tarfile

    with tarfile.open(sorted(emoji_shards.glob("*.tar"))[0]) as tar:
        images = [m for m in tar.getmembers() if m.name.endswith((".jpg", ".png", ".webp"))][::60]
        for member in images:
            image = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")  # type: ignore
            large = image.resize((2111, 2111), Image.Resampling.LANCZOS)
            data = image_bytes(large, "JPEG", quality=90)
            whole = Image.fromarray(Picture(data).decode().upright())
            (found,) = cut(data, square(512))
            assert found is not None
            assert psnr_db(found, reference(whole, 512, 512)) >= MIN_PSNR_DB


def test_a_column_does_not_depend_on_which_others_are_computed():
    """Its decode is a function of the image's size and of the column alone."""
    crops = [square(r, flip) for r in (8, 64, 256, 512, 520, 768) for flip in (False, True)]
    crops.append(Crop(tuple((h, w) for h, w in build_buckets(512, 64))))
    data = image_bytes(natural(2303, 2117, seed=1), "JPEG")
    together = cut(data, *crops)
    for crop, found in zip(crops, together, strict=True):
        (alone,) = cut(data, crop)
        assert np.array_equal(alone, found), crop
    again = cut(data, *crops[::-1])[::-1]
    assert all(np.array_equal(a, b) for a, b in zip(together, again, strict=True))


def test_the_divisor_keeps_twice_the_side_and_1024_pixels():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        width, height = (int(side) for side in np.exp(rng.uniform(np.log(64), np.log(20_000), 2)))
        resolution = int(rng.choice([8, 64, 256, 512, 768, 1024]))
        placement = square(resolution).place(width, height)
        if placement is None:
            continue
        picture = type("Sized", (), {"width": width, "height": height})()
        divisor = Cropper(picture)._divisor(placement)  # type: ignore[arg-type]
        assert divisor in (1, 2, 4, 8)
        least = max(2 * resolution, 1024)
        assert divisor == 1 or min(width, height) >= divisor * least
        assert divisor == 8 or min(width, height) < 2 * divisor * least


def test_an_image_is_decoded_once_where_the_divisors_agree(monkeypatch):
    asked = []
    decode = Picture.decode

    def counting(self: Picture, divisor: int = 1) -> Any:
        asked.append(divisor)
        return decode(self, divisor)

    monkeypatch.setattr(Picture, "decode", counting)
    data = image_bytes(smooth_image(np.random.default_rng(0), 2100, 2100), "JPEG")
    cut(data, square(64), square(256), square(512), square(512, flip=True))
    assert asked == [2]
    asked.clear()
    cut(data, square(64), square(512), square(768), square(1024))
    assert sorted(asked) == [1, 2]
    asked.clear()
    cut(image_bytes(smooth_image(np.random.default_rng(0), 40, 40)), square(64))
    assert len(asked) == 1  # too small for all, and decoded to see that it can be


# Flips, and what is stored.


def test_the_flipped_crop_is_the_mirrored_plain_one():
    for size in SIZES:
        plain, flipped = cut(image_bytes(noise(*size)), square(56), square(56, flip=True))
        assert plain is not None
        assert flipped is not None
        assert np.array_equal(flipped, plain[:, ::-1])


IMAGES = [(64, 64), (90, 70), (70, 131), (129, 64), (64, 65), (100, 100), (63, 63), (150, 77)]


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    members: list[tuple[str, bytes]] = []
    rng = np.random.default_rng(3)
    for number, size in enumerate(IMAGES):
        members += sample_members(str(number), image_bytes(smooth_image(rng, *size)), "a lion")
    return write_tar(tmp_path_factory.mktemp("images") / "00000.tar", members)


def run(out: Path, shard: Path, model: Path, **options: Any) -> Dataset:
    settings: dict[str, Any] = {"resolutions": "64", "device": "cpu", "batch_size": 3}
    settings |= {"text": "ids", "max_drop_frac": 1.0, **options}
    precompute(PrecomputeConfig(shards=str(shard), out=str(out), model=str(model), **settings))
    assert list(iter_problems(out, full=True)) == []
    return Dataset(out)


def columns_of(dataset: Dataset) -> dict[str, Any]:
    """Image columns by their names without fingerprints."""
    return {c.spec.name: c for c in dataset.columns.values() if c.spec.kind == "image"}


def plain_latents(model: Path, crops: list[np.ndarray]) -> np.ndarray:
    """A plain diffusers call for each crop: moments, or latents of a deterministic VAE; float32."""
    import diffusers
    import torch

    config = json.loads((model / "vae" / "config.json").read_text())
    vae = getattr(diffusers, config["_class_name"]).from_pretrained(model, subfolder="vae").eval()
    found = []
    with torch.inference_mode():
        for crop in crops:
            pixels = torch.from_numpy(crop.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
            encoded = vae.encode(pixels)
            latents = encoded.latents if "latents" in encoded else encoded.latent_dist.parameters
            found.append(latents[0].numpy())
    return np.stack(found)


@pytest.fixture(scope="module")
def taesd(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """The model folder with a deterministic autoencoder."""
    import shutil

    import torch
    from diffusers import AutoencoderTiny

    folder = tmp_path_factory.mktemp("taesd") / "model"
    shutil.copytree(model_folder, folder)
    shutil.rmtree(folder / "vae")
    blocks = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    counts = {"num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoencoderTiny(**blocks, **counts).save_pretrained(folder / "vae")
    return folder


KINDS = {"square": {}, "buckets": {"bucket_step": 16}, "flip": {"flip": True}}
KINDS["all"] = {"bucket_step": 16, "flip": True}


@pytest.mark.parametrize("latents", ["moments", "mean", "moments-int8", "mean-int8", "tiny"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_is_a_plain_diffusers_call_on_those_pixels(
    tmp_path, shard, model_folder, taesd, kind, latents
):
    model, storage = (taesd, "mean") if latents == "tiny" else (model_folder, latents)
    dataset = run(tmp_path / "out", shard, model, latents=storage, **KINDS[kind])
    columns = columns_of(dataset)
    assert len(columns) == 1 + ("flip" in KINDS[kind])
    rng = np.random.default_rng(3)
    images = [smooth_image(rng, *size) for size in IMAGES]
    for column in columns.values():
        arrays, spec, at = column.map_shard("00000"), column.spec, 0
        for bucket, (height, width) in enumerate(spec.crop_sizes):
            name, scale = spec.array_names(bucket)
            stored = np.asarray(arrays[name])
            rows = arrays["row"][at : at + len(stored)].tolist()
            at += len(stored)
            if not rows:
                continue
            crops = []
            for row in rows:
                (crop,) = cut(image_bytes(images[row]), Crop.of_column(spec))
                assert crop is not None
                upright = crop[:, ::-1] if spec.is_flipped else crop
                assert_equal_but_for_rounding(upright, reference(images[row], height, width))
                crops.append(crop)
            wanted = plain_latents(model, crops)[:, : stored.shape[1]]
            assert stored.shape == wanted.shape
            if spec.storage_dtype == "int8":
                found = latents_of(stored, np.asarray(arrays[scale])).dequantize()
                step = np.abs(wanted).max((2, 3), keepdims=True) / 127
                assert (np.abs(found - wanted) <= 0.51 * step + 2**-10 * np.abs(wanted)).all()
                means = slice(0, spec.latent_channels)
                assert column.stats["relative_error"] < 0.02
                error = np.sqrt(np.square(found - wanted)[:, means].mean())
                assert error < 2 * column.stats["relative_error"] * np.abs(wanted[:, means]).max()
            else:
                assert np.allclose(stored, wanted, rtol=2**-10, atol=1e-5)
        assert at == len(arrays["row"]) == column.num_rows > 0


def test_the_encoder_is_within_1e5_of_plain_diffusers(model_folder, taesd):
    import torch

    from precompute.image_encoder import ImageEncoder, to_pixel_values

    rng, device = np.random.default_rng(0), torch.device("cpu")
    for model, (height, width) in itertools.product((model_folder, taesd), [(64, 64), (40, 88)]):
        encoder = ImageEncoder(find_model(str(model)), device, torch.float32)
        crops = [np.asarray(smooth_image(rng, width, height)) for _ in range(5)]
        found = encoder.encode(to_pixel_values(crops, device))[0].numpy()
        np.testing.assert_allclose(found, plain_latents(model, crops), rtol=1e-5, atol=1e-5)


def test_adding_flips_later_changes_no_byte_and_the_plain_column_is_the_one(
    tmp_path, shard, model_folder
):
    before = run(tmp_path / "out", shard, model_folder)
    files = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "out").glob("*/*")}
    both = run(tmp_path / "out", shard, model_folder, flip=True)
    assert {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in files} == files
    columns = columns_of(both)
    assert columns.keys() == {"moments-64", "moments-64-flip"}
    plain, flipped = (columns[name].map_shard("00000") for name in columns)
    assert np.array_equal(plain["row"], flipped["row"])
    assert not np.array_equal(plain["moments"], flipped["moments"])
    picked = both.image_column(64)
    assert picked.column_id == before.image_column(64).column_id
    assert not picked.spec.is_flipped
    both.check_trainable(picked, both.text_column())
    once = run(tmp_path / "at once", shard, model_folder, flip=True)
    for column_id in once.columns:
        path = Path(column_id) / "00000.safetensors"
        assert (once.path / path).read_bytes() == (both.path / path).read_bytes()


def test_every_kind_of_crop_has_a_fingerprint_of_its_own(model_folder):
    model = find_model(str(model_folder))
    ids = [
        column.column_id
        for step, flip in itertools.product((0, 8, 16), (False, True))
        for column in image_columns(model, [64], "float32", bucket_step=step, flip=flip)
    ]
    assert len(set(ids)) == 6  # plain and flipped of squares and of two kinds of buckets


def test_nothing_is_decoded_as_something_else_by_its_name():
    """A crop of a bmp, a png, and a lossless webp of one picture are one crop."""
    image = noise(77, 99)
    options = {"WEBP": {"lossless": True}}
    found = [
        cut(image_bytes(image, name, **options.get(name, {})), square(56))[0]
        for name in ("PNG", "BMP", "TIFF", "WEBP", "PPM")
    ]
    assert all(np.array_equal(found[0], other) for other in found)
