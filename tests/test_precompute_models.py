"""Model folders of every supported class: what is stored is what the pipelines would compute."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, image_bytes, sample_members, smooth_image, status_of, write_tar
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from precompute.columns import image_columns, text_columns
from precompute.config import PrecomputeConfig
from precompute.decode_back import decode_back
from precompute.image_encoder import ImageEncoder
from precompute.job import precompute
from precompute.model_folder import ModelFolder, find_model
from precompute.text_encoder import TextEncoder
from shards.arrays import map_arrays
from shards.column import ImageColumn, TextColumn
from shards.dataset import Column, Dataset
from shards.errors import CorruptFileError, UserError
from shards.receipt import NULL

CPU = torch.device("cpu")
CAPTIONS = ["a red circle above a blue square", "a lion", "circle " * 99, "42 + naïve ❤"]
CLASSES: dict[str, Any] = {
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderTiny": AutoencoderTiny,
    "AutoencoderDC": AutoencoderDC,
}
DETERMINISTIC = ["AutoencoderTiny", "AutoencoderDC"]


def build_autoencoder(name: str) -> Any:
    """A small one of random weights: 8 pixels per latent cell (Tiny: 4)."""
    torch.manual_seed(0)
    if name == "AutoencoderTiny":
        channels = (8, 8, 8)
        return AutoencoderTiny(
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
            scaling_factor=1.5,
        )
    if name == "AutoencoderDC":
        layers: dict[str, Any] = {}
        for half in ("encoder", "decoder"):
            layers[f"{half}_block_out_channels"] = (8, 8, 16, 16)
            layers[f"{half}_layers_per_block"] = (1, 1, 1, 1)
            layers[f"{half}_qkv_multiscales"] = ((), (), (), (5,))
            layers[f"{half}_block_types"] = ("ResBlock",) * 3 + ("EfficientViTBlock",)
        return AutoencoderDC(latent_channels=8, attention_head_dim=8, scaling_factor=0.4, **layers)
    return AutoencoderKL(block_out_channels=(4, 4, 4, 4), norm_num_groups=4, **KL_BLOCKS)


KL_BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


def text_config(width: int, num_layers: int, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=24,
    )


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """`model_folder` with the two text encoders of SDXL, of unlike widths, depths and padding."""
    folder = tmp_path_factory.mktemp("models") / "sdxl"
    shutil.copytree(model_folder, folder)
    tokenizer = CLIPTokenizer.from_pretrained(TINY_MODEL / "tokenizer")
    torch.manual_seed(1)
    CLIPTextModel(text_config(32, 3, tokenizer)).save_pretrained(folder / "text_encoder")
    projecting = CLIPTextModelWithProjection(text_config(48, 4, tokenizer))
    projecting.save_pretrained(folder / "text_encoder_2")
    padding = CLIPTokenizer.from_pretrained(TINY_MODEL / "tokenizer", pad_token="!")
    assert padding.pad_token_id != tokenizer.pad_token_id
    padding.save_pretrained(folder / "tokenizer_2")
    return folder


@pytest.fixture
def with_autoencoder(model_folder: Path, tmp_path: Path) -> Callable[[str], ModelFolder]:
    """A copy of `model_folder` with an autoencoder of another class."""

    def build(name: str) -> ModelFolder:
        folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
        shutil.rmtree(folder / "vae")
        build_autoencoder(name).save_pretrained(folder / "vae")
        return find_model(str(folder))

    return build


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image shard: a sample for each caption."""
    rng = np.random.default_rng(0)
    members = [
        member
        for number, caption in enumerate(CAPTIONS)
        for member in sample_members(
            str(number), image_bytes(smooth_image(rng, 32, 32)), caption, {"width": 32}
        )
    ]
    return write_tar(tmp_path_factory.mktemp("images") / "00000.tar", members)


def run(out: Path, images: Path, model: Path, **options: Any) -> Dataset:
    defaults = {"device": "cpu", "batch_size": 3, "resolutions": "32", "max_drop_frac": 1.0}
    precompute(
        PrecomputeConfig(shards=str(images), out=str(out), model=str(model), **defaults | options)
    )
    assert status_of("verify", out, "--full") == 0
    return Dataset(out)


def image_column(dataset: Dataset) -> Column[Any]:
    (column,) = [c for c in dataset.columns.values() if isinstance(c.spec, ImageColumn)]
    return column


