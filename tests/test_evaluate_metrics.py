"""FID, KID, Inception Score and CLIP score against closed forms and independent arithmetic."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_clip import MeanColours, build_clip_folder
from torch import Tensor

from evaluate.clip import Clip, clip_scores
from evaluate.metrics import (
    ImageFeatures,
    collect_features,
    frechet_distance,
    inception_score,
    kernel_distance,
    measure,
)
from evaluate.pictures import PictureBatch
from evaluate.reference import Reference, open_reference, save_reference
from shards.errors import UserError

CAPTIONS = ["a small red circle on a black background", "a large green square on a blue background"]


def gaussian(count: int, mean: np.ndarray, covariance: np.ndarray, seed: int) -> Tensor:
    """Samples [count, D] float64 whose own mean and covariance are exactly these."""
    noise = np.random.default_rng(seed).standard_normal((count, len(mean)))
    noise -= noise.mean(axis=0)
    white = noise @ np.linalg.inv(np.linalg.cholesky(np.cov(noise, rowvar=False))).T
    return torch.from_numpy(white @ np.linalg.cholesky(covariance).T + mean)


def random_covariance(width: int, seed: int) -> np.ndarray:
    root = np.random.default_rng(seed).standard_normal((width, width))
    return root @ root.T + 0.1 * np.eye(width)


def frechet_by_roots(first: np.ndarray, second: np.ndarray) -> float:
    """With symmetric square roots, by numpy: |m1-m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)."""
    one, other = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    values, vectors = np.linalg.eigh(one)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ other @ root).clip(0)).sum()
    shift = first.mean(axis=0) - second.mean(axis=0)
    return float(shift @ shift + np.trace(one) + np.trace(other) - 2 * cross)


def kernel_by_loops(first: np.ndarray, second: np.ndarray) -> float:
    """The unbiased squared MMD of the cubic kernel, one pair after another."""
    width = first.shape[1]

    def mean_kernel(pairs):
        values = [(float(np.dot(x, y)) / width + 1) ** 3 for x, y in pairs]
        return sum(values) / len(values)

    return (
        mean_kernel(itertools.permutations(first, 2))
        + mean_kernel(itertools.permutations(second, 2))
        - 2 * mean_kernel(itertools.product(first, second))
    )


# FID ----------------------------------------------------------------------------------------------


def test_fid_of_gaussians_with_diagonal_covariances_is_the_closed_form():
    one_mean, other_mean = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.5])
    one_std, other_std = np.array([1.0, 2.0, 0.5]), np.array([3.0, 1.0, 0.5])
    one = gaussian(500, one_mean, np.diag(one_std**2), 0)
    other = gaussian(700, other_mean, np.diag(other_std**2), 1)
    expected = ((one_mean - other_mean) ** 2).sum() + ((one_std - other_std) ** 2).sum()
    assert frechet_distance(one, Reference(other)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("width", [2, 16, 64])
def test_fid_agrees_with_another_implementation(width):
    means = np.random.default_rng(5).standard_normal((2, width))
    one = gaussian(3 * width, means[0], random_covariance(width, 1), 2)
    other = gaussian(4 * width, means[1], random_covariance(width, 3), 4)
    expected = frechet_by_roots(one.numpy(), other.numpy())
    assert frechet_distance(one, Reference(other)) == pytest.approx(expected, rel=1e-8)


def test_equal_spreads_along_other_axes_are_apart():
    """S1 = diag(9, 1), S2 = diag(1, 9): traces 10 + 10, and tr (S1 S2)^1/2 = 3 + 3."""
    one = gaussian(100, np.zeros(2), np.diag([9.0, 1.0]), 0)
    other = gaussian(100, np.zeros(2), np.diag([1.0, 9.0]), 1)
    assert frechet_distance(one, Reference(other)) == pytest.approx(20 - 2 * 6)


def test_fid_keeps_its_digits_far_from_the_origin():
    """Features of float32 whose mean is a thousand times their deviation."""
    one = (gaussian(400, np.full(8, 1000.0), np.eye(8), 0)).float()
    other = (gaussian(400, np.full(8, 1000.5), np.eye(8), 0)).float()
    expected = frechet_by_roots(one.double().numpy(), other.double().numpy())
    assert frechet_distance(one, Reference(other)) == pytest.approx(expected, abs=1e-4)
    assert frechet_distance(one, Reference(one)) < 1e-4


def test_fid_of_fewer_pictures_than_features_is_a_number():
    features = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    value = frechet_distance(features[:5], Reference(features[5:]))
    assert value == pytest.approx(
        frechet_by_roots(features[:5].double().numpy(), features[5:].double().numpy()), rel=1e-3
    )


def test_saved_moments_give_the_fid_of_the_pictures_behind_them(tmp_path):
    one = gaussian(300, np.zeros(3), random_covariance(3, 1), 2)
    other = gaussian(200, np.ones(3), random_covariance(3, 3), 4)
    mu, sigma = other.mean(dim=0).numpy(), np.cov(other.numpy(), rowvar=False)
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=sigma)
    reference = open_reference(str(tmp_path / "stats.npz"), MeanColours(), size=None)
    assert reference.num_images is None
    expected = frechet_distance(one, Reference(other))
    assert frechet_distance(one, reference) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [0, 1])
def test_one_picture_has_no_distance(count):
    many = torch.randn(10, 3)
    with pytest.raises(UserError, match="at least 2"):
        frechet_distance(many[:count], Reference(many))
    with pytest.raises(UserError, match="at least 2"):
        frechet_distance(many, Reference(many[:count]))
    with pytest.raises(UserError, match="at least 2"):
        kernel_distance(many[:count], many)


# KID ----------------------------------------------------------------------------------------------


def test_kid_is_the_double_loop_over_all_pairs():
    """Subsets of half of the pictures: their mean over all subsets is the figure of all pairs."""
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((40, 3)), 1.5 * rng.standard_normal((40, 3)) + 0.5
    result = kernel_distance(torch.from_numpy(one), torch.from_numpy(other))
    error = result["std"] / math.sqrt(result["subsets"])
    assert result["subset_size"] == 20
    assert abs(result["mean"] - kernel_by_loops(one, other)) < 4 * error


def test_a_subset_is_the_double_loop_to_the_last_digit(monkeypatch):
    """With subsets as large as the sets there is nothing random left."""
    monkeypatch.setattr("evaluate.metrics.KID_SUBSET_SIZE", 8)
    rng = np.random.default_rng(1)
    one, other = rng.standard_normal((16, 5)), rng.standard_normal((16, 5)) + 1
    doubled = [torch.from_numpy(np.repeat(x[:1], 16, axis=0)) for x in (one, other)]
    result = kernel_distance(*doubled)
    expected = kernel_by_loops(np.repeat(one[:1], 8, axis=0), np.repeat(other[:1], 8, axis=0))
    assert result["mean"] == pytest.approx(expected, rel=1e-12)
    assert result["std"] == pytest.approx(0, abs=1e-12)


def test_kid_of_gaussians_is_its_expectation(monkeypatch):
    """E (x y + 1)^3 = sum of C(3, k) E x^k E y^k, with the moments of N(m, s^2)."""

    def moments(mean: float, std: float) -> list[float]:
        return [1, mean, mean**2 + std**2, mean**3 + 3 * mean * std**2]

    def kernel(first: list[float], second: list[float]) -> float:
        return sum(math.comb(3, k) * first[k] * second[k] for k in range(4))

    monkeypatch.setattr("evaluate.metrics.KID_SUBSET_SIZE", 200)
    one, other = moments(0.0, 0.3), moments(0.4, 0.5)
    expected = kernel(one, one) + kernel(other, other) - 2 * kernel(one, other)
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(2, 20_000, 1, generator=generator, dtype=torch.float64)
    result = kernel_distance(0.3 * samples[0], 0.4 + 0.5 * samples[1])
    error = result["std"] / 10  # of 100 subsets, which together are the samples
    assert error < 0.04 * expected
    assert result["mean"] == pytest.approx(expected, abs=4 * error)
    same = kernel_distance(0.3 * samples[0], 0.3 * samples[1])
    assert abs(same["mean"]) < 0.02 * expected, "unbiased: no distance, no figure"


def test_measuring_leaves_the_generators_alone_and_repeats_itself():
    features = torch.randn(30, 4)
    state = torch.random.get_rng_state()
    first = kernel_distance(features[:15], features[15:]), inception_score(features)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert (kernel_distance(features[:15], features[15:]), inception_score(features)) == first
    assert kernel_distance(features[:15], features[15:], seed=1) != first[0]


# Inception Score ----------------------------------------------------------------------------------


def test_inception_score_is_the_number_of_classes_that_are_met_evenly():
    certain = 50 * torch.eye(5).repeat(200, 1)
    assert inception_score(certain)["mean"] == pytest.approx(5, rel=0.05)
    assert inception_score(torch.zeros(100, 5))["mean"] == pytest.approx(1)
    assert inception_score(certain[:2])["splits"] == 1


# Everything at once -------------------------------------------------------------------------------


def batches_of(images: Tensor, captions: list[str] | None, size: int) -> list[PictureBatch]:
    return [
        PictureBatch(images[i : i + size], captions and captions[i : i + size])
        for i in range(0, len(images), size)
    ]


def random_images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return Clip(str(build_clip_folder(tmp_path_factory.mktemp("clip"))))


def test_figures_do_not_depend_on_the_batch_size(clip):
    images, captions = random_images(10), CAPTIONS * 5
    one, other = (
        collect_features(batches_of(images, captions, size), MeanColours(), clip)
        for size in (3, 10)
    )
    assert torch.equal(one.features, other.features)
    assert torch.allclose(one.clip_scores, other.clip_scores, atol=1e-4)
    reference = Reference(MeanColours()(random_images(12, 1)).features)
    first, second = measure(one, reference), measure(other, reference)
    assert first["fid"] == second["fid"]
    assert first["kid"] == second["kid"]
    assert len(first["clip_scores"]) == 10
    assert first["clip_score"] == pytest.approx(max(np.mean(first["clip_scores"]), 0))


def test_one_picture_without_a_caption_leaves_no_clip_score(clip):
    batches = [*batches_of(random_images(4), CAPTIONS * 2, 2), PictureBatch(random_images(2), None)]
    found = collect_features(batches, MeanColours(), clip)
    assert found.clip_scores is None
    result = measure(found, Reference(MeanColours()(random_images(8)).features))
    assert "clip_score" not in result
    assert any("no CLIP score" in warning for warning in result["warnings"])


def test_few_pictures_are_warned_about(monkeypatch):
    monkeypatch.setattr("evaluate.metrics.KID_SUBSET_SIZE", 50)
    features = ImageFeatures(torch.randn(50, 64), None, torch.zeros(50))
    bias, singular = "too high by an amount", "a covariance is singular"
    found = " ".join(measure(features, Reference(torch.randn(20_000, 64)))["warnings"])
    assert bias in found
    assert singular in found
    enough = ImageFeatures(torch.randn(10_000, 4), None, torch.zeros(10_000))
    assert measure(enough, Reference(torch.randn(10_000, 4)))["warnings"] == []


# CLIP ---------------------------------------------------------------------------------------------


class AsTorchmetricsExpects(torch.nn.Module):
    """The model with tensors for outputs, as transformers 4 had them."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values).pooler_output

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.get_text_features(input_ids, attention_mask).pooler_output


