"""What generated pictures are held against: features of real ones, or published statistics.

A saved reference is one safetensors file: `features` [N, D] float32, and in its metadata the
network, the source and how pictures were cut. It gives the very figures that the pictures give.
Of other people's files, npz with `mu` and `sigma` (pytorch-fid, MLPerf) can be read; they give FID
alone, and do not say which network they are of.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluate.feature_networks import FeatureNetwork, identity_of
from evaluate.metrics import collect_features
from evaluate.pictures import TRANSFORM, Pictures
from shards.errors import UserError
from shards.storage import write_whole

_FORMAT = "latentmill-reference-1"
_REMEDY = "python -m evaluate metrics --reference <pictures> --save-reference <file>"


@dataclass(frozen=True)
class Reference:
    """Features, or mean and covariance alone.

    Args:
        features: [N, D] float32; None where only moments are known.
        moments: mean [D] and covariance [D, D] float64; None where there are features.
        about: where it comes from and how it was made.
    """

    features: Tensor | None
    moments: tuple[Tensor, Tensor] | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def num_images(self) -> int | None:
        """None where nothing says it."""
        return None if self.features is None else len(self.features)

    def fill(self, metric: Any) -> None:
        """Give a `FrechetInceptionDistance` its real side."""
        if self.features is not None:
            if len(self.features) < 2:
                raise UserError("reference", f"{len(self.features)} pictures", wanted="at least 2")
            for chunk in self.features.split(1024):
                metric.update(chunk.double(), real=True)
            return
        assert self.moments is not None
        mean, covariance = self.moments
        # torchmetrics keeps sums; two samples' worth give these moments back exactly.
        metric.real_features_sum = 2 * mean
        metric.real_features_cov_sum = covariance + 2 * torch.outer(mean, mean)
        metric.real_features_num_samples = torch.tensor(2)


def open_reference(
    where: str,
    network: FeatureNetwork,
    *,
    size: tuple[int, int] | None,
    limit: int = 0,
    batch_size: int = 64,
) -> Reference:
    """A saved reference, or one made from pictures now.

    Args:
        where: a .safetensors or .npz file, or what `Pictures` takes.
        network: whose features are compared.
        size: (height, width) that pictures are cut to.
        limit: pictures at most; 0: all.
        batch_size: pictures at a time.

    Raises:
        UserError: it cannot be read, or belongs to another network.
    """
    if where.endswith(".npz"):
        return _read_moments(Path(where), network)
    if where.endswith(".safetensors"):
        return _read_features(Path(where), network, size)
    pictures = Pictures(where, size, limit)
    features = collect_features(pictures.batches(batch_size), network).features
    about = {
        "source": where,
        "transform": TRANSFORM,
        "size": list(pictures.size or ()),
        "dropped": dict(pictures.dropped),
        "network": identity_of(network),
    }
    return Reference(features, about=about)


def save_reference(where: str, reference: Reference) -> None:
    """Write features whole or not at all.

    Raises:
        UserError: another ending, or a reference of moments alone.
    """
    from safetensors.torch import save_file

    if not where.endswith(".safetensors"):
        raise UserError("--save-reference", where, wanted="a name that ends in .safetensors")
    if reference.features is None:
        raise UserError("--save-reference", "the reference is statistics already")
    tensors = {"features": reference.features.contiguous()}
    metadata = {"format": _FORMAT, "about": json.dumps(reference.about)}
    write_whole(Path(where), lambda path: save_file(tensors, path, metadata))


def _read_features(path: Path, network: FeatureNetwork, size: tuple[int, int] | None) -> Reference:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise UserError(path, "is no saved reference", wanted=_FORMAT, remedy=_REMEDY)
            features = file.get_tensor("features")
    except (OSError, SafetensorError) as error:
        raise UserError(path, f"cannot be read ({error})", remedy=_REMEDY) from None
    about = json.loads(metadata["about"])
    found = about["network"]
    if found["weights_sha256"] != network.weights_sha256:
        raise UserError(
            path,
            f"features of {found['name']} ({found['weights_sha256'][:12]})",
            wanted=f"those of {network.name} ({network.weights_sha256[:12]})",
            remedy=_REMEDY,
        )
    if size is not None and about["size"] != list(size):
        raise UserError(
            path,
            f"pictures of {about['size']} (height, width)",
            wanted=f"{list(size)}, as the pictures to measure have",
            remedy=_REMEDY,
        )
    return Reference(features, about={**about, "file": str(path)})


def _read_moments(path: Path, network: FeatureNetwork) -> Reference:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name], np.float64) for name in ("mu", "sigma")}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(path, f"cannot be read ({error})", wanted="npz with mu and sigma") from None
    mean, covariance = torch.from_numpy(arrays["mu"]), torch.from_numpy(arrays["sigma"])
    width = network.num_features
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise UserError(
            path,
            f"mu {list(mean.shape)}, sigma {list(covariance.shape)}",
            wanted=f"{width} features, as {network.name} has",
        )
    note = "of an unknown network, resizing and number of pictures"
    return Reference(None, (mean, covariance), {"source": str(path), "note": note})
