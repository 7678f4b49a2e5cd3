"""What stage 1 stores is what plain diffusers and transformers calls give."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    NUM_TOO_SMALL,
    RESOLUTIONS,
    TINY_MODEL,
    image_bytes,
    sample_members,
    smooth_image,
    write_tar,
)
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from precompute.config import PrecomputeConfig
from precompute.job import precompute
from precompute.pixels import Picture
from shards.arrays import map_arrays
from shards.column import Json
from shards.dataset import Dataset
from shards.ledger import read_ledger
from shards.receipt import read_receipt
from shards.verify import iter_problems


def read_tar(path: Path) -> list[tuple[Image.Image, str]]:
    """Pictures and captions of an image shard, read with nothing of ours."""
    with tarfile.open(path) as tar:
        parts = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore
    keys = list(dict.fromkeys(name.split(".")[0] for name in parts))
    return [
        (Image.open(io.BytesIO(parts[f"{key}.jpg"])), parts[f"{key}.txt"].decode()) for key in keys
    ]


def plain_pixel_values(image: Image.Image, resolution: int) -> torch.Tensor:
    """Shortest side by torch's bicubic filter, centre crop, [-1, 1]."""
    shortest = min(image.size)
    width, height = (round(side * resolution / shortest) for side in image.size)
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)[0]
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return resized[:, top : top + resolution, left : left + resolution].float() / 127.5 - 1


def plain_moments(model: Path, images: list[Image.Image], resolution: int) -> np.ndarray:
    """One call of the VAE per picture: [N, 2C, h, w] float32."""
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae").eval()
    with torch.inference_mode():
        parts = [
            vae.encode(plain_pixel_values(image, resolution)[None]).latent_dist.parameters
            for image in images
        ]
    return torch.cat(parts).numpy()