def test_clip_scores_are_those_of_torchmetrics(clip):
    from torchmetrics.functional.multimodal import clip_score
    from transformers import CLIPProcessor

    images = random_images(2)
    processor = CLIPProcessor(clip._images, clip._tokenizer)
    with torch.inference_mode():
        expected = [
            clip_score(image, caption, lambda: (AsTorchmetricsExpects(clip._model), processor))
            for image, caption in zip(images, CAPTIONS, strict=True)
        ]
    ours = clip_scores(clip.image_features(images), clip.text_features(CAPTIONS))
    assert ours.clamp(min=0).tolist() == pytest.approx([float(e) for e in expected], abs=1e-4)


def test_a_long_caption_is_cut_but_keeps_its_end(clip):
    """CLIP sums a caption up at its end token: without one it would be read somewhere else."""
    long = " ".join(["red circle"] * 100)
    longer = f"{long} blue"
    assert clip.num_too_long([*CAPTIONS, long]) == 1
    features = clip.text_features([long, longer, "red circle"])
    assert torch.allclose(features[0], features[1])
    assert not torch.allclose(features[0], features[2], atol=1e-3)
    ids = clip._tokenizer([long], truncation=True, max_length=77)["input_ids"][0]
    assert (len(ids), ids[-1]) == (77, clip._tokenizer.eos_token_id)


