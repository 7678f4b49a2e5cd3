"""Training straight from image shards: the samples, order, latents and states of the cached way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import image_bytes, sample_members, smooth_image, write_tar

from precompute.config import PrecomputeConfig
from precompute.decoding import decode_sample
from precompute.filters import Filter
from precompute.image_encoder import ImageEncoder, to_pixel_values
from precompute.job import precompute
from precompute.model_folder import find_model
from precompute.online import OnlineBatches, open_online
from precompute.online_encoders import Encoders, online_columns
from precompute.transform import Crop
from shards.batch import LatentBatch
from shards.dataset import Dataset
from shards.errors import DatasetError, UserError
from shards.image_index import ShardIndex
from shards.reader import LatentReader
from train.unet import check_fits, load_unet_config

CPU = torch.device("cpu")
ROUNDING = {"rtol": 2**-11 * 1.1, "atol": 1e-5}  # of float16; and a batch's company
ORDER = {"seed": 3, "global_batch_size": 8, "num_partitions": 4}

Write = Callable[..., str]


@pytest.fixture
def open_batches(model_folder: Path) -> Callable[..., OnlineBatches]:
    """`open_batches(shards, resolution=64, **settings)` with the order's usual ones."""

    def build(shards: Path | str, resolution: int = 64, **settings: Any) -> OnlineBatches:
        columns = online_columns(str(model_folder), resolution, CPU)
        defaults: dict[str, Any] = {"device": CPU, "num_workers": 2, **ORDER}
        return open_online(str(shards), *columns, **(defaults | settings))

    return build


@pytest.fixture
def write_shard(tmp_path: Path) -> Write:
    """`write_shard("00000", b"...", None)`: a sample for each, None is a picture; the folder."""

    def write(name: str, *images: bytes | None) -> str:
        rng = np.random.default_rng(len(name) + len(images))
        members: list[tuple[str, bytes]] = []
        for number, data in enumerate(images):
            data = image_bytes(smooth_image(rng, 70, 64), "JPEG") if data is None else data
            members += sample_members(f"{name}-{number}", data, f"a lion number {number}")
        write_tar(tmp_path / "shards" / f"{name}.tar", members)
        return str(tmp_path / "shards")

    return write


def take(batches: OnlineBatches, count: int, first: int = 0, last: int = 8) -> list[LatentBatch]:
    """The first batches of the rank that has the positions `first` to `last`."""
    with closing(batches.iter_batches(0, range(first, last))) as source:  # type: ignore[type-var]
        return list(islice(source, count))


def reader_of(latents: Path, resolution: int, **settings: Any) -> LatentReader:
    dataset = Dataset(latents)
    image, text = dataset.image_column(resolution), dataset.text_column()
    flipped = dataset.flipped_column(image) if "flip_prob" in settings else None
    return LatentReader(dataset, image, text, flipped=flipped, **(ORDER | settings))


def broken_picture(seed: int = 0) -> bytes:
    """Its header is whole, its pixels are not."""
    image = smooth_image(np.random.default_rng(seed), 64, 64)
    data = image_bytes(image, "JPEG", quality=95)
    return data[: data.index(b"\xff\xda") + 200]  # behind the start of the scan


# Online is cached --------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [32, 64])
def test_samples_and_their_order_are_those_of_the_cached_run(
    open_batches, image_shards, latent_dataset, resolution
):
    reader = reader_of(latent_dataset, resolution)
    online = open_batches(image_shards, resolution)
    for encoded, stored in zip(
        take(online, 16), reader.iter_batches(0, range(8)), strict=False
    ):  # beyond one epoch
        assert encoded.step == stored.step
        np.testing.assert_array_equal(encoded.samples, stored.samples)
        assert online.keys_of(encoded.samples) == reader.keys_of(stored.samples)
    assert online.epoch_at(5) == reader.epoch_at(5)


def test_latents_and_states_are_the_stored_ones_but_for_rounding(
    open_batches, image_shards, latent_dataset
):
    reader, online = reader_of(latent_dataset, 64), open_batches(image_shards)
    for encoded, stored in zip(take(online, 7), reader.iter_batches(0, range(8)), strict=False):
        assert encoded.moments.dtype == encoded.states.dtype == torch.float32
        np.testing.assert_allclose(encoded.moments.numpy(), stored.moments, **ROUNDING)
        np.testing.assert_allclose(encoded.states.numpy(), stored.states, **ROUNDING)
    np.testing.assert_allclose(online.null_states, reader.null_states, **ROUNDING)
    assert online.latent_shape == reader.latent_shape
    assert online.scaling_factor == reader.scaling_factor


