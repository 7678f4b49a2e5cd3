"""The model folder: what its parts hash to, and what is refused in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_MODEL
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from precompute.columns import image_columns, text_column
from precompute.encoders import ImageEncoder, TextEncoder
from precompute.model_folder import ModelFolder, find_model
from shards.canonical import sha256_of
from shards.errors import UserError

CPU = torch.device("cpu")
WEIGHTS = {"vae": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> ModelFolder:
    """A copy that a test may spoil."""
    path = shutil.copytree(model_folder, tmp_path / "model")
    return ModelFolder(str(path), path)


def change_config(model: ModelFolder, part: str, **changes: Any) -> None:
    path = model.path / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def ids_of(model: ModelFolder) -> list[str]:
    """Column ids as a new job would find them."""
    fresh = ModelFolder(model.name, model.path)
    columns = [*image_columns(fresh, [32, 64], "float32"), text_column(fresh, "float32")]
    return [column.column_id for column in columns]


def load_encoders(model: ModelFolder) -> None:
    model.tokenizer_sha256()
    ImageEncoder(model, CPU, torch.float32)
    TextEncoder(model, CPU, torch.float32)


def test_a_folder_says_what_columns_need(model):
    assert model.downsample_factor == 8
    assert model.weights_sha256("vae") == sha256_of(model.path / "vae" / WEIGHTS["vae"])
    (image,), text = image_columns(model, [40], "float32"), text_column(model, "float32")
    assert image.latent_shape == (4, 5, 5)
    assert image.scaling_factor == model.vae_config["scaling_factor"]
    assert (text.num_tokens, text.dim) == (77, 128)


def test_a_vae_from_before_the_scaling_factor_was_a_field_has_the_default_of_diffusers(model):
    path = model.path / "vae" / "config.json"
    config = json.loads(path.read_text())
    del config["scaling_factor"]
    path.write_text(json.dumps(config))
    (image,) = image_columns(model, [32], "float32")
    vae = AutoencoderKL.from_pretrained(model.path / "vae")
    assert image.scaling_factor == vae.config.scaling_factor == 0.18215


def test_the_embedded_model_is_such_a_folder():
    model = ModelFolder(str(TINY_MODEL), TINY_MODEL)
    assert model.downsample_factor == 8
    assert model.vae_config["latent_channels"] == 4
    assert model.text_config["hidden_size"] == 128
    load_encoders(model)


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (lambda m: change_config(m, "vae", scaling_factor=0.5), [True, True, False]),
        (lambda m: change_config(m, "vae", shift_factor=0.1), [True, True, False]),
        (lambda m: change_config(m, "text_encoder", hidden_act="gelu"), [False, False, True]),
        (lambda m: (m.path / "tokenizer" / "more.txt").write_text("x"), [False, False, True]),
        (lambda m: change_config(m, "vae", _diffusers_version="0"), [False, False, False]),
        (lambda m: change_config(m, "text_encoder", dtype="x"), [False, False, False]),
        (lambda m: (m.path / "model_index.json").write_text("{}"), [False, False, False]),
        (lambda m: m.path.rename(m.path.parent / "moved").rename(m.path), [False, False, False]),
    ],
    ids=["factor", "shift", "activation", "tokenizer", "version", "dtype", "index", "moved"],
)
def test_columns_are_new_when_what_they_depend_on_is_and_only_then(model, change, changed):
    before = ids_of(model)
    change(model)
    assert [old != new for old, new in zip(before, ids_of(model), strict=True)] == changed


@pytest.mark.parametrize("part", WEIGHTS)
def test_one_other_weight_is_another_column(model, part):
    before = ids_of(model)
    path = model.path / part / WEIGHTS[part]
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    after = ids_of(model)
    assert (before[0] != after[0]) == (part == "vae")
    assert (before[2] != after[2]) == (part == "text_encoder")


@pytest.mark.parametrize("resolutions", [[0], [-8], [4], [36], [32, 33]])
def test_a_resolution_that_the_vae_cannot_encode_is_refused(model, resolutions):
    with pytest.raises(UserError, match=r"--resolutions: .*wanted multiples of 8"):
        image_columns(model, resolutions, "float32")


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_a_missing_part_is_named_with_what_is_there(model, part):
    shutil.rmtree(model.path / part)
    with pytest.raises(UserError, match=rf"model folder without {part}/ \(has ") as error:
        ids_of(model)
    assert str(model.path) in str(error.value)


@pytest.mark.parametrize("part", WEIGHTS)
def test_missing_weights_are_named_with_a_remedy(model, part):
    (model.path / part / WEIGHTS[part]).unlink()
    with pytest.raises(UserError, match=rf"{part}: no weights; wanted .*safetensors.*Remedy: "):
        ids_of(model)


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("text", [None, "", "{", "[]", "null", "3", '{"a": 1}', "\xff"])
def test_a_broken_config_is_named(model, part, text):
    path = model.path / part / "config.json"
    path.unlink()
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=rf"{part}/config\.json: "):
        ids_of(model)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def garbage(path: Path) -> None:
    path.write_bytes(b"garbage" * 1000)


def lose_a_weight(path: Path) -> None:
    weights = load_file(path)
    del weights[sorted(weights)[0]]
    save_file(weights, path, metadata={"format": "pt"})


def rename_all(path: Path) -> None:
    renamed = {f"another.{name}": weight for name, weight in load_file(path).items()}
    save_file(renamed, path, metadata={"format": "pt"})


def change_a_shape(path: Path) -> None:
    weights = load_file(path)
    name = sorted(name for name in weights if weights[name].ndim > 1)[0]
    weights[name] = torch.cat([weights[name]] * 2)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize(
    "spoil",
    [cut_short, garbage, lose_a_weight, rename_all, change_a_shape],
    ids=lambda f: f.__name__,
)
def test_weights_that_do_not_fit_are_refused_and_never_made_up(model, part, spoil):
    """Libraries initialise what is missing at random: a cache of noise, silently."""
    spoil(model.path / part / WEIGHTS[part])
    with pytest.raises(UserError, match=rf"{part}: cannot be loaded"):
        load_encoders(model)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: [path.unlink() for path in folder.iterdir()],
        lambda folder: [(folder / n).unlink() for n in ("tokenizer.json", "vocab.json")],
        lambda folder: [(folder / n).write_text("{") for n in ("tokenizer.json", "vocab.json")],
    ],
    ids=["empty", "no vocabulary", "garbage"],
)
def test_a_tokenizer_that_knows_no_words_is_refused(model, spoil):
    spoil(model.path / "tokenizer")
    with pytest.raises(UserError, match="tokenizer"):
        load_encoders(model)


def test_a_tokenizer_of_another_text_encoder_is_refused(model):
    folder = model.path / "text_encoder"
    encoder = CLIPTextModel.from_pretrained(folder)
    encoder.resize_token_embeddings(100)
    encoder.save_pretrained(folder)
    with pytest.raises(UserError, match=r"tokenizer: 993 tokens; wanted at most 100"):
        load_encoders(ModelFolder(model.name, model.path))


def test_a_local_folder_is_found_by_its_path(model, monkeypatch):
    assert find_model(str(model.path)).path == model.path
    monkeypatch.chdir(model.path.parent)
    assert find_model("model").name == "model"


@pytest.mark.parametrize(
    "name", ["/nowhere/at/all", "./nowhere", "../nowhere", "nowhere", "a/b/c", "{file}"]
)
def test_what_is_no_folder_and_no_hub_id_is_refused_at_once(name, tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("this must not ask the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        UserError, match=r"no such folder; wanted a diffusers model folder or a hub"
    ):
        find_model(name.format(file=tmp_path / "file"))


@pytest.mark.parametrize("name", ["nobody/nothing-at-all", "a/b", "owner/na me", "owner/--bad--"])
def test_a_hub_id_that_cannot_be_had_is_refused_in_one_line(name):
    with pytest.raises(
        UserError, match=r"not to be had from the hub.*examples/tiny-model"
    ) as error:
        find_model(name)
    assert "\n" not in str(error.value)


def test_a_hub_id_is_fetched_with_the_parts_that_stage_one_needs(model, monkeypatch):
    asked: dict[str, Any] = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.update(name=name, patterns=allow_patterns)
        return str(model.path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = find_model("owner/name")
    assert (found.name, found.path) == ("owner/name", model.path)
    patterns = set(asked["patterns"])
    assert {f"vae/{WEIGHTS['vae']}", f"text_encoder/{WEIGHTS['text_encoder']}"} <= patterns
    assert not any(pattern.startswith(("unet/", "safety_checker/")) for pattern in patterns)


def test_weights_in_several_pieces_hash_like_their_names_and_bytes(model):
    folder = model.path / "text_encoder"
    whole = folder / WEIGHTS["text_encoder"]
    first = shutil.copy(whole, folder / "model-00001-of-00002.safetensors")
    whole.rename(folder / "model-00002-of-00002.safetensors")
    before = model.weights_sha256("text_encoder")
    garbage(Path(first))
    assert model.weights_sha256("text_encoder") != before
