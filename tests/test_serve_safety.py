"""Safety checkers: what is flagged is blank, whoever flags it."""

from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, TINY_MODEL
from helpers_serve import build_config, build_pipeline, build_request, pixels_of

from serve.engine import Engine
from serve.safety import load_checker
from shards.errors import UserError


def flag_second(device: str):
    assert device == "cpu"
    return lambda pictures: [number % 2 == 1 for number in range(len(pictures))]


def test_what_a_safety_checker_flags_is_blank():
    checked = Engine(
        build_config(safety_checker="test_serve_safety:flag_second"),
        lambda config, device: build_pipeline(),
    )
    checked.start()
    first, second = checked.submit(build_request("a", "b", steps=1)).future.result(60)
    checked.close()
    assert (first.flagged, second.flagged) == (False, True)
    assert pixels_of(first).any()
    assert not pixels_of(second).any()


def save_safety_checker(folder: Path, weight: float) -> Path:
    """A tiny CLIP whose thresholds flag everything or nothing."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, image_size=32, patch_size=16)
    config = CLIPConfig(text_config=CLIPTextConfig(**small), vision_config=vision)
    config.projection_dim = 8
    checker = StableDiffusionSafetyChecker(config)
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(weight)
        checker.special_care_embeds_weights.fill_(1.0)
    checker.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("threshold", "flagged"), [(-1.1, True), (1.1, False)])
def test_a_folder_with_a_diffusers_safety_checker_is_used(tmp_path, threshold, flagged):
    folder = save_safety_checker(tmp_path / "checker", threshold)
    checked = Engine(
        build_config(safety_checker=str(folder)), lambda config, device: build_pipeline()
    )
    checked.start()
    images = checked.submit(build_request("a", "b", steps=1)).future.result(60)
    checked.close()
    assert [image.flagged for image in images] == [flagged] * 2
    assert pixels_of(images[0]).any() != flagged


@pytest.mark.parametrize(
    "named", ["nowhere:factory", "math:nothing", "nothing", ".here:factory", str(TINY_MODEL)]
)
def test_a_safety_checker_that_cannot_be_loaded_is_refused_at_the_start(named):
    with pytest.raises(UserError, match="cannot be loaded"):
        Engine(build_config(safety_checker=named), lambda config, device: build_pipeline()).start()


def test_a_folder_that_lacks_a_checkers_weights_is_refused_and_not_made_up():
    clip = REPOSITORY / "examples" / "tiny-clip"
    with pytest.raises(UserError, match=r"cannot be loaded.*lacks concept_embeds"):
        load_checker(str(clip), "cpu")


def flag_too_few(device: str):
    return lambda pictures: [False] * (len(pictures) - 1)


def test_a_checker_that_leaves_an_image_out_is_refused_at_the_start():
    engine = Engine(
        build_config(safety_checker="test_serve_safety:flag_too_few"),
        lambda config, device: build_pipeline(),
    )
    with pytest.raises(UserError, match="gave 0 flags for 1 images"):
        engine.start()
