"""The model folder: what its parts hash to, and what is refused in one line."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY_MODEL
from diffusers import AutoencoderKL
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from precompute.columns import image_columns, text_columns
from precompute.image_encoder import ImageEncoder
from precompute.model_folder import ModelFolder, find_model
from precompute.text_encoder import TextEncoder
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
    columns = [*image_columns(fresh, [32, 64], "float32"), *text_columns(fresh, "float32")]
    return [column.column_id for column in columns]


def load_encoders(model: ModelFolder) -> None:
    model.tokenizer_sha256()
    ImageEncoder(model, CPU, torch.float32)
    TextEncoder(model, CPU, torch.float32)


def test_a_folder_says_what_columns_need(model):
    assert model.downsample_factor == 8
    assert model.weights_sha256("vae") == sha256_of(model.path / "vae" / WEIGHTS["vae"])
    (image,) = image_columns(model, [40], "float32")
    (text,) = text_columns(model, "float32")
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
    assert model.text_config()["hidden_size"] == 128
    load_encoders(model)


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (lambda m: change_config(m, "vae", scaling_factor=0.5), [True, True, False]),
        (lambda m: change_config(m, "vae", sample_size=8), [True, True, False]),
        (lambda m: change_config(m, "text_encoder", hidden_act="gelu"), [False, False, True]),
        (lambda m: (m.path / "tokenizer" / "more.txt").write_text("x"), [False, False, True]),
        (lambda m: change_config(m, "vae", _diffusers_version="0"), [False, False, False]),
        (lambda m: change_config(m, "text_encoder", dtype="x"), [False, False, False]),
        (lambda m: (m.path / "model_index.json").write_text("{}"), [False, False, False]),
        (lambda m: m.path.rename(m.path.parent / "moved").rename(m.path), [False, False, False]),
    ],
    ids=["factor", "config", "activation", "tokenizer", "version", "dtype", "index", "moved"],
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


def test_columns_ask_for_no_more_than_their_own_parts(model):
    shutil.copytree(model.path, model.path.parent / "images only")
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(model.path.parent / "images only" / name)
    shutil.rmtree(model.path / "vae")
    images = find_model(str(model.path.parent / "images only"))
    assert image_columns(images, [32], "float32")
    assert text_columns(model, "float32")
    ImageEncoder(images, CPU, torch.float32)
    TextEncoder(model, CPU, torch.float32)


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
    "name", ["/nowhere/at/all", "./nowhere", "../nowhere", "nowhere", "a/b/c", "@main", "a@b/c"]
)
def test_what_is_no_folder_and_no_hub_id_is_refused_at_once(name, tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("this must not ask the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"no such folder; wanted a diffusers model folder or a hub"
    ):
        find_model(name)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "file"])
def test_a_single_file_is_refused_with_the_call_that_converts_it(name, tmp_path):
    (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=r"single file; .*from_single_file.*save_pretrained"):
        find_model(str(tmp_path / name))


def test_a_part_of_a_pipeline_is_refused_with_the_folder_that_is_wanted(model):
    for part in WEIGHTS:
        with pytest.raises(UserError, match=r"is one part of a pipeline.*folder around it"):
            find_model(str(model.path / part))


@pytest.mark.parametrize("name", ["nobody/nothing-at-all", "a/b", "owner/na me", "owner/--bad--"])
def test_a_hub_id_that_cannot_be_had_is_refused_in_one_line(name):
    with pytest.raises(
        UserError, match=r"not to be had from the hub.*examples/tiny-model"
    ) as error:
        find_model(name)
    assert "\n" not in str(error.value)


class FakeHub:
    """Stands in for `snapshot_download`: one repository, whose files are copied when asked for."""

    def __init__(self, files: Path, cache: Path) -> None:
        self.files, self.snapshot = files, cache / "snapshots" / ("c" * 40)
        self.revisions: list[str | None] = []

    def download(self, repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert repository == "owner/name"
        self.revisions.append(revision)
        names = [str(p.relative_to(self.files)) for p in self.files.rglob("*") if p.is_file()]
        self.snapshot.mkdir(parents=True, exist_ok=True)
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (self.snapshot / name).parent.mkdir(exist_ok=True)
            shutil.copy(self.files / name, self.snapshot / name)
        return str(self.snapshot)

    def fetched_weights(self) -> set[str]:
        """All that is not text."""
        return {
            str(path.relative_to(self.snapshot))
            for path in self.snapshot.rglob("*")
            if path.is_file() and path.suffix not in (".json", ".txt")
        }


@pytest.fixture
def hub(model: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """Has `model`, and beside it what no job needs."""
    for name in ("unet", "safety_checker"):
        shutil.copytree(model.path / "text_encoder", model.path / name)
    (model.path / "sd.safetensors").write_text("a single-file checkpoint")
    for folder, file in WEIGHTS.items():
        stem = file.removesuffix(".safetensors")
        for more in (f"{stem}.bin", f"{stem}.fp16.safetensors", f"{stem}.non_ema.safetensors"):
            (model.path / folder / more).write_text("another precision")
    fake = FakeHub(model.path, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake.download)
    return fake


def test_a_hub_id_is_as_good_as_its_folder_and_fetches_no_more_than_is_needed(hub, model):
    found = find_model("owner/name")
    assert (found.name, found.path) == ("owner/name", hub.snapshot)
    assert hub.fetched_weights() == set()
    assert not (hub.snapshot / "unet").exists()
    (image,) = image_columns(found, [32], "float32")
    assert hub.fetched_weights() == {f"vae/{WEIGHTS['vae']}"}
    (text,) = text_columns(found, "float32")
    assert hub.fetched_weights() == {f"{part}/{file}" for part, file in WEIGHTS.items()}
    assert [image, text] == [
        *image_columns(model, [32], "float32"),
        *text_columns(model, "float32"),
    ]
    load_encoders(found)


def test_an_encoder_fetches_its_own_weights(hub):
    ImageEncoder(find_model("owner/name"), CPU, torch.float32)
    assert hub.fetched_weights() == {f"vae/{WEIGHTS['vae']}"}


@pytest.mark.parametrize("revision", [None, "v1.0", "refs/pr/3"])
def test_all_files_of_a_hub_id_are_of_one_commit(hub, revision):
    """The branch may move between two calls."""
    model = find_model(f"owner/name@{revision}" if revision else "owner/name")
    model.weights("vae")
    assert hub.revisions == [revision, "c" * 40]


def test_half_precision_weights_are_fetched_where_there_are_no_others(hub):
    folder = hub.files / "vae"
    for path in folder.glob("diffusion*"):
        if ".fp16." not in path.name:
            path.unlink()
    assert find_model("owner/name").weights("vae").variant == "fp16"
    assert hub.fetched_weights() == {"vae/diffusion_pytorch_model.fp16.safetensors"}


def test_a_text_encoder_that_cannot_be_used_is_never_fetched(hub):
    shutil.copytree(hub.files / "text_encoder", hub.files / "text_encoder_2")
    config = hub.files / "text_encoder_2" / "config.json"
    config.write_text('{"architectures": ["T5EncoderModel"]}')
    model = find_model("owner/name")
    with pytest.raises(UserError, match=r"text_encoder_2: is a T5EncoderModel"):
        text_columns(model, "float32")
    assert not any(name.startswith("text_encoder_2") for name in hub.fetched_weights())


def test_an_autoencoder_alone_on_the_hub_is_refused_as_one(hub):
    shutil.copy(hub.files / "vae" / "config.json", hub.files)
    shutil.rmtree(hub.files / "vae")
    with pytest.raises(UserError, match=r"is one part of a pipeline.*into one as vae/"):
        find_model("owner/name")


def http_error(kind: type[errors.HfHubHTTPError]) -> Exception:
    return kind("says the hub\nin two lines", response=Mock(headers={}))


@pytest.mark.parametrize(
    ("error", "reason", "remedy"),
    [
        (http_error(errors.GatedRepoError), "it is gated", "accept its licence"),
        (http_error(errors.RepositoryNotFoundError), "no such repository", "check the spell"),
        (http_error(errors.RevisionNotFoundError), "no revision v9", "a branch, tag or com"),
        (http_error(errors.HfHubHTTPError), "says the hub", "--model <folder>"),
        (errors.LocalEntryNotFoundError("offline"), "cannot be reached", "--model <folder>"),
        (errors.HTTPError("no proxy"), "no proxy", "--model <folder>"),
        (errors.HFValidationError("bad name"), "bad name", "--model <folder>"),
        (OSError(28, "No space left on device"), "No space left", "--model <folder>"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_each_failure_of_the_hub_says_why_and_what_to_do(monkeypatch, error, reason, remedy):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError) as refused:
        find_model("owner/name@v9")
    text = str(refused.value)
    assert text.startswith("owner/name@v9: no such folder, and not to be had from the hub (")
    assert reason in text
    assert f"Remedy: {remedy}" in text
    assert "\n" not in text


def test_a_fault_of_ours_is_not_taken_for_one_of_the_hub(monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(TypeError):
        find_model("owner/name")


def test_weights_in_several_pieces_hash_like_their_names_and_bytes(model):
    folder = model.path / "text_encoder"
    whole = folder / WEIGHTS["text_encoder"]
    first = shutil.copy(whole, folder / "model-00001-of-00002.safetensors")
    whole.rename(folder / "model-00002-of-00002.safetensors")
    before = model.weights_sha256("text_encoder")
    garbage(Path(first))
    assert model.weights_sha256("text_encoder") != before