def plain_states(model: Path, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and last hidden states of one caption at a time."""
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder").eval()
    ids = tokenizer(
        captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.inference_mode():
        states = torch.cat([encoder(row[None]).last_hidden_state for row in ids])
    return ids.numpy(), states.numpy()


def run(out: Path, shards: Path | str, model: Path, **options: Any) -> Dataset:
    defaults: Json = {"device": "cpu", "batch_size": 4, "resolutions": "32", "max_drop_frac": 1.0}
    precompute(
        PrecomputeConfig(shards=str(shards), out=str(out), model=str(model), **defaults | options)
    )
    assert list(iter_problems(out, full=True)) == []
    return Dataset(out)


def column_file(dataset: Dataset, name: str, shard: str = "00000") -> Path:
    (folder,) = dataset.path.glob(f"{name}-*")
    return folder / f"{shard}.safetensors"


def receipt_of(dataset: Dataset, name: str, shard: str = "00000") -> Any:
    return read_receipt(column_file(dataset, name, shard).with_suffix(".json"))


def statuses(dataset: Dataset, shard: str = "00000") -> dict[str, str]:
    rows = read_ledger(dataset.path / "ledger" / f"{shard}.parquet")
    return {row["key"]: row["status"] for row in rows}


def shard_of(folder: Path, images: dict[str, bytes], caption: str = "a lion") -> Path:
    """One image shard with these samples."""
    members = [m for key, data in images.items() for m in sample_members(key, data, caption)]
    return write_tar(folder / "00000.tar", members)


def png(colour: Any, width: int = 40, height: int = 40) -> bytes:
    return image_bytes(Image.new("RGB", (width, height), colour))


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_moments_are_those_of_plain_diffusers(
    latent_dataset, model_folder, image_shards, resolution
):
    for shard in ("00000", "00001", "00002"):
        arrays = map_arrays(column_file(Dataset(latent_dataset), f"moments-{resolution}", shard))
        images = [image for image, _ in read_tar(image_shards / f"{shard}.tar")]
        fitting = [row for row, image in enumerate(images) if min(image.size) >= resolution]
        assert arrays["row"].tolist() == fitting
        expected = plain_moments(model_folder, [images[row] for row in fitting], resolution)
        assert arrays["moments"].dtype == np.float16
        # half precision keeps 11 bits; the rest is the order of sums in batches
        assert np.allclose(arrays["moments"], expected, rtol=2**-10, atol=1e-5)
        assert np.abs(expected).mean() > 0.1


def test_states_are_those_of_plain_transformers(latent_dataset, model_folder, image_shards):
    for shard in ("00000", "00002"):
        arrays = map_arrays(column_file(Dataset(latent_dataset), "text", shard))
        captions = [caption for _, caption in read_tar(image_shards / f"{shard}.tar")]
        ids, states = plain_states(model_folder, captions)
        assert arrays["input_ids"].shape == (len(set(captions)), 77)
        assert np.array_equal(arrays["input_ids"][arrays["caption"]], ids)
        found = np.array(arrays["states"])[arrays["caption"]]
        assert np.allclose(found, states, rtol=2**-10, atol=1e-5)


def test_every_caption_is_stored_once(latent_dataset):
    arrays = map_arrays(column_file(Dataset(latent_dataset), "text", "00001"))
    assert arrays["states"].shape == (10, 77, 128)  # twenty samples, every caption twice
    assert np.bincount(arrays["caption"]).tolist() == [2] * 10


def test_null_states_are_those_of_the_empty_caption(latent_dataset, model_folder):
    dataset = Dataset(latent_dataset)
    ids, states = plain_states(model_folder, [""])
    found = dataset.read_null(dataset.text_column())["states"]
    assert np.allclose(found, states[0], rtol=2**-10, atol=1e-5)
    assert map_arrays(column_file(dataset, "text", "null"))["input_ids"].tolist() == ids[0].tolist()


def test_a_long_caption_is_cut_as_the_pipelines_cut_it(tmp_path, model_folder):
    long = "a lion beside a tree " * 60
    shard_of(tmp_path, {"a": png("red")}, caption=long)
    dataset = run(tmp_path / "out", tmp_path / "*.tar", model_folder)
    ids, _ = plain_states(model_folder, [long.strip()])
    assert map_arrays(column_file(dataset, "text"))["input_ids"].tolist() == ids.tolist()


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_the_recorded_deviation_is_that_of_sampled_scaled_latents(
    latent_dataset, model_folder, image_shards, resolution
):
    images = [image for n in range(3) for image, _ in read_tar(image_shards / f"0000{n}.tar")]
    fitting = [image for image in images if min(image.size) >= resolution]
    moments = torch.from_numpy(plain_moments(model_folder, fitting, resolution))
    mean, logvar = moments.chunk(2, dim=1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((200, *mean.shape), generator=generator)
    factor = json.loads((model_folder / "vae" / "config.json").read_text())["scaling_factor"]
    latents = factor * (mean + torch.exp(logvar / 2) * noise)
    stats = Dataset(latent_dataset).image_column(resolution).stats
    assert stats["latent_std"] == pytest.approx(latents.std().item(), rel=2e-3)
    assert stats["latent_mean"] == pytest.approx(latents.mean().item(), abs=2e-3)
    assert 0.9 < stats["latent_std"] < 1.1


def test_small_pictures_are_absent_where_they_are_too_small_and_nowhere_else(latent_dataset):
    dataset = Dataset(latent_dataset)
    for resolution, count in NUM_TOO_SMALL.items():
        absent = dataset.image_column(resolution).absent
        assert absent == ({"too_small": count} if count else {})
    assert dataset.text_column().absent == {}
    assert set(statuses(dataset).values()) == {"ok"}


def test_sizes_around_the_resolution(tmp_path, model_folder):
    sizes = {"a": (32, 32), "b": (31, 400), "c": (400, 31), "d": (33, 32), "e": (63, 64)}
    shard_of(tmp_path, {key: png("red", *size) for key, size in sizes.items()})
    dataset = run(tmp_path / "out", tmp_path / "*.tar", model_folder, resolutions="64,32")
    assert map_arrays(column_file(dataset, "moments-32"))["row"].tolist() == [0, 3, 4]
    assert map_arrays(column_file(dataset, "moments-64"))["row"].tolist() == []
    assert receipt_of(dataset, "moments-64").absent == {"too_small": 5}


def test_one_decode_serves_all_resolutions(tmp_path, model_folder, monkeypatch):
    decoded = []

    def counting(self: Picture, divisor: int = 1) -> np.ndarray:
        decoded.append(self._data)
        return decode(self, divisor)

    decode = Picture.decode
    monkeypatch.setattr(Picture, "decode", counting)
    images = {str(n): png((n, 0, 0), 70, 70) for n in range(5)}
    shard_of(tmp_path, images)
    run(tmp_path / "out", tmp_path / "*.tar", model_folder, resolutions="32,40,64")
    assert sorted(decoded) == sorted(images.values())


def test_what_cannot_be_used_is_in_the_ledger_with_its_reason_and_the_job_goes_on(
    tmp_path, model_folder
):
    good = png("red")
    members = [
        *sample_members("good", good, "a lion"),
        *sample_members("empty", b"", "a lion"),
        *sample_members("web page", b"<html>404</html>", "a lion"),
        *sample_members(
            "cut", image_bytes(smooth_image(np.random.default_rng(0), 64, 64))[:900], "x"
        ),
        ("no caption.jpg", good),
        ("no image.txt", b"a lion"),
        *sample_members("small", png("red", 20, 20), "a leaf"),
        *sample_members("also good", good, "a lion"),
    ]
    path = write_tar(tmp_path / "00000.tar", members)
    path.write_bytes(path.read_bytes()[:-12_000] + b"not a header" * 100)
    write_tar(tmp_path / "00001.tar", sample_members("next", good, "a tree"))
    (tmp_path / "00002.tar").write_bytes(b"no tar at all")
    dataset = run(tmp_path / "out", tmp_path / "*.tar", model_folder)
    assert statuses(dataset) == {
        "good": "ok",
        "empty": "empty_image",
        "web page": "not_an_image",
        "cut": "broken_image",
        "no caption": "no_caption",
        "no image": "no_image",
        "small": "ok",
        "<rest of 00000>": "broken_shard",
    }
    assert statuses(dataset, "00001") == {"next": "ok"}
    assert statuses(dataset, "00002") == {"<rest of 00002>": "broken_shard"}
    assert map_arrays(column_file(dataset, "moments-32"))["row"].tolist() == [0]
    caption = map_arrays(column_file(dataset, "text"))["caption"]
    assert caption.tolist() == [0, -1, -1, -1, -1, -1, 1, -1]


def test_rows_in_are_rows_plus_absent_everywhere(tmp_path, model_folder):
    images = {"a": png("red"), "b": b"", "c": png("red", 20, 20), "d": b"x", "e": png("blue")}
    shard_of(tmp_path, images)
    dataset = run(tmp_path / "out", tmp_path / "*.tar", model_folder)
    expected: dict[str, tuple[int, Json]] = {
        "moments-32": (2, {"empty_image": 1, "not_an_image": 1, "too_small": 1}),
        "text": (3, {"empty_image": 1, "not_an_image": 1}),
    }
    for name, (rows, absent) in expected.items():
        receipt = receipt_of(dataset, name)
        assert (receipt.rows_in, receipt.rows, receipt.absent) == (5, rows, absent)
    ledger = read_receipt(dataset.path / "ledger" / "00000.json")
    assert (ledger.rows_in, ledger.rows) == (5, 3)


def test_the_ledger_says_where_a_sample_came_from(tmp_path, model_folder):
    import hashlib

    exif = Image.Exif()
    exif[0x0112] = 6
    turned = image_bytes(Image.new("RGB", (48, 40)), exif=exif)
    write_tar(
        tmp_path / "00000.tar",
        [
            *sample_members("../a", turned, " a lion ", {"width": 9, "punsafe": 0.5}),
            ("b.jpg", b"x"),
        ],
    )
    dataset = run(tmp_path / "out", tmp_path / "*.tar", model_folder)
    names = ["key", "caption", "url", "width", "height", "sha256", "punsafe", "source_width"]
    first, second = read_ledger(dataset.path / "ledger" / "00000.parquet", names)
    assert first == {
        "key": "../a",
        "caption": "a lion",
        "url": "https://images.test/../a",
        "width": 40,
        "height": 48,
        "sha256": hashlib.sha256(turned).hexdigest(),
        "punsafe": 0.5,
        "source_width": 9,
    }
    assert second["width"] is None
    assert second["sha256"] == hashlib.sha256(b"x").hexdigest()
    source = receipt_of(dataset, "text").source
    data = (tmp_path / "00000.tar").read_bytes()
    assert source == {
        "url": str(tmp_path / "00000.tar"),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def test_a_shard_without_a_single_good_sample_is_written_like_any_other(tmp_path, model_folder):
    shard_of(tmp_path, {"a": b"x", "b": b""})
    write_tar(tmp_path / "00001.tar", [])
    shard_of(tmp_path / "more", {"c": png("red")}).rename(tmp_path / "00002.tar")
    dataset = run(tmp_path / "out", tmp_path / "*.tar", model_folder)
    for shard, rows_in in (("00000", 2), ("00001", 1)):  # an empty one has a row that says so
        arrays = map_arrays(column_file(dataset, "moments-32", shard))
        assert arrays["moments"].shape == (0, 8, 4, 4)
        assert map_arrays(column_file(dataset, "text", shard))["states"].shape == (0, 77, 128)
        receipt = receipt_of(dataset, "moments-32", shard)
        assert (receipt.rows, receipt.rows_in, receipt.stats) == (0, rows_in, {})
    assert dataset.image_column(32).num_rows == 1
    dataset.check_trainable(dataset.image_column(32), dataset.text_column())


def test_strange_metadata_costs_no_job(tmp_path, model_folder):
    strange: list[Json] = [
        {"x": 1, "deep": {"a": [1, None]}, "key": "theirs", "": "no name"},
        {"x": "text", "deep": None, "source_key": 3, "exif": "\u0000"},
        {"x": None, "big": 2**80, "nan": float("nan"), "url": 7},
    ]
    members = [
        member
        for number, metadata in enumerate(strange)
        for member in sample_members(f"{number}", png("red"), "a lion", metadata)
    ]
    write_tar(tmp_path / "00000.tar", [*members, ("3.jpg", png("red")), ("3.json", b'"\\ud800"')])
    dataset = run(tmp_path / "out", tmp_path / "*.tar", model_folder)
    assert statuses(dataset) == {"0": "ok", "1": "ok", "2": "ok", "3": "broken_json"}


@pytest.fixture
def overflowing_vae(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let pictures of one colour come out of the VAE as infinite in some precisions."""

    def patch(colour: tuple[int, int, int], dtypes: set[torch.dtype]) -> None:
        encode = AutoencoderKL.encode
        wanted = torch.tensor(colour) / 127.5 - 1

        def overflowing(self: AutoencoderKL, x: torch.Tensor, *args: Any) -> Any:
            encoded = encode(self, x, *args)
            hit = (x[:, :, 0, 0].float().cpu() - wanted).abs().amax(dim=1) < 0.02
            if x.dtype in dtypes:
                encoded.latent_dist.parameters[hit, 3, 1, 2] = float("inf")
            return encoded

        monkeypatch.setattr(AutoencoderKL, "encode", overflowing)

    return patch


COLOURED = {"0": png("red"), "1": png("lime"), "2": png("blue"), "3": png("lime"), "4": png("red")}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_sample_that_overflows_in_half_precision_is_encoded_in_float32_and_counted(
    tmp_path, model_folder, overflowing_vae, dtype
):
    shard_of(tmp_path, COLOURED)
    exact = run(tmp_path / "exact", tmp_path / "*.tar", model_folder)
    overflowing_vae((0, 255, 0), {torch.float16, torch.bfloat16})
    dataset = run(tmp_path / "out", tmp_path / "*.tar", model_folder, dtype=dtype)
    receipt = receipt_of(dataset, "moments-32")
    assert receipt.stats["float32_fallbacks"] == 2
    assert (receipt.rows, receipt.absent) == (5, {})
    found, wanted = (
        map_arrays(column_file(each, "moments-32"))["moments"].astype(float)
        for each in (dataset, exact)
    )
    assert np.allclose(found, wanted, atol=0.02 if dtype == "float16" else 0.2)
    assert np.allclose(found[[1, 3]], wanted[[1, 3]], atol=1e-3)  # these two were in float32


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_sample_that_is_never_finite_is_absent_and_counted(
    tmp_path, model_folder, overflowing_vae, dtype
):
    shard_of(tmp_path, COLOURED)
    overflowing_vae((0, 255, 0), {torch.float16, torch.float32})
    dataset = run(tmp_path / "out", tmp_path / "*.tar", model_folder, dtype=dtype)
    arrays = map_arrays(column_file(dataset, "moments-32"))
    assert arrays["row"].tolist() == [0, 2, 4]
    assert np.isfinite(arrays["moments"]).all()
    receipt = receipt_of(dataset, "moments-32")
    assert (receipt.rows, receipt.absent) == (3, {"not_finite": 2})
    assert np.isfinite(receipt.stats["latent_std"])
    assert set(statuses(dataset).values()) == {"ok"}  # the pictures are good; this VAE is not


def test_moments_beyond_half_precision_are_absent_and_counted(tmp_path, model_folder, monkeypatch):
    """float32 holds them, the file cannot."""
    encode = AutoencoderKL.encode

    def large(self: AutoencoderKL, x: torch.Tensor, *args: Any) -> Any:
        encoded = encode(self, x, *args)
        encoded.latent_dist.parameters[0, 0, 0, 0] = 70_000.0
        return encoded

    monkeypatch.setattr(AutoencoderKL, "encode", large)
    shard_of(tmp_path, COLOURED)
    dataset = run(tmp_path / "out", tmp_path / "*.tar", model_folder, batch_size=5)
    assert map_arrays(column_file(dataset, "moments-32"))["row"].tolist() == [1, 2, 3, 4]
    assert receipt_of(dataset, "moments-32").absent == {"not_finite": 1}


def test_a_text_encoder_that_is_not_finite_stops_the_job_and_names_the_caption(
    tmp_path, model_folder, monkeypatch
):
    forward = CLIPTextModel.forward

    def poisoned(self: CLIPTextModel, *args: Any, **options: Any) -> Any:
        output = forward(self, *args, **options)
        output.last_hidden_state[-1, 5, 5] = float("nan")
        return output

    monkeypatch.setattr(CLIPTextModel, "forward", poisoned)
    shard_of(tmp_path, COLOURED)
    with pytest.raises(Exception, match="not finite"):
        run(tmp_path / "out", tmp_path / "*.tar", model_folder)
    assert list((tmp_path / "out").rglob("*.safetensors")) == []


def test_real_pictures_through_the_embedded_model(tmp_path, emoji_shards):
    dataset = run(tmp_path, emoji_shards / "00000.tar", TINY_MODEL, resolutions="64", batch_size=32)
    assert len(statuses(dataset)) == 492
    assert set(statuses(dataset).values()) == {"ok"}
    column = dataset.image_column(64)
    assert column.num_rows == 492
    assert 0.9 < column.stats["latent_std"] < 1.1
    dataset.check_trainable(column, dataset.text_column())
