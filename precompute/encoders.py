"""The two frozen encoders, as stage 1 and the online arm of the benchmark use them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from precompute.model_folder import ModelFolder
from shards.errors import UserError


def choose_device(device: str) -> torch.device:
    """`auto` is the first CUDA device, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError("--device", f"{device} ({str(error).splitlines()[0]})") from None
    return chosen


def to_pixel_values(squares: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [B, 3, H, W] to `pixel_values`, float32 in [-1, 1]."""
    return torch.from_numpy(squares).to(device).float().div_(127.5).sub_(1.0)


def _load(model: ModelFolder, part: str, loader: Any, **options: Any) -> Any:
    try:
        return loader.from_pretrained(model.path, subfolder=part, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _cannot_be_loaded(model, part, str(error).strip().splitlines()[0]) from None


def _load_weights(model: ModelFolder, part: str, loader: Any, **options: Any) -> Any:
    loaded, report = _load(model, part, loader, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):  # the libraries would make them up at random
        raise _cannot_be_loaded(model, part, f"{len(missing)} weights missing: {missing[0]}, …")
    return loaded


def _cannot_be_loaded(model: ModelFolder, part: str, why: str) -> UserError:
    return UserError(
        model.path / part,
        f"cannot be loaded ({why})",
        wanted=f"a {part} as diffusers saves it",
        remedy="save the model with save_pretrained, or name another --model",
    )


def load_vae(model: ModelFolder, device: torch.device, dtype: torch.dtype) -> Any:
    """The frozen `AutoencoderKL` of a model folder.

    Raises:
        UserError: it cannot be loaded, or lacks weights.
    """
    from diffusers import AutoencoderKL

    vae = _load_weights(model, "vae", AutoencoderKL, torch_dtype=dtype)
    vae = vae.to(device, memory_format=torch.channels_last)
    return vae.requires_grad_(False).eval()


class ImageEncoder:
    """The VAE's encoder: `pixel_values` to moments.

    Args:
        model: folder with `vae/`.
        device: where it runs.
        dtype: precision that it runs in.
    """

    def __init__(self, model: ModelFolder, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self._model, self._dtype = model, dtype
        self._vae = load_vae(model, device, dtype)
        self._float32_vae: Any = None

    @torch.inference_mode()
    def encode(self, pixel_values: Tensor) -> tuple[Tensor, int]:
        """Moments as diffusers emits them (`DiagonalGaussianDistribution.parameters`), unscaled.

        Args:
            pixel_values: [B, 3, H, W] in [-1, 1].

        Returns:
            moments [B, 2C, h, w] float32, and how many samples overflowed in half precision and
            were encoded again in float32. What is not finite even then is left so.
        """
        moments = self._run(self._vae, pixel_values.to(self._dtype))
        if self._dtype == torch.float32:
            return moments, 0
        overflowed = (~torch.isfinite(moments).flatten(1).all(dim=1)).nonzero().flatten()
        if len(overflowed):
            self._float32_vae = self._float32_vae or load_vae(
                self._model, self.device, torch.float32
            )
            moments[overflowed] = self._run(self._float32_vae, pixel_values[overflowed].float())
        return moments, len(overflowed)

    @staticmethod
    def _run(vae: Any, pixel_values: Tensor) -> Tensor:
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        moments: Tensor = vae.encode(pixel_values).latent_dist.parameters
        return moments.float().contiguous()


class TextEncoder:
    """Tokenizer and text encoder: captions to token ids and states.

    Args:
        model: folder with `tokenizer/` and `text_encoder/`.
        device: where it runs.
        dtype: precision that it runs in.
    """

    def __init__(self, model: ModelFolder, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import CLIPTextModel, CLIPTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # loading takes a moment; the job has a bar of its own
        self._device = device
        self._num_tokens = model.text_config["max_position_embeddings"]
        self._tokenizer = _load(model, "tokenizer", CLIPTokenizer)
        vocab_size = model.text_config["vocab_size"]
        if len(self._tokenizer) > min(vocab_size, 2**16):
            raise UserError(
                model.path / "tokenizer",
                f"{len(self._tokenizer)} tokens",
                wanted=f"at most {vocab_size}, the text encoder's, and 65536: ids have 16 bits",
            )
        encoder = _load_weights(model, "text_encoder", CLIPTextModel, dtype=dtype)
        self._encoder = encoder.to(device).requires_grad_(False).eval()

    def tokenize(self, captions: list[str]) -> np.ndarray:
        """Padded and truncated token ids, uint16 [B, T]; the pipelines' own settings."""
        ids = self._tokenizer(
            captions, padding="max_length", truncation=True, max_length=self._num_tokens
        ).input_ids
        return np.asarray(ids, dtype=np.uint16)

    @torch.inference_mode()
    def encode(self, input_ids: np.ndarray) -> Tensor:
        """Last hidden states [B, T, D] float32; all T positions, as the U-Net attends to them."""
        ids = torch.from_numpy(input_ids.astype(np.int64)).to(self._device)
        states: Tensor = self._encoder(ids)[0]
        return states.float()
