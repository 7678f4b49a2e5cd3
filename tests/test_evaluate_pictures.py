"""Pictures to measure, from wherever they are, and what becomes of those that cannot be used."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import image_bytes, sample_members, smooth_image, write_tar
from PIL import Image

from evaluate.generate import prompts_text
from evaluate.generated import Generated
from evaluate.pictures import Pictures
from shards.errors import UserError
from shards.storage import write_text_whole


def pictures_of(source: Pictures, batch_size: int = 4) -> tuple[torch.Tensor, list[str] | None]:
    batches = list(source.batches(batch_size))
    assert all(len(batch.images) == batch_size for batch in batches[:-1])
    captions = [batch.captions for batch in batches]
    joined = None if None in captions else [text for part in captions for text in part]
    return torch.cat([batch.images for batch in batches]), joined


def write_folder(folder: Path, sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    """PNGs of these widths and heights; returns their pixels in the order of their names."""
    rng = np.random.default_rng(0)
    images = [smooth_image(rng, *size) for size in sizes]
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        image.save(folder / f"{number:02d}.png")
    return [np.asarray(image) for image in images]


def test_pictures_of_one_size_come_as_they_are(tmp_path):
    images = write_folder(tmp_path / "a", [(20, 16)] * 6)
    found, captions = pictures_of(Pictures(str(tmp_path / "a")))
    assert captions is None
    assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), np.stack(images))


def test_larger_pictures_are_shrunk_and_cut_and_smaller_ones_left_out_and_counted(tmp_path):
    images = write_folder(tmp_path / "a", [(48, 16), (32, 32), (15, 40), (16, 16)])
    (tmp_path / "a" / "broken.jpg").write_bytes(b"nothing of the kind")
    source = Pictures(str(tmp_path / "a"), size=(16, 16))
    found, _ = pictures_of(source)
    assert found.shape == (3, 3, 16, 16)
    assert np.array_equal(found[0].permute(1, 2, 0).numpy(), images[0][:, 16:32])
    assert dict(source.dropped) == {"too_small": 1, "not_an_image": 1}
    pictures_of(source)
    assert source.dropped["too_small"] == 1, "of the last iteration alone"


def test_a_limit_ends_the_reading(tmp_path):
    write_folder(tmp_path / "a", [(16, 16)] * 6)
    found, _ = pictures_of(Pictures(str(tmp_path / "a"), limit=5))
    assert len(found) == 5


def test_shards_give_pictures_with_their_captions(tmp_path):
    rng = np.random.default_rng(0)
    members = []
    for number in range(5):
        image = smooth_image(rng, 16, 16)
        members += sample_members(f"{number:04d}", image_bytes(image), f"caption {number}")
    members += sample_members("9998", b"", "an empty picture")
    write_tar(tmp_path / "00000.tar", members)
    source = Pictures(str(tmp_path))
    found, captions = pictures_of(source)
    assert len(found) == 5
    assert captions == [f"caption {number}" for number in range(5)]
    assert dict(source.dropped) == {"empty_image": 1}


@pytest.fixture
def generated(tmp_path: Path) -> Generated:
    folder = Generated(tmp_path / "out")
    write_text_whole(folder.folder / "prompts.jsonl", prompts_text(["a", "b", "c"], 0))
    for number in range(3):
        folder.write_image(number, np.full((16, 24, 3), 10 * number, np.uint8))
    return folder


def test_generated_pictures_come_in_the_order_of_their_prompts(generated):
    found, captions = pictures_of(Pictures(str(generated.folder)), batch_size=2)
    assert captions == ["a", "b", "c"]
    assert found[:, 0, 0, 0].tolist() == [0, 10, 20]
    assert found.shape == (3, 3, 16, 24)


def test_generated_pictures_that_are_incomplete_or_of_another_size_are_refused(generated):
    with pytest.raises(UserError, match="pictures of 16x24; wanted 8x8"):
        pictures_of(Pictures(str(generated.folder), size=(8, 8)))
    (generated.folder / "images" / "000001.png").unlink()
    with pytest.raises(UserError, match="1 of 3 images missing"):
        pictures_of(Pictures(str(generated.folder)))


def test_a_source_without_a_picture_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no such image shard"):
        pictures_of(Pictures(str(tmp_path / "gone")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures"):
        pictures_of(Pictures(str(tmp_path / "empty")))
    Image.new("RGB", (8, 8)).save(tmp_path / "empty" / "small.png")
    with pytest.raises(UserError, match=r"no usable picture \(1 too_small\)"):
        pictures_of(Pictures(str(tmp_path / "empty"), size=(16, 16)))
