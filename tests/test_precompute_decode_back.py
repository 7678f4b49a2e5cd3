"""`verify --decode`: latents decode to the images that they were made from, or are reported."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import (
    TINY_MODEL,
    image_bytes,
    rewrite_receipt,
    sample_members,
    smooth_image,
    status_of,
    write_tar,
)
from PIL import Image

from precompute.config import PrecomputeConfig
from precompute.decode_back import MAX_RELATIVE_ERROR, decode_back
from precompute.job import precompute
from shards.arrays import map_arrays, save_arrays
from shards.checksum import row_checksums
from shards.column import Json
from shards.dataset import Dataset
from shards.errors import DatasetError, UserError
from shards.manifest import write_manifest
from shards.receipt import Receipt, file_facts, read_receipt
from shards.verify import iter_problems

NUM_SHARDS, PER_SHARD = 2, 5


def write_images(folder: Path, seed: int = 0, side: int = 64) -> Path:
    """Smooth pictures; one is broken and one too small, so that rows and ledger rows differ."""
    rng = np.random.default_rng(seed)
    for shard in range(NUM_SHARDS):
        members: list[tuple[str, bytes]] = []
        for number in range(PER_SHARD + 2):
            small = side // 2 if number == 3 else side
            image = smooth_image(rng, small, small + 8 * (number % 2))
            data = b"broken" if number == 1 else image_bytes(image)
            members += sample_members(f"{shard}{number}", data, f"caption {number}")
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """`made(latents)`: images and the dataset of them; shared, to be copied before a change."""
    done: dict[str, tuple[Path, Path]] = {}

    def make(latents: str = "moments") -> tuple[Path, Path]:
        if latents not in done:
            folder = tmp_path_factory.mktemp(latents)
            images = write_images(folder / "images")
            settings: dict[str, Any] = {"model": str(TINY_MODEL), "resolutions": "64"}
            settings |= {"text": "ids", "device": "cpu", "latents": latents, "max_drop_frac": 1.0}
            out = folder / "latents"
            precompute(PrecomputeConfig(shards=f"{images}/*.tar", out=str(out), **settings))
            done[latents] = images, out
        return done[latents]

    return make


@pytest.fixture
def dataset(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> Path:
    """A copy of the dataset of moments; its sources are where they were."""
    return shutil.copytree(made("moments")[1], tmp_path / "latents")


def rewrite(dataset: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Write other latents with checksums and receipts that fit: what a faulty job would leave."""
    for path in dataset.glob("moments-64-*/*.safetensors"):
        arrays = {name: np.array(array) for name, array in map_arrays(path).items()}
        arrays["moments"] = change(arrays["moments"].astype(np.float32)).astype(np.float16)
        arrays["checksum"] = row_checksums([arrays["moments"]])
        fields = vars(read_receipt(path.with_suffix(".json")))
        save_arrays(path, arrays)
        rewrite_receipt(path, Receipt(**{**fields, **file_facts(path)}))
    write_manifest(dataset)
    assert list(iter_problems(dataset, full=True)) == [], "no hash can tell"


def repoint(dataset: Path, images: Path) -> None:
    """Let the receipts name sources elsewhere."""
    for path in dataset.glob("moments-64-*/*.safetensors"):
        fields = vars(read_receipt(path.with_suffix(".json")))
        source = {**fields["source"], "url": str(images / f"{path.stem}.tar")}
        rewrite_receipt(path, Receipt(**{**fields, "source": source}))


def decoded(dataset: Path, num_samples: int = 4, model: str = "") -> Json:
    (column,) = decode_back(Dataset(dataset), num_samples, model)
    return column


