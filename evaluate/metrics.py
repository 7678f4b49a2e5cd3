"""FID, KID, Inception Score and CLIP score, through torchmetrics.

A network looks at each picture once: `collect_features` keeps what it says (30,000 pictures of 2048
features are 250 MB; no picture is kept), and torchmetrics' metrics are given these features instead
of pixels. All arithmetic behind the network is in float64. One process: features of several may be
concatenated, which no command does yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from evaluate.clip import Clip, clip_scores
from evaluate.feature_networks import FeatureNetwork
from evaluate.pictures import PictureBatch
from shards.errors import UserError

if TYPE_CHECKING:
    from evaluate.reference import Reference

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # arXiv:1801.01401, as torchmetrics and torch-fidelity
IS_SPLITS = 10  # arXiv:1606.03498
# Below this FID is too high by an amount that depends on the generator (arXiv:1911.07023).
FEW_IMAGES = 10_000
_CHUNK = 1024
# In a run of several processes one of them measures: nothing may wait for the others.
_ALONE: dict[str, Any] = {"sync_on_compute": False}


@dataclass(frozen=True)
class ImageFeatures:
    """What networks say of a set of pictures.

    Args:
        features: [N, D] float32.
        logits: [N, K], where the network has classes.
        clip_scores: [N], where there were captions and a CLIP model.
        num_long_captions: captions that CLIP saw cut.
    """

    features: Tensor
    logits: Tensor | None
    clip_scores: Tensor | None
    num_long_captions: int = 0


def collect_features(
    batches: Iterable[PictureBatch], network: FeatureNetwork, clip: Clip | None = None
) -> ImageFeatures:
    """Look at every picture once.

    Args:
        batches: pictures, with captions where CLIP scores are wanted.
        network: of FID and KID.
        clip: of the CLIP score; None: no score.
    """
    features, logits, scores = [], [], []
    num_long, have_captions = 0, clip is not None
    for images, captions in batches:
        said = network(images)
        features.append(said.features)
        if said.logits is not None:
            logits.append(said.logits)
        if captions is None:
            have_captions = False
        elif clip is not None and have_captions:
            num_long += clip.num_too_long(captions)
            pair = clip.image_features(images), clip.text_features(captions)
            scores.append(clip_scores(*pair).cpu())
    return ImageFeatures(
        torch.cat(features),
        torch.cat(logits) if logits else None,
        torch.cat(scores) if have_captions else None,
        num_long,
    )


def measure(generated: ImageFeatures, reference: Reference, *, seed: int = 0) -> dict[str, Any]:
    """All figures that the two sets allow.

    Args:
        generated: pictures to judge.
        reference: what they should look like, by the same network.
        seed: of KID's subsets and of the Inception Score's splits.

    Returns:
        `num_images`, `num_reference`, `fid`; `kid` of a reference with features; `clip_score` (the
        mean), `clip_score_spread` and `clip_scores` (raw) where there were captions;
        `inception_score` where there are classes; `warnings`.

    Raises:
        UserError: fewer than two pictures on a side.
    """
    num_images = len(generated.features)
    result: dict[str, Any] = {
        "num_images": num_images,
        "num_reference": reference.num_images,
        "fid": frechet_distance(generated.features, reference),
    }
    if reference.features is not None:
        result["kid"] = kernel_distance(generated.features, reference.features, seed=seed)
    if generated.logits is not None:
        result["inception_score"] = inception_score(generated.logits, seed=seed)
    if generated.clip_scores is not None:
        scores = generated.clip_scores.double()
        low, median, high = np.percentile(scores.numpy(), [10, 50, 90])
        result["clip_score"] = max(scores.mean().item(), 0.0)
        result["clip_score_spread"] = {
            "median": float(median),
            "p10": float(low),
            "p90": float(high),
        }
        result["clip_scores"] = scores.tolist()
    return {**result, "warnings": _warnings(generated, reference)}


class _AsTheyAre(nn.Module):
    """The feature network that torchmetrics is given: pictures are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(features: Tensor, reference: Reference) -> float:
    """FID of features [N, D] against a reference, in float64 (arXiv:1706.08500).

    Raises:
        UserError: fewer than two pictures on a side.
    """
    FrechetInceptionDistance = _metric("image.fid", "FrechetInceptionDistance")  # noqa: N806
    _expect_two(len(features), "pictures")
    metric = FrechetInceptionDistance(_AsTheyAre(features.shape[1]), **_ALONE)
    reference.fill(metric)
    for chunk in features.split(_CHUNK):
        metric.update(chunk.double(), real=False)
    # Where both covariances are singular, rounding can leave a little less than nothing.
    return max(float(metric.compute()), 0.0)