def text_column(dataset: Dataset, name: str) -> Column[Any]:
    (column,) = [c for c in dataset.columns.values() if c.spec.name == name]
    assert isinstance(column.spec, TextColumn)
    return column


def pixel_values(count: int, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(7)) * 2 - 1


def plain_latents(model: ModelFolder, pixels: torch.Tensor) -> torch.Tensor:
    """What diffusers' own calls give: parameters, `latents` or `latent`."""
    autoencoder = CLASSES[model.vae_class].from_pretrained(model.path, subfolder="vae").eval()
    with torch.inference_mode():
        encoded = autoencoder.encode(pixels)
    if model.vae_class == "AutoencoderKL":
        return encoded.latent_dist.parameters
    return encoded.latents if model.vae_class == "AutoencoderTiny" else encoded.latent


@pytest.mark.parametrize("name", CLASSES)
def test_an_encoder_gives_what_diffusers_gives(with_autoencoder, name):
    model = with_autoencoder(name)
    encoder = ImageEncoder(model, CPU, torch.float32)
    pixels = pixel_values(2, 64)
    found, fallbacks = encoder.encode(pixels)
    wanted = plain_latents(model, pixels)
    assert fallbacks == 0
    assert found.dtype == torch.float32
    assert torch.allclose(found, wanted, atol=1e-5)
    (spec,) = image_columns(model, [64], "float32")
    channels = wanted.shape[1] // 2 if encoder.has_posterior else wanted.shape[1]
    assert spec.latent_shape == (channels, *wanted.shape[2:])
    assert encoder.has_posterior == (name == "AutoencoderKL") == (spec.latents == "moments")


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_scaled_latents_are_those_of_the_image_to_image_pipeline(with_autoencoder, name):
    model = with_autoencoder(name)
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import (
        retrieve_latents,
    )

    autoencoder = CLASSES[name].from_pretrained(model.path, subfolder="vae")
    pixels = pixel_values(1)
    found, _ = ImageEncoder(model, CPU, torch.float32).encode(pixels)
    (spec,) = image_columns(model, [32], "float32")
    assert spec.scaling_factor == autoencoder.config.scaling_factor != 1
    if name == "AutoencoderTiny":  # the Stable Diffusion pipelines know no other field
        with torch.inference_mode():
            wanted = retrieve_latents(autoencoder.encode(pixels))
        wanted = wanted * autoencoder.config.scaling_factor
        assert torch.allclose(found * spec.scaling_factor, wanted, atol=1e-5)


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("latents", ["auto", "mean", "mean-int8"])
def test_a_job_with_a_deterministic_autoencoder(tmp_path, with_autoencoder, images, name, latents):
    model = with_autoencoder(name)
    dataset = run(tmp_path / "out", images, model.path, latents=latents)
    column = image_column(dataset)
    assert column.spec.latents == "mean"
    assert column.spec.storage_dtype == ("int8" if latents == "mean-int8" else "float16")
    stored = map_arrays(column.path_of("00000"))["mean"]
    assert stored.shape == (len(CAPTIONS), *column.spec.latent_shape)
    (result,) = decode_back(dataset, 5)
    assert result["psnr_db"] is not None
    assert result["relative_error"] < 0.02
    assert result["problem"] == ""
    # the same number, measured twice: as the samples were encoded, and from what was stored
    assert column.stats["latent_std"] == pytest.approx(result["latent_std"], rel=0.02)


def test_stored_latents_are_the_plain_ones_rounded(tmp_path, with_autoencoder, images):
    model = with_autoencoder("AutoencoderTiny")
    dataset = run(tmp_path / "out", images, model.path)
    rng = np.random.default_rng(0)
    pictures = np.stack([np.array(smooth_image(rng, 32, 32)) for _ in CAPTIONS])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    stored = map_arrays(image_column(dataset).path_of("00000"))["mean"]
    assert np.allclose(stored, plain_latents(model, pixels).numpy(), rtol=2**-10, atol=1e-5)


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("storage", ["moments", "moments-int8"])
def test_moments_of_a_deterministic_autoencoder_are_refused(with_autoencoder, name, storage):
    with pytest.raises(UserError, match=rf"--latents: {storage} of an {name}.*wanted mean"):
        image_columns(with_autoencoder(name), [32], "float32", storage)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_overflows_in_half_precision_is_encoded_in_float32(
    with_autoencoder, monkeypatch, name, dtype
):
    model = with_autoencoder(name)
    pixels = pixel_values(4)
    wanted = plain_latents(model, pixels)
    encode = CLASSES[name].encode

    def overflowing(self: Any, x: torch.Tensor, *args: Any) -> Any:
        encoded = encode(self, x, *args)
        tensor = encoded.latent_dist.parameters if name == "AutoencoderKL" else encoded[0]
        if x.dtype == dtype:
            tensor[1, 0, 0, 0], tensor[3, 1, 2, 2] = float("inf"), float("nan")
        return encoded

    monkeypatch.setattr(CLASSES[name], "encode", overflowing)
    found, fallbacks = ImageEncoder(model, CPU, dtype).encode(pixels)
    assert fallbacks == 2
    assert torch.allclose(found[[1, 3]], wanted[[1, 3]], atol=1e-5)
    assert torch.allclose(found, wanted, atol=0.1)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler")