def test_a_caption_does_not_depend_on_its_company(clip):
    alone = clip.text_features(CAPTIONS[:1])
    assert torch.allclose(alone, clip.text_features([CAPTIONS[0], "red " * 60])[:1], atol=1e-5)


@pytest.mark.parametrize("name", ["gone", "examples/tiny-model"])
def test_what_is_no_clip_folder_is_refused(name):
    with pytest.raises(UserError, match="CLIPModel"):
        Clip(str(Path(__file__).parent.parent / name))


# References ---------------------------------------------------------------------------------------


def write_pictures(folder: Path, count: int, seed: int = 0) -> Path:
    from PIL import Image

    folder.mkdir()
    for number, image in enumerate(random_images(count, seed)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    return folder


def test_a_saved_reference_gives_the_very_figures_of_its_pictures(tmp_path):
    folder = write_pictures(tmp_path / "real", 12)
    network, saved = MeanColours(), str(tmp_path / "real.safetensors")
    reference = open_reference(str(folder), network, size=(16, 16))
    save_reference(saved, reference)
    again = open_reference(saved, network, size=(16, 16))
    judged = ImageFeatures(network(random_images(9, 3)).features, None, None)
    assert measure(judged, again) == measure(judged, reference)
    assert again.about["network"] == reference.about["network"]
    assert again.about["size"] == [16, 16]


def test_a_reference_of_another_network_or_size_is_refused(tmp_path):
    folder = write_pictures(tmp_path / "real", 3)
    saved = str(tmp_path / "real.safetensors")
    save_reference(saved, open_reference(str(folder), MeanColours(), size=None))
    other = MeanColours()
    other.weights_sha256 = "d" * 64
    with pytest.raises(UserError, match=r"features of mean-colours \(cccc.*those of.*\(dddd"):
        open_reference(saved, other, size=None)
    with pytest.raises(UserError, match=r"pictures of \[16, 16\].*wanted \[32, 32\]"):
        open_reference(saved, MeanColours(), size=(32, 32))


def test_files_that_are_no_references_are_refused(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="cannot be read"):
        open_reference(str(tmp_path / "bad.safetensors"), MeanColours(), size=None)
    np.savez(tmp_path / "wide.npz", mu=np.zeros(8), sigma=np.eye(8))
    with pytest.raises(UserError, match="wanted 3 features"):
        open_reference(str(tmp_path / "wide.npz"), MeanColours(), size=None)
    np.savez(tmp_path / "pickle.npz", mu=np.array([print], dtype=object), sigma=np.eye(3))
    with pytest.raises(UserError, match="cannot be read"):
        open_reference(str(tmp_path / "pickle.npz"), MeanColours(), size=None)
    with pytest.raises(UserError, match=r"ends in \.safetensors"):
        save_reference(str(tmp_path / "out.npz"), Reference(torch.zeros(2, 3)))