def test_in_equal_company_latents_are_those_of_stage_one_to_the_last_bit(
    open_batches, image_shards, model_folder
):
    image, _ = online_columns(str(model_folder), 64, CPU)
    stage_one = ImageEncoder(find_model(str(model_folder)), CPU, torch.float32)
    online = open_batches(image_shards)
    rows = {}
    for number in range(3):
        index = ShardIndex(str(image_shards / f"{number:05d}.tar"))
        samples = [index.read(row) for row in range(len(index))]
        rows |= {f"{number:05d}/{sample.key}": sample for sample in samples}
    for batch in take(online, 3):
        samples = [rows[key] for key in online.keys_of(batch.samples)]
        crops = [decode_sample(s, [Crop.of_column(image.spec)], Filter("")).crops for s in samples]
        pixel_values = to_pixel_values([crop[0][1] for crop in crops], CPU)
        assert torch.equal(batch.moments, stage_one.launch(pixel_values))


def test_of_samples_encoded_one_by_one_what_is_stored_is_the_float16_of_it(
    open_batches, write_shard, model_folder, tmp_path
):
    for name in ("00000", "00001", "00002"):  # a caption a shard, so that states are alone as well
        folder = write_shard(name, None)
    precompute(
        PrecomputeConfig(
            shards=folder,
            out=str(tmp_path / "latents"),
            model=str(model_folder),
            resolutions="64",
            device="cpu",
            batch_size=1,
        )
    )
    alone = {"global_batch_size": 1, "num_partitions": 1}
    reader = reader_of(tmp_path / "latents", 64, **alone)
    encoded = take(open_batches(folder, **alone), 6, 0, 1)
    for batch, stored in zip(encoded, reader.iter_batches(0, range(1)), strict=False):
        np.testing.assert_array_equal(batch.moments.half().numpy(), stored.moments)
        np.testing.assert_array_equal(batch.states.half().numpy(), stored.states)


def test_mirrored_images_are_those_that_a_cached_run_mirrors(
    open_batches, image_shards, model_folder, tmp_path
):
    precompute(
        PrecomputeConfig(
            shards=str(image_shards),
            out=str(tmp_path / "latents"),
            model=str(model_folder),
            resolutions="32",
            device="cpu",
            flip=True,
        )
    )
    reader = reader_of(tmp_path / "latents", 32, flip_prob=0.5)
    mirrored, plain = open_batches(image_shards, 32, flip_prob=0.5), open_batches(image_shards, 32)
    num_changed = 0
    for encoded, stored, as_it_is in zip(
        take(mirrored, 4), reader.iter_batches(0, range(8)), take(plain, 4), strict=False
    ):
        np.testing.assert_allclose(encoded.moments.numpy(), stored.moments, **ROUNDING)
        changed = (encoded.moments - as_it_is.moments).abs().flatten(1).amax(1) > 1e-3
        num_changed += int(changed.sum())
    assert 4 < num_changed < 28  # of 32


def test_a_share_larger_than_an_encoders_batch_comes_whole_and_in_order(model_folder):
    encoders = Encoders(*online_columns(str(model_folder), 32, CPU), CPU)
    rng = np.random.default_rng(0)
    squares = [np.asarray(smooth_image(rng, 32, 32)) for _ in range(70)]
    captions = [f"a lion number {number}" for number in range(70)]
    moments, states = encoders.encode_images(squares), encoders.encode_texts(captions)
    for number in (0, 31, 32, 69):
        alone = encoders.encode_images(squares[number : number + 1])
        np.testing.assert_allclose(moments[number : number + 1], alone, atol=1e-4)
        alone = encoders.encode_texts(captions[number : number + 1])
        np.testing.assert_allclose(states[number : number + 1], alone, atol=1e-4)
    assert len(moments) == len(states) == 70
    assert not moments.is_inference()  # autograd would not save such a one
    assert not states.is_inference()


# Functions of the step ---------------------------------------------------------------------------

RANDOM = {"random_crop": True, "flip_prob": 0.5}


def test_a_resumed_run_sees_the_batches_that_it_would_have_seen(open_batches, write_shard):
    write_shard("00000", *[None] * 9, broken_picture(), *[None] * 9)
    folder = write_shard("00001", broken_picture(), *[None] * 13)
    through = take(open_batches(folder, **RANDOM), 12)
    for first in (1, 7, 11):  # in mid-epoch, and in another
        resumed = open_batches(folder, **RANDOM)
        batch = next(resumed.iter_batches(first, range(8)))
        assert batch.step == first
        np.testing.assert_array_equal(batch.samples, through[first].samples)
        assert torch.equal(batch.moments, through[first].moments)
        assert torch.equal(batch.states, through[first].states)