def test_a_compiled_encoder_gives_the_same_from_one_graph(with_autoencoder):
    model = with_autoencoder("AutoencoderTiny")  # the quickest to compile
    eager = ImageEncoder(model, CPU, torch.float32)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = ImageEncoder(model, CPU, torch.float32, compiled_batch_size=4)
    for count in (4, 1, 3):
        found, wanted = (each.encode(pixel_values(count))[0] for each in (compiled, eager))
        assert found.shape == wanted.shape
        assert torch.allclose(found, wanted, atol=1e-4)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", ["AutoencoderKLWan", "AsymmetricAutoencoderKL", "VQModel", "X"])
def test_an_autoencoder_of_another_class_is_refused_with_those_that_work(with_autoencoder, name):
    model = with_autoencoder("AutoencoderKL")
    change_config(model, "vae", _class_name=name)
    with pytest.raises(UserError, match=rf"vae: is a {name}; wanted AutoencoderKL or .*DC"):
        image_columns(model, [32], "float32")


@pytest.mark.parametrize("name", CLASSES)
def test_a_scaling_factor_that_is_not_in_the_config_is_diffusers_default(with_autoencoder, name):
    model = with_autoencoder(name)
    path = model.path / "vae" / "config.json"
    config = json.loads(path.read_text())
    del config["scaling_factor"]
    path.write_text(json.dumps(config))
    (spec,) = image_columns(model, [32], "float32")
    wanted = CLASSES[name].from_pretrained(model.path, subfolder="vae").config.scaling_factor
    assert spec.scaling_factor == wanted


def change_config(model: ModelFolder, part: str, **changes: Any) -> None:
    path = model.path / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "change",
    [{"shift_factor": 0.1159}, {"latents_mean": [0.1] * 4}, {"latents_std": [2.0] * 4}],
    ids=lambda change: next(iter(change)),
)
def test_latents_that_want_more_than_a_factor_are_refused(with_autoencoder, change):
    model = with_autoencoder("AutoencoderKL")
    change_config(model, "vae", **change)
    with pytest.raises(UserError, match=rf"{next(iter(change))} .*scaling_factor alone"):
        image_columns(model, [32], "float32")


@pytest.mark.parametrize("nothing", [{"shift_factor": 0.0}, {"shift_factor": None}])
def test_a_shift_of_nothing_is_no_shift(with_autoencoder, nothing):
    model = with_autoencoder("AutoencoderKL")
    change_config(model, "vae", latents_mean=None, latents_std=None, **nothing)
    assert image_columns(model, [32], "float32")


def sdxl_prompts(folder: Path, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """States [N, T, D1 + D2] and pooled [N, P] by diffusers' own pipeline."""
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        unet=None,
        scheduler=diffusers.EulerDiscreteScheduler(),
    )
    with torch.inference_mode():
        states, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    return states, pooled


def test_both_text_encoders_give_what_the_sdxl_pipeline_gives(sdxl_folder):
    states, pooled = sdxl_prompts(sdxl_folder, CAPTIONS)
    model = find_model(str(sdxl_folder))
    encoders = [TextEncoder(model, CPU, torch.float32, part) for part in model.text_parts]
    first, second = (encoder.encode(encoder.tokenize(CAPTIONS)) for encoder in encoders)
    assert torch.allclose(torch.cat([first.states, second.states], dim=-1), states, atol=1e-5)
    assert first.pooled is None
    assert torch.allclose(second.pooled, pooled, atol=1e-5)


