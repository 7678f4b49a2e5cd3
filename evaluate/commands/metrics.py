"""FID, KID, Inception Score and CLIP score of pictures against a reference."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

from evaluate.protocols import TINY_CLIP
from shards.errors import UserError


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Settings of `python -m evaluate metrics`."""

    reference: str
    """What pictures should look like: a folder of pictures, image shards ("...{000..099}.tar"), or
    saved statistics (.safetensors of --save-reference; .npz with mu and sigma, for FID alone)."""
    images: str = ""
    """Pictures to judge: a folder of `python -m evaluate generate`, a folder of pictures, or image
    shards. Captions for the CLIP score come from the first and the last."""
    features: str = TINY_CLIP
    """Network of FID and KID: a CLIP folder or hub id, inception[:file.pth], or TorchScript .pt."""
    clip: str = ""
    """CLIP folder or hub id of the CLIP score; default: --features, where that is a CLIP."""
    save_reference: str = ""
    """Keep the reference's features in this .safetensors file; without --images that is all."""
    resolution: int = 0
    """Side in pixels to shrink and centre-crop the reference, and --images that are not generated,
    to; 0: the size of the first of --images."""
    num_images: int = 0
    """Pictures at most, of either side; 0: all."""
    batch_size: int = 64
    """Pictures at a time."""
    seed: int = 0
    """Of KID's subsets and the Inception Score's splits."""
    device: str = ""
    """Default: the first GPU, else the CPU."""
    out: str = ""
    """Also write the result, with the raw CLIP scores, to this JSON file."""


def run(config: MetricsConfig) -> None:
    """Measure, print the figures; the last line is JSON."""
    if not config.images and not config.save_reference:
        raise UserError("metrics", "nothing to do", wanted="--images, --save-reference, or both")
    for name in ("batch_size", "resolution", "num_images"):
        least = 1 if name == "batch_size" else 0
        if getattr(config, name) < least:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(flag, f"{getattr(config, name)}", wanted=f"at least {least}")

    from evaluate.feature_networks import load_feature_network
    from evaluate.pictures import Pictures
    from evaluate.reference import open_reference, save_reference
    from precompute.loading import choose_device

    device = str(choose_device(config.device or "auto"))
    network = load_feature_network(config.features, device)
    size = (config.resolution, config.resolution) if config.resolution else None
    pictures = Pictures(config.images, size, config.num_images) if config.images else None
    measured = _look(config, pictures, network, device) if pictures else None
    reference = open_reference(
        config.reference,
        network,
        size=pictures.size if pictures else size,
        limit=config.num_images,
        batch_size=config.batch_size,
    )
    if config.save_reference:
        save_reference(config.save_reference, reference)
        print(f"{config.save_reference}: features of {reference.num_images} pictures")
    if pictures and measured:
        _report(config, pictures, measured, reference, network)


def _look(config: MetricsConfig, pictures: Any, network: Any, device: str) -> Any:
    from evaluate.clip import Clip
    from evaluate.metrics import collect_features

    clip = Clip(config.clip, device) if config.clip else getattr(network, "clip", None)
    return collect_features(pictures.batches(config.batch_size), network, clip)


def _report(
    config: MetricsConfig, pictures: Any, measured: Any, reference: Any, network: Any
) -> None:
    """Print, and write where that is asked for."""
    from evaluate.feature_networks import identity_of
    from evaluate.metrics import measure
    from evaluate.pictures import TRANSFORM
    from shards.canonical import canonical_json
    from shards.storage import location, write_text_whole

    figures = measure(measured, reference, seed=config.seed)
    result = {
        "images": {
            "source": config.images,
            "size": list(pictures.size),
            "dropped": dict(pictures.dropped),
            "transform": TRANSFORM,
        },
        "reference": reference.about,
        "features": identity_of(network),
        "clip": config.clip or (config.features if hasattr(network, "clip") else None),
        **figures,
    }
    if config.out:
        write_text_whole(location(config.out), canonical_json(result))
    print(f"{figures['num_images']} pictures, {figures['num_reference']} of reference")
    print(f"FID              {figures['fid']:.4f}   ({network.name})")
    if "kid" in figures:
        kid = figures["kid"]
        subsets = f"{kid['subsets']} subsets of {kid['subset_size']}"
        print(f"KID              {kid['mean']:.5f} +- {kid['std']:.5f}   ({subsets})")
    if "inception_score" in figures:
        score = figures["inception_score"]
        print(f"Inception Score  {score['mean']:.3f} +- {score['std']:.3f}")
    if "clip_score" in figures:
        spread = figures["clip_score_spread"]
        print(
            f"CLIP score       {figures['clip_score']:.3f}   "
            f"(p10 {spread['p10']:.2f}, median {spread['median']:.2f}, p90 {spread['p90']:.2f})"
        )
    for reason, count in pictures.dropped.items():
        print(f"left out: {count} {reason}", file=sys.stderr)
    for warning in figures["warnings"]:
        print(f"note: {warning}", file=sys.stderr)
    print(json.dumps({name: value for name, value in result.items() if name != "clip_scores"}))