def test_two_processes_see_the_global_batch_of_one(open_batches, write_shard):
    write_shard("00000", *[None] * 5, broken_picture(), *[None] * 9)
    folder = write_shard("00001", *[None] * 13)
    one = take(open_batches(folder, **RANDOM), 8)
    halves = [take(open_batches(folder, **RANDOM), 8, *part) for part in ((0, 4), (4, 8))]
    for whole, *parts in zip(one, *halves, strict=True):
        np.testing.assert_array_equal(
            whole.samples, np.concatenate([part.samples for part in parts])
        )
        moments = torch.cat([part.moments for part in parts])
        np.testing.assert_allclose(whole.moments, moments, atol=1e-4)
        states = torch.cat([part.states for part in parts])
        np.testing.assert_allclose(whole.states, states, atol=1e-4)


def test_the_identity_is_that_of_all_that_the_batches_depend_on(
    open_batches, write_shard, image_shards, tmp_path
):
    folder = write_shard("00000", *[None] * 16)
    same = open_batches(folder).identity
    assert same == open_batches(folder, num_workers=1).identity
    others = [
        open_batches(folder, 32),
        *(open_batches(folder, **{name: 2}) for name in ("seed", "num_partitions", "window")),
        open_batches(folder, global_batch_size=16),
        open_batches(folder, random_crop=True),
        open_batches(folder, flip_prob=0.5),
        open_batches(image_shards),
    ]
    write_shard("00000", *[None] * 17)
    others.append(open_batches(folder))
    assert len({same, *(other.identity for other in others)}) == 1 + len(others)


# What cannot be used -----------------------------------------------------------------------------


def test_what_cannot_be_trained_on_is_counted_in_stage_ones_words(
    open_batches, tmp_path, model_folder
):
    rng = np.random.default_rng(0)
    good = image_bytes(smooth_image(rng, 64, 64), "JPEG")
    folder = tmp_path / "shards"
    members = [
        *sample_members("0", good, "a lion"),
        *sample_members("1", image_bytes(smooth_image(rng, 63, 200), "JPEG"), "a small lion"),
        ("2.jpg", good),  # no caption
        *sample_members("3", b"<html>", "no lion"),
        *sample_members("4", b"", "no bytes"),
        ("5.txt", b"no image"),
        *sample_members("6", image_bytes(smooth_image(rng, 1400, 64), "JPEG"), "a snake"),
        ("7.jpg", good),
        ("7.json", b'{"caption": "from the json"}'),
        *sample_members("0", good, "the same key again"),
    ]
    write_tar(folder / "00000.tar", members)
    write_tar(folder / "00001.tar", [])
    whole = write_tar(folder / "00002.tar", [*members[:3], *members[3:6]]).read_bytes()
    (folder / "00002.tar").write_bytes(whole[: whole.index(b"1.jpg") + 600])
    lines: list[str] = []
    two = {"global_batch_size": 2, "num_partitions": 1, "say": lines.append}
    online = open_batches(folder, **two)
    reasons = {"too_small", "no_caption", "not_an_image", "empty_image", "no_image"}
    reasons |= {"absurd_aspect_ratio", "duplicate_key", "no_samples", "broken_shard"}
    assert lines[-1].startswith("online: 3 samples in 3 image shards; left out: ")
    assert set(lines[-1].split(": ")[2].split(", ")) == {f"1 {reason}" for reason in reasons}
    served = {key for batch in take(online, 6, 0, 2) for key in online.keys_of(batch.samples)}
    assert served == {"00000/0", "00000/7", "00002/0"}
    config = PrecomputeConfig(
        shards=str(folder),
        out=str(tmp_path / "latents"),
        model=str(model_folder),
        resolutions="64",
        device="cpu",
        max_drop_frac=1.0,
    )
    absent = precompute(config)["columns"]
    (image,) = [entry for name, entry in absent.items() if name.startswith("moments")]
    assert image["absent"] == dict.fromkeys(reasons, 1)


def test_the_next_of_its_shard_takes_the_place_of_an_image_that_cannot_be_decoded(
    open_batches, write_shard
):
    lines: list[str] = []
    write_shard("00000", None, broken_picture(), broken_picture(1), None)
    folder = write_shard("00001", None, None, None, broken_picture())
    online = open_batches(folder, say=lines.append)
    assert lines.pop() == "online: 8 samples in 2 image shards"
    batches = take(online, 4)
    keys = [online.keys_of(batch.samples) for batch in batches]
    for served in keys:  # the whole of an epoch each, the last of a shard followed by its first
        wanted = ["00000-0", "00000-3", "00000-3", "00000-3"]
        wanted += ["00001-0", "00001-0", "00001-1", "00001-2"]
        assert sorted(key.split("/")[1] for key in served) == wanted
    assert "could not be decoded" in lines[0]
    assert lines[-1].startswith("online: 3 images")
    assert "(3 broken_image)" in lines[-1]
    twins = [batches[0].moments[at] for at, key in enumerate(keys[0]) if key.endswith("00000-3")]
    assert all(torch.allclose(twins[0], twin, atol=1e-5) for twin in twins)