def test_one_text_encoder_gives_what_the_sd_pipeline_gives(model_folder):
    pipeline = diffusers.StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(model_folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(model_folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(model_folder / "tokenizer"),
        unet=None,
        scheduler=diffusers.EulerDiscreteScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with torch.inference_mode():
        wanted, _ = pipeline.encode_prompt(CAPTIONS, CPU, 1, do_classifier_free_guidance=False)
    encoder = TextEncoder(find_model(str(model_folder)), CPU, torch.float32)
    found = encoder.encode(encoder.tokenize(CAPTIONS))
    assert torch.allclose(found.states, wanted, atol=1e-5)
    assert found.pooled is None


def test_the_layer_can_be_named_whatever_the_folder_would_take(sdxl_folder, tmp_path):
    """Token ids of SDXL's first text encoder may be encoded from a folder that has only that."""
    alone = Path(shutil.copytree(sdxl_folder, tmp_path / "alone"))
    shutil.rmtree(alone / "text_encoder_2")
    of_both, of_one, named = (
        TextEncoder(find_model(str(folder)), CPU, torch.float32, **options)
        for folder, options in (
            (sdxl_folder, {}),
            (alone, {}),
            (alone, {"hidden_state": "penultimate"}),
        )
    )
    ids = of_both.tokenize(CAPTIONS)
    wanted = of_both.encode(ids).states
    assert torch.equal(named.encode(ids).states, wanted)
    assert not torch.allclose(of_one.encode(ids).states, wanted, atol=0.1)


def test_a_job_with_the_text_encoders_of_sdxl(tmp_path, sdxl_folder, images):
    states, pooled = sdxl_prompts(sdxl_folder, CAPTIONS)
    dataset = run(tmp_path / "out", images, sdxl_folder)
    first, second = text_column(dataset, "text"), text_column(dataset, "text2")
    assert (first.spec.dim, first.spec.pooled_dim) == (32, 0)
    assert (second.spec.dim, second.spec.pooled_dim) == (48, 24)
    assert first.spec.hidden_state == second.spec.hidden_state == "penultimate"
    arrays = [map_arrays(column.path_of("00000")) for column in (first, second)]
    order = arrays[0]["caption"]
    assert order.tolist() == arrays[1]["caption"].tolist()
    stored = np.concatenate([each["states"] for each in arrays], axis=2)[order]
    assert np.allclose(stored, states, rtol=2**-10, atol=1e-5)
    assert arrays[1]["pooled"].dtype == np.float16
    assert np.allclose(arrays[1]["pooled"][order], pooled, rtol=2**-10, atol=1e-5)
    assert "pooled" not in arrays[0]
    (null_wanted,), (null_pooled,) = sdxl_prompts(sdxl_folder, [""])
    nulls = [dataset.read_null(column) for column in (first, second)]
    null_states = np.concatenate([null["states"] for null in nulls], axis=1)
    assert np.allclose(null_states, null_wanted, rtol=2**-10, atol=1e-5)
    assert np.allclose(nulls[1]["pooled"], null_pooled, rtol=2**-10, atol=1e-5)
    assert not np.array_equal(nulls[0]["input_ids"], nulls[1]["input_ids"])  # padded unlike


def test_sdxl_states_in_eight_bits_keep_the_pooled_in_sixteen(tmp_path, sdxl_folder, images):
    states, pooled = sdxl_prompts(sdxl_folder, CAPTIONS)
    dataset = run(tmp_path / "out", images, sdxl_folder, text="int8")
    column = text_column(dataset, "text2-int8")
    arrays = map_arrays(column.path_of("00000"))
    order = arrays["caption"]
    null = dataset.read_null(column)
    numbers = arrays["states"] * arrays["scale"][..., None] * null["channel_scale"]
    wanted = states[..., 32:].numpy()
    assert np.linalg.norm(numbers[order] - wanted) < 0.03 * np.linalg.norm(wanted)
    assert np.allclose(arrays["pooled"][order], pooled, rtol=2**-10, atol=1e-5)
    assert null.keys() == {"input_ids", "states", "channel_scale", "pooled"}


def test_token_ids_alone_want_no_text_encoder_in_memory(tmp_path, sdxl_folder, images, monkeypatch):
    for loader in (CLIPTextModel, CLIPTextModelWithProjection):
        monkeypatch.setattr(loader, "from_pretrained", None)
    dataset = run(tmp_path / "out", images, sdxl_folder, text="ids")
    first, second = (text_column(dataset, name) for name in ("text-ids", "text2-ids"))
    assert first.spec.row_arrays.keys() == second.spec.row_arrays.keys() == {"input_ids"}
    assert dataset.read_null(second).keys() == {"input_ids"}


def test_a_job_without_image_columns_wants_no_autoencoder(tmp_path, sdxl_folder, images):
    folder = Path(shutil.copytree(sdxl_folder, tmp_path / "model"))
    shutil.rmtree(folder / "vae")
    dataset = run(tmp_path / "out", images, folder, resolutions="none")
    assert {column.spec.name for column in dataset.columns.values()} == {"text", "text2"}


def test_a_null_file_without_its_pooled_state_is_refused(tmp_path, sdxl_folder, images):
    dataset = run(tmp_path / "out", images, sdxl_folder)
    first, second = text_column(dataset, "text"), text_column(dataset, "text2")
    spec = {**second.spec.to_json(), "pooled_dim": 0}
    del spec["kind"], spec["format_version"]
    without = Column(**{**vars(second), "spec": TextColumn(**spec)})
    with pytest.raises(CorruptFileError, match="pooled"):
        dataset.read_null(without)
    shutil.copy(first.path_of(NULL), second.path_of(NULL))
    with pytest.raises(CorruptFileError):
        dataset.read_null(second)


def test_an_only_text_encoder_may_have_a_projection(tmp_path, sdxl_folder, images):
    folder = Path(shutil.copytree(sdxl_folder, tmp_path / "model"))
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
        (folder / f"{part}_2").rename(folder / part)
    dataset = run(tmp_path / "out", images, folder)
    column = text_column(dataset, "text")
    assert (column.spec.hidden_state, column.spec.pooled_dim) == ("last", 24)
    encoder = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder").eval()
    arrays = map_arrays(column.path_of("00000"))
    with torch.inference_mode():
        plain = encoder(torch.from_numpy(arrays["input_ids"].astype(np.int64)))
    assert np.allclose(arrays["states"], plain.last_hidden_state, rtol=2**-10, atol=1e-5)
    assert np.allclose(arrays["pooled"], plain.text_embeds, rtol=2**-10, atol=1e-5)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "text_encoder_3"])