def kernel_distance(features: Tensor, reference: Tensor, *, seed: int = 0) -> dict[str, float]:
    """KID with the cubic polynomial kernel, in float64 (arXiv:1801.01401).

    Subsets are of 1000 pictures, or of half of the smaller side where that is less.

    Returns:
        `mean` and `std` over `subsets` random subsets of `subset_size`.

    Raises:
        UserError: fewer than two pictures on a side.
    """
    KernelInceptionDistance = _metric("image.kid", "KernelInceptionDistance")  # noqa: N806
    smaller = min(len(features), len(reference))
    _expect_two(smaller, "pictures or reference pictures")
    subset_size = min(KID_SUBSET_SIZE, max(2, smaller // 2))
    metric = KernelInceptionDistance(
        _AsTheyAre(features.shape[1]), subsets=KID_SUBSETS, subset_size=subset_size, **_ALONE
    )
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return {
        "mean": float(mean),
        "std": float(std),
        "subsets": KID_SUBSETS,
        "subset_size": subset_size,
    }


def inception_score(logits: Tensor, *, seed: int = 0) -> dict[str, float]:
    """Inception Score of logits [N, K] (arXiv:1606.03498): `mean` and `std` over `splits`."""
    InceptionScore = _metric("image.inception", "InceptionScore")  # noqa: N806
    splits = min(IS_SPLITS, len(logits) // 2)
    metric = InceptionScore(_AsTheyAre(logits.shape[1]), splits=splits, **_ALONE)
    metric.update(logits.double())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return {"mean": float(mean), "std": float(std) if splits > 1 else 0.0, "splits": splits}


def _metric(module: str, name: str) -> Any:
    """A class of torchmetrics, without its warning that features are kept."""
    import warnings
    from importlib import import_module

    try:
        metric = getattr(import_module(f"torchmetrics.{module}"), name)
    except ImportError:
        raise UserError(
            "metrics",
            "torchmetrics is not installed",
            remedy=".venv/bin/pip install 'torchmetrics>=1.4'",
        ) from None
    warnings.filterwarnings("ignore", message=".*will save all extracted features")
    return metric


def _expect_two(count: int, what: str) -> None:
    if count < 2:
        raise UserError("metrics", f"{count} {what}", wanted="at least 2: one has no covariance")


def _warnings(generated: ImageFeatures, reference: Reference) -> list[str]:
    """What a reader of the figures should know."""
    found = []
    count, width = generated.features.shape
    known = [n for n in (count, reference.num_images) if n is not None]
    if min(known) <= width:
        found.append(
            f"{min(known)} pictures for {width} features: a covariance is singular, FID is mostly "
            "bias"
        )
    if min(known) < FEW_IMAGES:
        found.append(
            f"FID of {count} pictures against {reference.num_images or 'an unknown number'}: too "
            "high by an amount that falls with their number; compare with the same numbers only"
        )
    if generated.num_long_captions:
        found.append(f"{generated.num_long_captions} captions were cut for the CLIP score")
    if generated.clip_scores is None:
        found.append("no CLIP score: not every picture has a caption, or no CLIP model was named")
    return found
