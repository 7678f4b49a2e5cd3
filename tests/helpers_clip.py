"""Networks of random weights for the tests of metrics."""

from pathlib import Path

import torch
from torch import Tensor

from evaluate.feature_networks import Features


def build_clip_folder(folder: Path, seed: int = 0) -> Path:
    """A CLIP folder of random weights in the shape of the embedded one."""
    from transformers import CLIPTokenizer

    from examples.tiny_clip import TOKENIZER, build_clip, save_clip

    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_clip(folder, build_clip(tokenizer).eval(), tokenizer)
    return folder


class MeanColours:
    """A feature network that says each picture's mean colour, and takes the classes from it."""

    name, weights_sha256, num_features = "mean-colours", "c" * 64, 3
    resizing, has_classes = "none", True

    def __call__(self, images: Tensor) -> Features:
        means = images.float().mean(dim=(2, 3))
        return Features(means, means)