def test_a_text_encoder_of_another_class_is_refused_by_its_name(tmp_path, sdxl_folder, part):
    folder = Path(shutil.copytree(sdxl_folder, tmp_path / "model"))
    shutil.rmtree(folder / part, ignore_errors=True)
    config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder / part)
    with pytest.raises(UserError, match=rf"{part}: is a T5EncoderModel; wanted CLIPTextModel"):
        text_columns(find_model(str(folder)), "float32")
    assert image_columns(find_model(str(folder)), [32], "float32")  # that part works


@pytest.mark.parametrize("part", ["tokenizer_2", "text_encoder"])
def test_half_a_pair_is_named(tmp_path, sdxl_folder, part):
    folder = Path(shutil.copytree(sdxl_folder, tmp_path / "model"))
    shutil.rmtree(folder / part)
    with pytest.raises(UserError, match=rf"model folder without {part}/"):
        text_columns(find_model(str(folder)), "float32")


def test_columns_of_two_text_encoders_differ_in_all_that_they_are(sdxl_folder):
    columns = text_columns(find_model(str(sdxl_folder)), "float32")
    assert [column.part for column in columns] == ["text_encoder", "text_encoder_2"]
    assert len({column.weights_sha256 for column in columns}) == 2
    assert len({column.tokenizer_sha256 for column in columns}) == 2


def test_half_precision_variants_serve_where_there_is_nothing_else(tmp_path, sdxl_folder):
    folder = Path(shutil.copytree(sdxl_folder, tmp_path / "model"))
    whole = find_model(str(folder))
    encoded = {}
    for kind in ("full", "variant"):
        if kind == "variant":
            for path in folder.glob("*/*.safetensors"):
                path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
        ids = [c.column_id for c in text_columns(whole, "float32")]
        ids += [c.column_id for c in image_columns(whole, [32], "float32")]
        text = TextEncoder(whole, CPU, torch.float32, "text_encoder_2")
        states = text.encode(text.tokenize(CAPTIONS)).states
        latents, _ = ImageEncoder(whole, CPU, torch.float32).encode(pixel_values(1))
        encoded[kind] = (ids, states, latents)
    assert encoded["full"][0] == encoded["variant"][0]  # the same bytes
    assert torch.equal(encoded["full"][1], encoded["variant"][1])
    assert torch.equal(encoded["full"][2], encoded["variant"][2])
    assert whole.weights("vae").variant == "fp16"
