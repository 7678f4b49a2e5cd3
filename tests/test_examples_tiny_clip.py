"""The embedded CLIP: that its folder loads as any does, and what it can tell apart."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

from evaluate.clip import Clip, clip_scores
from evaluate.metrics import frechet_distance
from evaluate.reference import Reference
from examples.grammar import caption_of, sample_scene
from examples.render import render
from examples.tiny_clip import (
    ClipTraining,
    build_clip,
    make_tiny_clip,
    measure_clip,
    spoil,
    train_clip,
)

FOLDER = REPOSITORY / "examples" / "tiny-clip"


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip(str(FOLDER))


@pytest.fixture(scope="module")
def scenes() -> tuple[torch.Tensor, list[str]]:
    """80 pictures of held-out combinations and their captions."""
    rng = np.random.default_rng(5)
    drawn = [sample_scene("single", "held_out", rng) for _ in range(80)]
    pictures = np.stack([np.asarray(render(scene, rng)) for scene in drawn])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2), [caption_of(scene) for scene in drawn]


def test_the_folder_loads_with_transformers_alone_and_is_small():
    model = CLIPModel.from_pretrained(FOLDER)
    processor = CLIPProcessor.from_pretrained(FOLDER)
    images = [np.full((80, 100, 3), 255, np.uint8)]
    inputs = processor(text=["a circle"], images=images, padding=True, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
    assert inputs["pixel_values"].max() == pytest.approx(1)
    with torch.inference_mode():
        logits = model(**inputs).logits_per_image
    assert logits.dtype == torch.float32, "half precision is for the disk"
    assert torch.isfinite(logits).all()
    assert (FOLDER / "model.safetensors").stat().st_size < 1_500_000


def test_its_tokenizer_is_the_tiny_models():
    ours = CLIPTokenizer.from_pretrained(FOLDER)
    theirs = CLIPTokenizer.from_pretrained(REPOSITORY / "examples" / "tiny-model" / "tokenizer")
    texts = ["a large red circle above a small blue square on a white background", "Löwe!", ""]
    assert ours(texts)["input_ids"] == theirs(texts)["input_ids"]
    assert (ours.eos_token_id, ours.model_max_length) == (theirs.eos_token_id, 77)


def test_a_right_caption_scores_far_above_a_wrong_one(clip, scenes):
    images, captions = scenes
    features = clip.image_features(images)
    right = clip_scores(features, clip.text_features(captions))
    wrong = clip_scores(features, clip.text_features(captions[1:] + captions[:1]))
    assert right.median() > 80
    assert wrong.median() < 40


def test_it_tells_captions_apart_as_its_card_says():
    tokenizer, model = CLIPTokenizer.from_pretrained(FOLDER), CLIPModel.from_pretrained(FOLDER)
    figures = measure_clip(model.eval(), tokenizer, "single", num_scenes=200)
    card = (FOLDER / "README.md").read_text()
    stated = float(re.search(r"one object: ([\d.]+)%", card)[1]) / 100  # type: ignore[index]
    assert figures["retrieval_top1"] == pytest.approx(stated, abs=0.05)
    assert figures["retrieval_top1"] > 0.9
    assert figures["hard_negatives"]["one attribute"] > 0.9
    assert figures["spoilt"] > 0.9


def test_fid_grows_as_pictures_get_worse_and_exceeds_that_of_other_good_ones(clip, scenes):
    images, _ = scenes
    reference = Reference(clip.image_features(images))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator)
    distances = []
    for strength in (5, 20, 60):
        noisy = (images.float() + strength * noise).clamp(0, 255).byte()
        distances.append(frechet_distance(clip.image_features(noisy), reference))
    rng = np.random.default_rng(6)
    others = [np.asarray(render(sample_scene("single", "held_out", rng), rng)) for _ in images]
    good = torch.from_numpy(np.stack(others)).permute(0, 3, 1, 2)
    between = frechet_distance(clip.image_features(good), reference)
    assert distances == sorted(distances)
    assert distances[-1] > 5 * between > 0


def test_spoilt_pictures_differ_and_stay_within_their_range():
    pictures = torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    spoilt = spoil(pictures, np.random.default_rng(0))
    assert spoilt.shape == pictures.shape
    assert spoilt.abs().max() <= 1
    assert ((spoilt - pictures).abs().amax(dim=(1, 2, 3)) > 0.05).all()
    assert torch.equal(spoilt, spoil(pictures, np.random.default_rng(0)))


def test_training_learns_and_the_same_seed_gives_the_same_weights():
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER)
    options = ClipTraining(steps=2, batch_size=4, num_spoilt=2, warmup_steps=1)
    one, other = (train_clip(options, tokenizer).state_dict() for _ in range(2))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    torch.manual_seed(options.seed)
    untrained = build_clip(tokenizer).state_dict()
    assert not torch.equal(one["visual_projection.weight"], untrained["visual_projection.weight"])


def test_the_folder_is_written_whole_and_says_what_it_is(tmp_path, monkeypatch):
    few = partial(measure_clip, num_scenes=20)
    monkeypatch.setattr("examples.tiny_clip.measure_clip", few)
    options = ClipTraining(steps=1, batch_size=4, num_spoilt=2)
    figures = make_tiny_clip(tmp_path / "clip", options)
    assert figures["pairs"]["num_scenes"] == 20
    assert {path.name for path in (tmp_path / "clip").iterdir()} >= {
        *("README.md", "config.json", "model.safetensors", "tokenizer.json"),
    }
    assert "--steps 1\n" in (tmp_path / "clip" / "README.md").read_text()
    assert list(tmp_path.iterdir()) == [tmp_path / "clip"], "nothing half-made is left"
    assert Clip(str(tmp_path / "clip")).num_features == 64
