"""The frozen encoders' folder: where it is, whether it is whole, and what its files hash to.

Reads configurations and bytes only; no torch, so that a job with nothing to do ends at once.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from shards.canonical import sha256_of
from shards.column import Json
from shards.errors import UserError

# Weight files as diffusers and transformers look for them, best first.
_WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)
# diffusers' own: the published configurations of SD 1 and SD 2 are older than the field.
_DEFAULT_SCALING_FACTOR = 0.18215
_HUB_PATTERNS = [
    f"{part}/{pattern}"
    for part in ("vae", "text_encoder", "tokenizer", "scheduler")
    for pattern in ("*.json", "*.txt", *_WEIGHTS)
] + ["model_index.json"]


@dataclass(frozen=True)
class ModelFolder:
    """A diffusers model folder with `vae/`, `text_encoder/` and `tokenizer/`.

    Args:
        name: as the user gave it: a folder or a hub id.
        path: the local folder.
    """

    name: str
    path: Path

    @cached_property
    def vae_config(self) -> Json:
        """Configuration of the VAE, without notes on who saved it."""
        config = self._config("vae", ("latent_channels", "block_out_channels"))
        return {"scaling_factor": _DEFAULT_SCALING_FACTOR, **config}

    @cached_property
    def text_config(self) -> Json:
        """Configuration of the text encoder, without notes on who saved it."""
        needed = ("hidden_size", "max_position_embeddings", "vocab_size")
        return self._config("text_encoder", needed)

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent cell, along a side (diffusers: `vae_scale_factor`)."""
        factor: int = 2 ** (len(self.vae_config["block_out_channels"]) - 1)
        return factor

    def weights_sha256(self, part: str) -> str:
        """Hash of a part's weight file, or over those of all its pieces.

        Raises:
            UserError: the part has no weights.
        """
        folder = self.path / part
        whole = [folder / name for name in _WEIGHTS if (folder / name).exists()]
        files = whole[:1] or sorted(folder.glob("*-of-*.safetensors"))
        if not files:
            raise UserError(
                folder,
                "no weights",
                wanted=" or ".join(_WEIGHTS[:2]),
                remedy="save the model with save_pretrained, or name another --model",
            )
        return _hash_of_hashes(files) if len(files) > 1 else sha256_of(files[0])

    def tokenizer_sha256(self) -> str:
        """Hash over the tokenizer's files.

        Raises:
            UserError: the tokenizer has no vocabulary.
        """
        folder = self._folder("tokenizer")
        files = sorted(p for p in folder.iterdir() if p.is_file())
        if not {"tokenizer.json", "vocab.json"} & {path.name for path in files}:
            # transformers would load one that knows no word
            raise UserError(folder, "no vocabulary", wanted="tokenizer.json or vocab.json")
        return _hash_of_hashes(files)

    def _folder(self, part: str) -> Path:
        folder = self.path / part
        if not folder.is_dir():
            present = ", ".join(sorted(p.name for p in self.path.iterdir() if p.is_dir())) or "none"
            raise UserError(
                self.path,
                f"model folder without {part}/ (has {present})",
                wanted="vae/, text_encoder/ and tokenizer/ as diffusers saves them",
                remedy="name another --model",
            )
        return folder

    def _config(self, part: str, needed: tuple[str, ...]) -> Json:
        path = self._folder(part) / "config.json"
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(path, f"not readable ({error})", wanted="a JSON config") from None
        config: Json = document if isinstance(document, dict) else {}
        missing = [name for name in needed if name not in config]
        if missing:
            raise UserError(path, f"lacks {', '.join(missing)}", wanted=f"the config of a {part}")
        notes = {"transformers_version", "torch_dtype", "dtype", "architectures"}
        return {k: v for k, v in config.items() if not k.startswith("_") and k not in notes}


def _hash_of_hashes(files: list[Path]) -> str:
    text = "".join(f"{path.name} {sha256_of(path)}\n" for path in files)
    return hashlib.sha256(text.encode()).hexdigest()


def find_model(name: str) -> ModelFolder:
    """A local folder, or a hub repository's parts that stage 1 needs, fetched once.

    Raises:
        UserError: neither.
    """
    path = Path(name)
    if path.is_dir():
        return ModelFolder(name, path)
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise UserError(
            name, "no such folder", wanted="a diffusers model folder or a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return ModelFolder(name, Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            name,
            f"no such folder, and not to be had from the hub ({first_line})",
            wanted="a diffusers model folder or a hub id (owner/name)",
            remedy="--model <folder>; the embedded one is examples/tiny-model",
        ) from None
