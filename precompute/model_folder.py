"""The frozen encoders' folder: where it is, whether it is whole, and what its files hash to.

Reads configurations and bytes only; no torch, so that a job with nothing to do ends at once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from precompute.hub import WANTED_MODEL, HubRepository
from precompute.model_classes import AUTOENCODERS, PROJECTING_TEXT_ENCODER, TEXT_ENCODERS
from precompute.weight_files import WEIGHT_FORMATS, WeightFiles, hash_of_hashes
from shards.column import HiddenState, Json
from shards.errors import UserError

_CONFIG_FILES = [
    "model_index.json",
    "config.json",
    "vae/*.json",
    "text_encoder*/*.json",
    "tokenizer*/*.json",
    "tokenizer*/*.txt",
    "scheduler/*.json",
]
_NOTES = {"transformers_version", "torch_dtype", "dtype", "architectures"}
_ANOTHER_MODEL = "name another --model"


@dataclass(frozen=True)
class ModelFolder:
    """A diffusers model folder: `vae/`, and pairs of `text_encoder/` and `tokenizer/`.

    A part is looked at, and fetched where the folder is a hub's, when it is asked for.

    Args:
        name: as the user gave it: a folder or a hub id.
        path: the local folder.
        hub: where its weights come from; None for a local folder.
    """

    name: str
    path: Path
    hub: HubRepository | None = None

    @property
    def vae_class(self) -> str:
        """Class of the autoencoder in diffusers.

        Raises:
            UserError: not one of `AUTOENCODERS`.
        """
        name: str = self._read_config("vae").get("_class_name", "AutoencoderKL")
        if name not in AUTOENCODERS:
            raise UserError(
                self.path / "vae",
                f"is a {name}",
                wanted=" or ".join(AUTOENCODERS),
                remedy=_ANOTHER_MODEL,
            )
        return name

    @property
    def has_posterior(self) -> bool:
        """Whether the autoencoder gives mean and log-variance; else it gives latents."""
        return AUTOENCODERS[self.vae_class].has_posterior

    @cached_property
    def vae_config(self) -> Json:
        """Configuration of the autoencoder, without notes on who saved it.

        Raises:
            UserError: its latents want more than `scaling_factor` to come to unit scale.
        """
        known = AUTOENCODERS[self.vae_class]
        config = self._config("vae", ("latent_channels", known.channels_field))
        for name in ("shift_factor", "latents_mean", "latents_std"):
            if config.get(name):
                raise UserError(
                    self.path / "vae" / "config.json",
                    f"{name} {config[name]}",
                    wanted="none: this release trains with scaling_factor alone",
                    remedy=_ANOTHER_MODEL,
                )
        return {"scaling_factor": known.scaling_factor, **config}

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent cell, along a side (diffusers: `vae_scale_factor`)."""
        channels: list[int] = self.vae_config[AUTOENCODERS[self.vae_class].channels_field]
        return 2 ** (len(channels) - 1)

    @property
    def text_parts(self) -> list[str]:
        """Folders of the text encoders, in the pipeline's order."""
        more = sorted(p.name for p in self.path.glob("text_encoder_[0-9]") if p.is_dir())
        return ["text_encoder", *more]

    @property
    def hidden_state(self) -> HiddenState:
        """The layer that the pipeline takes: with several text encoders (SDXL) the last but one.

        SD 2 takes it too, but its text encoder comes without the last layer.
        """
        return "penultimate" if len(self.text_parts) > 1 else "last"

    def text_class(self, part: str) -> str:
        """Class of a text encoder in transformers.

        Raises:
            UserError: not one of `TEXT_ENCODERS`.
        """
        config = self._read_config(part)
        model_type = config.get("model_type", "clip_text_model")
        by_type = "CLIPTextModel" if model_type == "clip_text_model" else model_type
        name: str = (config.get("architectures") or [by_type])[0]
        if name not in TEXT_ENCODERS:
            raise UserError(
                self.path / part,
                f"is a {name}",
                wanted=" or ".join(TEXT_ENCODERS),
                remedy=_ANOTHER_MODEL,
            )
        return name

    def text_config(self, part: str = "text_encoder") -> Json:
        """Configuration of a text encoder, without notes on who saved it."""
        needed = ["hidden_size", "max_position_embeddings", "vocab_size"]
        if self.text_class(part) == PROJECTING_TEXT_ENCODER:
            needed.append("projection_dim")
        return self._config(part, tuple(needed))

    def pooled_dim(self, part: str) -> int:
        """Width of a text encoder's pooled state; 0 where it has no projection for one."""
        has_one = self.text_class(part) == PROJECTING_TEXT_ENCODER
        return int(self.text_config(part)["projection_dim"]) if has_one else 0

    def weights(self, part: str) -> WeightFiles:
        """The weight files of a part.

        Raises:
            UserError: the part has none.
        """
        folder = self._folder(part)
        for weight_format in WEIGHT_FORMATS:
            if self.hub:
                self.hub.fetch([f"{part}/{pattern}" for pattern in weight_format.patterns])
            if found := weight_format.find(folder):
                return found
        raise UserError(
            folder,
            "no weights",
            wanted="diffusion_pytorch_model.safetensors or model.safetensors",
            remedy="save the model with save_pretrained, or name another --model",
        )

    def weights_sha256(self, part: str) -> str:
        """Hash of a part's weights; see `weights`."""
        return self.weights(part).sha256()

    def tokenizer_sha256(self, part: str = "text_encoder") -> str:
        """Hash over the files of a text encoder's tokenizer.

        Raises:
            UserError: the tokenizer has no vocabulary.
        """
        folder = self._folder(tokenizer_of(part))
        files = tuple(sorted(p for p in folder.iterdir() if p.is_file()))
        if not {"tokenizer.json", "vocab.json"} & {path.name for path in files}:
            # transformers would load one that knows no word
            raise UserError(folder, "no vocabulary", wanted="tokenizer.json or vocab.json")
        return hash_of_hashes(files)

    def _folder(self, part: str) -> Path:
        folder = self.path / part
        if not folder.is_dir():
            present = ", ".join(sorted(p.name for p in self.path.iterdir() if p.is_dir())) or "none"
            raise UserError(
                self.path,
                f"model folder without {part}/ (has {present})",
                wanted="vae/, text_encoder/ and tokenizer/ as diffusers saves them",
                remedy=_ANOTHER_MODEL,
            )
        return folder

    def _read_config(self, part: str) -> Json:
        path = self._folder(part) / "config.json"
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(path, f"not readable ({error})", wanted="a JSON config") from None
        return document if isinstance(document, dict) else {}

    def _config(self, part: str, needed: tuple[str, ...]) -> Json:
        config = self._read_config(part)
        if missing := [name for name in needed if name not in config]:
            raise UserError(
                self.path / part / "config.json",
                f"lacks {', '.join(missing)}",
                wanted=f"the config of a {part}",
            )
        return {k: v for k, v in config.items() if not k.startswith("_") and k not in _NOTES}


