"""Networks by name: what each is given to see, what it is called, and what is refused."""

import hashlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_clip import build_clip_folder
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evaluate.clip import Clip
from evaluate.feature_networks import identity_of, load_feature_network
from shards.errors import UserError

IMAGES = torch.randint(
    0, 256, (3, 3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


class Spy(nn.Module):
    """Returns the pixels that it is given, a few of them, in the shape that NVIDIA's file has."""

    def forward(self, pixels: Tensor, return_features: bool = False) -> Tensor:
        assert return_features
        return pixels[:, :, ::30, ::30].flatten(1)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "inception.pt"
    torch.jit.script(Spy()).save(str(path))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_torchscript_file_sees_pixels_resized_as_clean_fid_resizes_them(script):
    network = load_feature_network(str(script))
    features = network(IMAGES).features.reshape(3, 3, 10, 10)
    for image, seen in zip(IMAGES, features, strict=True):
        for channel, pixels in zip(image, seen, strict=True):
            whole = Image.fromarray(channel.numpy().astype(np.float32), mode="F")
            resized = np.asarray(whole.resize((299, 299), Image.Resampling.BICUBIC))
            assert np.array_equal(pixels.numpy(), resized[::30, ::30])
    assert features.max() > 200, "0 to 255, not 0 to 1"


def test_a_network_says_its_name_and_the_hash_of_its_file(script, tmp_path):
    network = load_feature_network(str(script))
    assert (network.num_features, network.has_classes) == (300, False)
    assert identity_of(network) == {
        "name": str(script),
        "weights_sha256": sha256(script),
        "resizing": network.resizing,
    }
    clip = load_feature_network(str(build_clip_folder(tmp_path / "clip")))
    assert clip.weights_sha256 == sha256(tmp_path / "clip" / "model.safetensors")


def test_a_clip_folder_gives_the_embedding_before_it_is_normalised(tmp_path):
    folder = str(build_clip_folder(tmp_path / "clip"))
    network, clip = load_feature_network(folder), Clip(folder)
    found = network(IMAGES)
    assert found.logits is None
    assert torch.equal(found.features, clip.image_features(IMAGES))
    assert found.features.shape == (3, network.num_features)
    assert (found.features.norm(dim=1) - 1).abs().max() > 0.01


def test_a_clip_that_lacks_a_weight_is_refused_and_none_made_up(tmp_path):
    folder = build_clip_folder(tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of a CLIP, first visual_projection"):
        load_feature_network(str(folder))


def test_a_clip_folder_prepares_pictures_as_its_processor_says(tmp_path):
    """Shortest side to 64, centre crop, [-1, 1]: by hand."""
    clip = Clip(str(build_clip_folder(tmp_path / "clip")))
    image = Image.fromarray(IMAGES[0].permute(1, 2, 0).numpy())
    resized = np.asarray(image.resize((96, 64), Image.Resampling.BICUBIC))[:, 16:80]
    pixels = torch.from_numpy(resized.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.inference_mode():
        expected = clip._model.get_image_features(pixels).pooler_output
    assert torch.allclose(clip.image_features(IMAGES[:1]), expected, atol=1e-5)


# What is not there --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.pt", r"feature network gone\.pt: no such file.*inception-2015-12-05\.pt"),
        ("inception:gone.pth", r"its weights are not at gone\.pth.*--features inception:<path>"),
        ("gone", r"gone: no such folder; wanted a folder or hub id of a transformers CLIPModel"),
    ],
)
def test_weights_that_are_absent_are_an_error_that_says_what_to_do(name, message):
    with pytest.raises(UserError, match=message):
        load_feature_network(name)


def test_inception_is_looked_for_where_torch_keeps_what_it_downloads(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"not at {tmp_path}/hub/checkpoints/weights-inception"):
        load_feature_network("inception")


def test_inception_without_its_package_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "inception.pth")
    with pytest.raises(UserError, match=r"needs torch-fidelity.*pip install torch-fidelity"):
        load_feature_network(f"inception:{tmp_path}/inception.pth")


@pytest.fixture
def torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """A stand-in for the package, which records how its extractor is built."""
    built: list[tuple] = []

    class FeatureExtractorInceptionV3(nn.Module):
        def __init__(self, name: str, features_list: list[str], path: str) -> None:
            super().__init__()
            built.append((name, features_list, path))

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            assert images.dtype == torch.uint8
            return torch.ones(len(images), 2048), torch.zeros(len(images), 1008)

    name = "torch_fidelity.feature_extractor_inceptionv3"
    module = types.ModuleType(name)
    module.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, name, module)
    return built


def test_inception_gives_features_and_the_logits_of_an_inception_score(tmp_path, torch_fidelity):
    path = tmp_path / "inception.pth"
    torch.save({"weight": torch.zeros(1)}, path)
    network = load_feature_network(f"inception:{path}")
    found = network(IMAGES)
    assert torch_fidelity == [("inception-v3-compat", ["2048", "logits_unbiased"], str(path))]
    assert (found.features.shape, found.logits.shape) == ((3, 2048), (3, 1008))
    assert (network.weights_sha256, network.has_classes) == (sha256(path), True)


class Payload:
    def __reduce__(self):
        return print, ("executed",)


def test_weights_that_would_run_code_are_refused(tmp_path, torch_fidelity, capsys):
    path = tmp_path / "inception.pth"
    torch.save({"weight": Payload()}, path)
    with pytest.raises(UserError, match="is no file of weights"):
        load_feature_network(f"inception:{path}")
    assert not torch_fidelity
    assert "executed" not in capsys.readouterr().out


def test_files_of_something_else_are_refused(tmp_path, torch_fidelity):
    for name, prefix in (("x.pth", "inception:"), ("x.pt", "")):
        (tmp_path / name).write_text("nothing of the kind")
        with pytest.raises(UserError, match=r"is no file of weights|is not TorchScript"):
            load_feature_network(f"{prefix}{tmp_path / name}")