def with_means(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    def changed(moments: np.ndarray) -> np.ndarray:
        return np.concatenate([change(moments[:, :4]), moments[:, 4:]], axis=1)

    return changed


def flat_psnr(images: Path) -> float:
    """What an answer that knows only the average colour would reach."""
    rng, psnrs = np.random.default_rng(0), []
    for _ in range(10):
        pixels = np.asarray(smooth_image(rng, 64, 64)).astype(np.float64)
        error = np.square(pixels - pixels.mean(axis=(0, 1))).mean()
        psnrs.append(10 * math.log10(255**2 / error))
    return float(np.median(psnrs))


# What is right ------------------------------------------------------------------------------------


@pytest.mark.parametrize("latents", ["moments", "mean", "moments-int8", "mean-int8"])
def test_good_latents_decode_to_their_images(made, latents):
    images, dataset = made(latents)
    column = decoded(dataset)
    assert column["column"] == Dataset(dataset).image_column(64).column_id
    assert column["samples"] == 4
    assert column["problem"] == ""
    assert column["psnr_db"]["median"] > flat_psnr(images) + 3
    assert column["relative_error"] < MAX_RELATIVE_ERROR / 5
    assert column["psnr_db"]["min"] <= column["psnr_db"]["median"]
    assert 0.5 < column["latent_std"] < 2


def test_the_statistics_are_those_of_the_scaled_means(made):
    _, path = made("moments")
    dataset = Dataset(path)
    image = dataset.image_column(64)
    means = np.concatenate([image.map_shard(s)["moments"][:, :4] for s in sorted(image.shards)])
    scaled = means.astype(np.float64) * image.spec.scaling_factor
    column = decoded(path, num_samples=1000)
    assert column["samples"] == len(means) == NUM_SHARDS * PER_SHARD
    assert column["latent_mean"] == pytest.approx(scaled.mean(), abs=1e-4)
    assert column["latent_std"] == pytest.approx(scaled.std(), abs=1e-4)


def test_the_psnr_is_that_of_the_vaes_reconstruction(made):
    """Against diffusers itself: image in, reconstruction out, for every sample."""
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(TINY_MODEL, subfolder="vae", torch_dtype=torch.float32)
    rng, psnrs = np.random.default_rng(0), []
    for _ in range(NUM_SHARDS):
        for number in range(PER_SHARD + 2):
            side = 32 if number == 3 else 64
            image = smooth_image(rng, side, side + 8 * (number % 2))
            if number in (1, 3):
                continue
            pixels = np.asarray(image)
            top = (pixels.shape[0] - 64) // 2
            square = torch.from_numpy(pixels[top : top + 64].copy()).permute(2, 0, 1)[None]
            with torch.inference_mode():
                mean = vae.encode(square.float() / 127.5 - 1).latent_dist.mean
                back = (vae.decode(mean).sample.clamp(-1, 1) + 1) * 127.5
            error = (back - square).double().square().mean().item()
            psnrs.append(10 * math.log10(255**2 / error))
    column = decoded(made("moments")[1], num_samples=100)
    assert column["psnr_db"]["median"] == pytest.approx(np.median(psnrs), abs=0.1)
    assert column["psnr_db"]["min"] == pytest.approx(min(psnrs), abs=0.1)


@pytest.mark.parametrize("num_samples", [1, 2, 9, 10, 11])
def test_as_many_samples_as_asked_for_or_as_there_are(made, num_samples):
    assert decoded(made("moments")[1], num_samples)["samples"] == min(num_samples, 10)


def test_the_same_samples_are_chosen_every_time(made):
    assert decoded(made("moments")[1]) == decoded(made("moments")[1])


def test_the_command_says_what_it_found_and_ends_with_status_zero(made, capsys):
    _, dataset = made("moments")
    assert status_of("verify", "--decode", "4", dataset) == 0
    out = capsys.readouterr().out
    assert "4 samples decoded, PSNR" in out
    assert out.endswith(f"{dataset}: clean (receipts, lengths and sums checked)\n")
    assert status_of("verify", "--decode", "4", "--json", dataset) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["problems"] == []
    assert document["decoded"] == [decoded(dataset)]


def test_every_image_column_is_decoded(made, tmp_path):
    images, _ = made("moments")
    settings: dict[str, Any] = {"shards": f"{images}/*.tar", "out": str(tmp_path / "latents")}
    settings |= {"model": str(TINY_MODEL), "text": "ids", "device": "cpu"}
    precompute(PrecomputeConfig(resolutions="32,64", **settings))
    precompute(PrecomputeConfig(resolutions="64", latents="mean", **settings))
    dataset = Dataset(tmp_path / "latents")
    found = {column["column"].rpartition("-")[0] for column in decode_back(dataset, 2)}
    assert found == {"moments-32", "moments-64", "mean-64"}


# Images that cannot be had ------------------------------------------------------------------------


def test_without_the_images_latents_are_still_decoded_and_nothing_is_held_against_them(
    dataset, tmp_path, capsys
):
    repoint(dataset, tmp_path / "nowhere")
    write_manifest(dataset)
    column = decoded(dataset)
    assert column["psnr_db"] is None
    assert column["samples"] == 4
    assert column["problem"] == ""
    assert status_of("verify", "--decode", "4", dataset) == 0
    assert "4 samples decoded, no images" in capsys.readouterr().out


def test_images_of_some_shards_alone_are_compared(dataset, made, tmp_path):
    images = shutil.copytree(made("moments")[0], tmp_path / "images")
    (images / "00000.tar").unlink()
    repoint(dataset, images)
    column = decoded(dataset, 10)
    assert column["samples"] == 10
    assert column["psnr_db"] is not None
    assert column["problem"] == ""


def test_a_source_that_is_cut_short_costs_only_its_comparison(dataset, made, tmp_path):
    images = shutil.copytree(made("moments")[0], tmp_path / "images")
    for path in images.glob("*.tar"):
        path.write_bytes(path.read_bytes()[:700])
    repoint(dataset, images)
    column = decoded(dataset, 10)
    assert (column["psnr_db"], column["problem"]) == (None, "")


@pytest.mark.parametrize("side", [64, 96, 48])
def test_other_images_under_the_old_names_are_reported_and_never_a_crash(dataset, tmp_path, side):
    """Also where they are smaller than those that were encoded."""
    repoint(dataset, write_images(tmp_path / "others", seed=7, side=side))
    column = decoded(dataset, 10)
    if side >= 64:
        assert "decoded images are not the source images" in column["problem"]
    else:
        assert column["psnr_db"] is None


# What is wrong ------------------------------------------------------------------------------------

FAULTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "scaled once already": with_means(lambda means: means * 0.18215),
    "scaled by a half": with_means(lambda means: means * 0.5),
    "scaled the wrong way": with_means(lambda means: means / 0.18215),
    "negative": with_means(lambda means: -means),
    "channels in another order": with_means(lambda means: means[:, ::-1]),
    "rows in another order": lambda moments: moments[::-1],
    "log-variances first": lambda moments: np.roll(moments, 4, axis=1),
    "upside down": lambda moments: moments[:, :, ::-1],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_latents_that_no_hash_can_fault_are_found_by_decoding(dataset, capsys, fault):
    rewrite(dataset, FAULTS[fault])
    column = decoded(dataset, 10)
    assert column["problem"].startswith(f"{dataset / column['column']}: ")
    assert status_of("verify", dataset) == 0
    capsys.readouterr()
    assert status_of("verify", "--decode", "10", dataset) == 1
    out = capsys.readouterr().out
    assert column["problem"] in out
    assert "1 problem" in out


@pytest.mark.parametrize("pixels", ["0 to 1", "0 to 255", "BGR"])
def test_images_that_were_normalised_wrongly_are_found(made, tmp_path, monkeypatch, pixels):
    """A real job whose pixels are not in [-1, 1]."""
    import torch

    wrong = {
        "0 to 1": lambda x: x.float() / 255,
        "0 to 255": lambda x: x.float(),
        "BGR": lambda x: x.flip(1).float() / 127.5 - 1,
    }[pixels]
    monkeypatch.setattr(
        "precompute.image_rows.to_pixel_values",
        lambda crops, device: wrong(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)),
    )
    out = tmp_path / "latents"
    settings: dict[str, Any] = {"model": str(TINY_MODEL), "resolutions": "64", "device": "cpu"}
    settings |= {"text": "ids", "max_drop_frac": 1.0}
    precompute(PrecomputeConfig(shards=f"{made('moments')[0]}/*.tar", out=str(out), **settings))
    monkeypatch.undo()
    assert list(iter_problems(out, full=True)) == []
    assert decoded(out, 10)["problem"]
    assert status_of("verify", "--decode", "10", out) == 1


