"""Networks whose features FID and KID are computed on, by name; each figure belongs to one of them.

    examples/tiny-clip         the embedded one, for scenes; any CLIP folder or hub id (CLIP-FID)
    inception                  InceptionV3 of 2015 as torch-fidelity ports it: FID as published
    inception:<file.pth>       the same from weights at another place
    <file>.pt                  TorchScript: NVIDIA's inception-2015-12-05.pt, as clean-fid takes it

Nothing is ever taken in the place of another: what is absent is an error. No command downloads
Inception's weights by itself.
"""

from __future__ import annotations

import pickle
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaluate.clip import Clip
from shards.canonical import sha256_of
from shards.errors import UserError

_INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
_INCEPTION_RELEASE = "github.com/toshas/torch-fidelity/releases/download/v0.2.0"
_INCEPTION_SIDE = 299


class Features(NamedTuple):
    """What a network says of a batch: features [B, D], and logits [B, K] where it has classes."""

    features: Tensor
    logits: Tensor | None


class FeatureNetwork(Protocol):
    """A frozen network.

    Attributes:
        name: as the user gave it.
        weights_sha256: of its weights.
        num_features: width of its features.
        resizing: what is done to pictures before it sees them, in words.
        has_classes: whether there are logits for an Inception Score.
    """

    name: str
    weights_sha256: str
    num_features: int
    resizing: str
    has_classes: bool

    def __call__(self, images: Tensor) -> Features:
        """Features of pictures uint8 [B, 3, H, W], float32 on the CPU."""
        ...


def load_feature_network(name: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """Load a network by name; see the module.

    Raises:
        UserError: its weights, or a package that it needs, are not there.
    """
    if name == "inception" or name.startswith("inception:"):
        return Inception(name, device)
    if name.endswith(".pt"):
        return TorchScript(name, device)
    return ClipFeatures(Clip(name, device))


def identity_of(network: FeatureNetwork) -> dict[str, str]:
    """What stands beside every figure that a network was used for."""
    return {
        "name": network.name,
        "weights_sha256": network.weights_sha256,
        "resizing": network.resizing,
    }


class ClipFeatures:
    """The image embedding of a CLIP model before it is normalised (CLIP-FID, arXiv:2203.06026)."""

    has_classes = False

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self.name, self.weights_sha256 = clip.name, clip.weights_sha256
        self.num_features = clip.num_features
        self.resizing = f"shortest side to {clip.side} (PIL bicubic), centre crop"

    def __call__(self, images: Tensor) -> Features:
        """See `FeatureNetwork`."""
        return Features(self.clip.image_features(images).cpu(), None)


class Inception:
    """InceptionV3 with the weights of the FID paper (arXiv:1706.08500), by torch-fidelity.

    torchmetrics' own Inception is this class with another resizing; here it is TensorFlow 1's, as
    in the published figures.
    """

    has_classes, num_features = True, 2048
    resizing = f"to {_INCEPTION_SIDE}x{_INCEPTION_SIDE}, bilinear as TensorFlow 1 (no antialiasing)"

    def __init__(self, name: str, device: torch.device | str) -> None:
        path = _find_inception(name)
        try:
            module = import_module("torch_fidelity.feature_extractor_inceptionv3")
        except (ImportError, RuntimeError) as error:  # the latter: a torchvision of another torch
            raise UserError(
                f"feature network {name}",
                f"needs torch-fidelity ({error})",
                remedy=".venv/bin/pip install torch-fidelity",
            ) from None
        self.name, self.weights_sha256 = name, sha256_of(path)
        self._device = torch.device(device)
        # torch-fidelity unpickles whatever is there: first see that it is tensors alone.
        _load_tensors(path)
        network = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], str(path)
        )
        self._network: Any = network.eval().to(self._device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """See `FeatureNetwork`."""
        features, logits = self._network(images.to(self._device))
        return Features(features.float().cpu(), logits.float().cpu())


class TorchScript:
    """A TorchScript file that is called as NVIDIA's Inception: `(pixels, return_features=True)`.

    Pixels are 0 to 255. They come resized as clean-fid resizes them (arXiv:2104.11222): each
    channel as floats by PIL's antialiased bicubic, not rounded, so that the network's own resizing
    has nothing left to do.
    """

    has_classes = False
    resizing = f"to {_INCEPTION_SIDE}x{_INCEPTION_SIDE}, PIL bicubic on floats (clean-fid)"

    def __init__(self, name: str, device: torch.device | str) -> None:
        path = Path(name)
        if not path.is_file():
            raise UserError(
                f"feature network {name}",
                "no such file",
                wanted="a TorchScript file such as NVIDIA's inception-2015-12-05.pt",
                remedy="download it there, or --features examples/tiny-clip for scenes",
            )
        self.name, self.weights_sha256 = name, sha256_of(path)
        self._device = torch.device(device)
        try:
            self._network: Any = torch.jit.load(str(path), map_location=self._device).eval()
        except RuntimeError:
            raise UserError(
                name, "is not TorchScript", wanted="what torch.jit.save writes"
            ) from None
        probe = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        self.num_features = self(probe).features.shape[1]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """See `FeatureNetwork`."""
        pixels = torch.from_numpy(
            np.stack([_resize_clean(image.numpy()) for image in images.cpu()])
        )
        features = self._network(pixels.to(self._device), return_features=True)
        return Features(features.flatten(1).float().cpu(), None)


def _resize_clean(image: np.ndarray) -> np.ndarray:
    """uint8 [3, H, W] to float32 [3, 299, 299]; bicubic may overshoot 0 and 255 a little."""
    size = (_INCEPTION_SIDE, _INCEPTION_SIDE)
    channels = [Image.fromarray(channel.astype(np.float32)) for channel in image]
    resized = [c.resize(size, Image.Resampling.BICUBIC) for c in channels]
    return np.stack([np.asarray(channel) for channel in resized])


def _find_inception(name: str) -> Path:
    """The weights: a path that was given, or where torch keeps what it downloads."""
    _, _, given = name.partition(":")
    path = Path(given) if given else Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION_FILE
    if not path.is_file():
        raise UserError(
            f"feature network {name}",
            f"its weights are not at {path}",
            wanted=_INCEPTION_FILE,
            remedy=f"get it from {_INCEPTION_RELEASE}/, put it there or name it: "
            "--features inception:<path>",
        )
    return path


def _load_tensors(path: Path) -> None:
    try:
        torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError):
        raise UserError(path, "is no file of weights", wanted=_INCEPTION_FILE) from None