def tokenizer_of(part: str) -> str:
    """`tokenizer_2` of `text_encoder_2`."""
    return part.replace("text_encoder", "tokenizer")


def find_model(name: str) -> ModelFolder:
    """A local folder, or a repository of the hub, of which each part is fetched once.

    Raises:
        UserError: neither, or a single file, or one part of a pipeline alone.
    """
    path, repository = Path(name), HubRepository.parse(name)
    if path.is_file():
        raise UserError(
            name,
            "is a single file",
            wanted=WANTED_MODEL,
            remedy="convert a checkpoint with diffusers: "
            "StableDiffusionPipeline.from_single_file(<file>).save_pretrained(<folder>)",
        )
    if path.is_dir():
        folder = ModelFolder(name, path)
    elif repository:
        snapshot = repository.fetch(_CONFIG_FILES)
        folder = ModelFolder(name, snapshot, repository.pinned(snapshot))
    else:
        raise UserError(name, "no such folder", wanted=WANTED_MODEL)
    _refuse_single_part(folder)
    return folder


def _refuse_single_part(folder: ModelFolder) -> None:
    if (folder.path / "config.json").is_file() and not (folder.path / "vae").is_dir():
        raise UserError(
            folder.path,
            "is one part of a pipeline (it has a config.json of its own)",
            wanted="the folder with vae/, text_encoder/ and tokenizer/ in it",
            remedy="--model <the folder around it>; an autoencoder alone goes into one as vae/",
        )