def test_plain_pictures_are_no_fault(tmp_path):
    """A few samples need not have the deviation of a whole dataset: paper is white."""
    rng = np.random.default_rng(0)
    for shard, plain in (("00000", True), ("00001", False)):
        members: list[tuple[str, bytes]] = []
        for number in range(4):
            image = smooth_image(rng, 64, 64)
            if plain:
                image = Image.new("RGB", (64, 64), "white")
            members += sample_members(f"{shard}{number}", image_bytes(image), f"picture {number}")
        write_tar(tmp_path / "images" / f"{shard}.tar", members)
    settings: dict[str, Any] = {"model": str(TINY_MODEL), "resolutions": "64", "device": "cpu"}
    out = tmp_path / "latents"
    precompute(
        PrecomputeConfig(shards=f"{tmp_path}/images/*.tar", out=str(out), text="ids", **settings)
    )
    dataset = Dataset(out)
    dataset.check_trainable(dataset.image_column(64), dataset.text_column())
    column = decoded(out, 1)
    assert column["psnr_db"]["median"] > 20
    assert column["problem"] == ""


# What cannot run ----------------------------------------------------------------------------------


def test_another_vae_is_refused(dataset, model_folder, capsys):
    with pytest.raises(DatasetError, match=r"is not the VAE that moments-64-.* was made with"):
        decoded(dataset, model=str(model_folder))
    assert status_of("verify", "--decode", "2", "--model", model_folder, dataset) == 2
    error = capsys.readouterr().err
    assert str(model_folder / "vae") in error
    assert str(TINY_MODEL) in error
    assert "--model" in error
    assert error.count("\n") == 1