def test_many_such_images_are_said_now_and_then_and_all_at_the_end(open_batches, write_shard):
    lines: list[str] = []
    bad = [broken_picture(seed) for seed in range(13)]
    folder = write_shard("00000", *bad, *[None] * 11)
    take(open_batches(folder, say=lines.append, num_workers=1), 4)
    counts = [int(line.split()[1]) for line in lines[1:]]
    assert counts == [1, 2, 4, 8, 13]


def test_a_shard_of_which_nothing_can_be_decoded_is_named(open_batches, write_shard):
    folder = write_shard("00007", *(broken_picture(seed) for seed in range(8)))
    with pytest.raises(UserError, match="00007: none of its 8 images can be decoded"):
        take(open_batches(folder), 1)


def test_shards_without_a_usable_sample_are_refused(open_batches, write_shard):
    folder = write_shard("00000", b"no image", None)
    with pytest.raises(UserError, match=r"1 not_an_image, 1 too_small.*images of 128 px or more"):
        open_batches(folder, 128)


def test_a_shard_that_changes_in_mid_run_is_named(open_batches, write_shard, tmp_path):
    folder = write_shard("00000", *[None] * 8)
    online = open_batches(folder)
    write_tar(tmp_path / "shards" / "00000.tar", sample_members("0", b"x" * 700, "another"))
    with pytest.raises(UserError, match=r"00000.*any more"):
        take(online, 1)


@pytest.mark.parametrize("name", ["00000.tar.gz", "00000.parquet"])
def test_shards_that_only_stage_one_can_read_are_refused_with_what_to_do(
    open_batches, tmp_path, name
):
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    if name.endswith("gz"):
        (tmp_path / name).write_bytes(gzip.compress(bytes(1024)))
    else:
        pq.write_table(pa.table({"jpg": [b"x"], "caption": ["a lion"]}), tmp_path / name)
    with pytest.raises(UserError, match=r"by position.*Remedy: copy or unpack.*or precompute"):
        open_batches(tmp_path / name)


def test_a_model_must_be_named_and_must_fit_the_unet(model_folder):
    with pytest.raises(UserError, match="wanted --model"):
        online_columns("", 64, CPU)
    image, text = online_columns(str(model_folder), 64, CPU)
    check_fits(load_unet_config("tiny"), image, text)
    with pytest.raises(DatasetError, match=r"text_encoder: text states of width 128 from .*1024"):
        check_fits(load_unet_config("sd2-base"), image, text)


def test_captions_to_draw_images_of_are_different_ones_from_all_over(open_batches, image_shards):
    online = open_batches(image_shards, 32)
    few, all_of_them = online.captions(3), online.captions(99)
    numbers = [int(caption.split()[-1]) for caption in few]  # of 60 samples each caption has two
    assert numbers == [0, 10, 20]
    assert len(all_of_them) == len(set(all_of_them)) == 30
    assert online.captions(0) == []


# Threads and files -------------------------------------------------------------------------------


def our_threads() -> Iterator[threading.Thread]:
    names = ("prefetch", "decode", "index")
    return (thread for thread in threading.enumerate() if thread.name.startswith(names))


def test_no_thread_is_left_when_the_batches_are_closed(open_batches, image_shards):
    before = set(our_threads())
    source = open_batches(image_shards).iter_batches(0, range(8))
    next(source)
    assert set(our_threads()) > before
    source.close()
    assert set(our_threads()) <= before


def test_no_thread_is_left_when_an_image_shard_fails(open_batches, write_shard):
    before = set(our_threads())
    folder = write_shard("00000", *(broken_picture(seed) for seed in range(8)))
    source = open_batches(folder).iter_batches(0, range(8))
    with pytest.raises(UserError):
        next(source)
    assert set(our_threads()) <= before


def test_no_image_shard_stays_open(open_batches, image_shards):
    online = open_batches(image_shards)  # of tens of thousands, the system would not allow it
    take(online, 8)
    online.keys_of(np.arange(54))
    assert not [file for file in psutil.Process().open_files() if file.path.endswith(".tar")]


def test_only_one_process_of_a_run_says_what_all_of_them_find(open_batches, image_shards, capsys):
    open_batches(image_shards, quiet=True)
    assert capsys.readouterr().out == ""
    open_batches(image_shards)
    assert "online: 54 samples in 3 image shards; left out: 6 too_small" in capsys.readouterr().out
