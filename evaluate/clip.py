"""A CLIP folder: features of pictures and of captions, and how well the two go together.

torchmetrics' `CLIPScore` is not used: with transformers 5 it takes the model's output for a tensor
and fails, it knows none but a few names of the hub, and it cuts a long caption's end token off,
which is the very token that CLIP sums a caption up at. `clip_scores` is the same figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from precompute.hub import HubRepository
from precompute.weight_files import WEIGHT_FORMATS, WeightFiles
from shards.errors import UserError

_CONFIGS = ["config.json", "*processor_config.json", "tokenizer*", "vocab.json", "merges.txt"]
_WANTED = "a folder or hub id of a transformers CLIPModel with its processor"


class Clip:
    """A frozen transformers `CLIPModel` with its tokenizer and its preparation of pictures.

    Pictures are prepared by PIL on the CPU, whether torchvision is installed or not, so that the
    figures do not depend on it.

    Args:
        name: folder or hub id (owner/name or owner/name@revision).
        device: where it runs.

    Attributes:
        weights_sha256: of its weights' file, or over those of the pieces.
        num_features: width of both embeddings.
        side: of the pictures that it sees, in pixels.

    Raises:
        UserError: no such folder, or no CLIP model in it.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.name, self._device = name, torch.device(device)
        folder = _find_folder(name)
        self.weights_sha256 = _find_weights(folder).sha256()
        try:
            model, report = CLIPModel.from_pretrained(folder, output_loading_info=True)
            self._images: Any = CLIPImageProcessorPil.from_pretrained(folder)
            self._tokenizer: Any = CLIPTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(name, f"cannot be loaded ({reason})", wanted=_WANTED) from None
        if missing := sorted(report["missing_keys"]):  # they are drawn at random, with a warning
            found = f"lacks {len(missing)} weights of a CLIP, first {missing[0]}"
            raise UserError(name, found, wanted=_WANTED)
        self._model: Any = model.eval().to(self._device).requires_grad_(False)
        self.num_features = int(self._model.config.projection_dim)
        self.side = int(self._images.crop_size["height"])

    @torch.inference_mode()
    def image_features(self, images: Tensor) -> Tensor:
        """Projected embeddings [B, D] float32, not normalised, of pictures uint8 [B, 3, H, W]."""
        pictures = list(images.permute(0, 2, 3, 1).cpu().numpy())
        pixels = self._images(images=pictures, return_tensors="pt")["pixel_values"]
        features: Tensor = self._model.get_image_features(pixels.to(self._device)).pooler_output
        return features.float()

    @torch.inference_mode()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Projected embeddings [B, D] float32; what is longer than the model's context is cut.

        The end token stays.
        """
        tokens = self._tokenizer(
            list(captions),
            padding=True,
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._device)
        features: Tensor = self._model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return features.float()

    def num_too_long(self, captions: Sequence[str]) -> int:
        """How many captions are longer than the model's context."""
        limit = self._model.config.text_config.max_position_embeddings
        return sum(len(ids) > limit for ids in self._tokenizer(list(captions))["input_ids"])


def clip_scores(image_features: Tensor, text_features: Tensor) -> Tensor:
    """100 times the cosine of each picture with its caption, [B] (arXiv:2104.08718 without weight).

    As torchmetrics' `CLIPScore` and the published curves have it; MLPerf states it divided by 100.
    """
    return 100 * F.cosine_similarity(image_features, text_features, dim=-1)


def _find_folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    hub = HubRepository.parse(name)
    if hub is None:
        raise UserError(
            name, "no such folder", wanted=_WANTED, remedy="python -m examples.tiny_clip makes one"
        )
    folder = hub.fetch(_CONFIGS)
    for weight_format in WEIGHT_FORMATS:
        hub.fetch(weight_format.patterns)
        if weight_format.find(folder):
            break
    return folder


def _find_weights(folder: Path) -> WeightFiles:
    for weight_format in WEIGHT_FORMATS:
        if found := weight_format.find(folder):
            return found
    raise UserError(folder, "no weights", wanted=_WANTED)