def test_a_copy_of_the_vae_will_do(dataset, tmp_path):
    copy = shutil.copytree(TINY_MODEL, tmp_path / "model")
    assert decoded(dataset, model=str(copy)) == decoded(dataset)


def test_a_model_that_is_gone_is_one_line(dataset, tmp_path, capsys):
    assert status_of("verify", "--decode", "2", "--model", tmp_path / "gone", dataset) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "gone") in error
    assert error.count("\n") == 1


def test_a_dataset_without_images_to_decode_is_an_error_of_the_user(dataset):
    for path in dataset.glob("moments-64-*/*"):
        path.unlink()
    next(dataset.glob("moments-64-*")).rmdir()
    write_manifest(dataset)
    with pytest.raises(UserError, match="no image column"):
        decode_back(Dataset(dataset), 2)


def test_a_column_without_a_row_is_an_error_of_the_user(tmp_path, make_latent_dataset):
    make_latent_dataset(tmp_path, [0], num_tokens=5, dim=8, model=str(TINY_MODEL))
    with pytest.raises(UserError):
        decode_back(Dataset(tmp_path), 2)


@pytest.mark.parametrize("count", ["-1", "many", "1.5"])
def test_a_number_of_samples_that_is_none_has_status_two(dataset, capsys, count):
    assert status_of("verify", f"--decode={count}", dataset) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--decode" in captured.err


def test_a_damaged_shard_is_named_and_not_decoded(dataset, capsys):
    (path,) = dataset.glob("moments-64-*/00000.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    assert status_of("verify", "--decode", "4", dataset) in (1, 2)
    captured = capsys.readouterr()
    assert str(path) in captured.out + captured.err
    assert captured.err.count("\n") <= 1
