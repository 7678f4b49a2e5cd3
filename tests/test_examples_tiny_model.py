"""The committed tiny model: loads from its folder alone, and does what its card says."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.grammar import caption_of, parse_caption, sample_scene, words
from examples.pictures import draw_picture
from examples.render import render

FOLDER = Path(__file__).parent.parent / "examples" / "tiny-model"
MAX_BYTES = 8_000_000


@pytest.fixture(scope="module", autouse=True)
def _offline():
    """Any look at the network is an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("socket.socket.connect", _refuse)
        yield


def _refuse(*args):
    raise AssertionError("the tiny model must load from local files only")


@pytest.fixture(scope="module")
def vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(FOLDER, subfolder="vae", local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(FOLDER, subfolder="tokenizer", local_files_only=True)


@pytest.fixture(scope="module")
def text_encoder():
    from transformers import CLIPTextModel

    return CLIPTextModel.from_pretrained(
        FOLDER, subfolder="text_encoder", local_files_only=True
    ).eval()


def encode_captions(tokenizer, text_encoder, captions):
    batch = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    with torch.inference_mode():
        return text_encoder(input_ids=batch.input_ids).last_hidden_state


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(20)
    drawn = {}
    for grammar in ("single", "pairs"):
        held_out = [sample_scene(grammar, "held_out", rng) for _ in range(96)]
        pictures = np.stack([np.asarray(render(scene, rng)) for scene in held_out])
        drawn[grammar] = [caption_of(scene) for scene in held_out], pictures
    return drawn


def pixel_values_of(pictures):
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def round_trip(vae, pictures):
    """Return (scaled latents, deviation of the posterior, decoded pictures)."""
    with torch.inference_mode():
        posterior = vae.encode(pixel_values_of(pictures)).latent_dist
        moments = posterior.sample(torch.Generator().manual_seed(0))
        decoded = vae.decode(moments).sample
    scale = vae.config.scaling_factor
    pixels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return moments * scale, posterior.std * scale, pixels.permute(0, 2, 3, 1).numpy()


def test_the_folder_is_small_and_complete():
    files = {str(p.relative_to(FOLDER)): p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()}
    assert sum(files.values()) <= MAX_BYTES
    assert set(files) >= {
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer_config.json",
        "unet/config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert not [name for name in files if name.startswith("unet/") and name != "unet/config.json"]
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl", ".partial"))]


def test_models_load_as_float32(vae, text_encoder):
    for model in (vae, text_encoder):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_parts_fit_each_other(vae, text_encoder, tokenizer):
    unet = json.loads((FOLDER / "unet/config.json").read_text())
    assert unet["cross_attention_dim"] == text_encoder.config.hidden_size
    assert unet["in_channels"] == unet["out_channels"] == vae.config.latent_channels == 4
    assert unet["sample_size"] * 8 == vae.config.sample_size == 64
    assert text_encoder.config.vocab_size == len(tokenizer) < 2**16
    assert text_encoder.config.max_position_embeddings == tokenizer.model_max_length == 77
    assert text_encoder.config.eos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert text_encoder.config.bos_token_id == tokenizer.bos_token_id


def test_the_stock_pipeline_samples(recwarn):
    from diffusers import (
        DPMSolverMultistepScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(FOLDER / "unet")
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER, unet=unet, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    images = pipeline(
        ["a large red circle on a yellow background"],
        num_inference_steps=3,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert images.shape == (1, 64, 64, 3)
    assert np.isfinite(images).all()
    assert not [w for w in recwarn if "steps_offset" in str(w.message)]


@pytest.mark.parametrize(("grammar", "least"), [("single", 0.99), ("pairs", 0.93)])
def test_unseen_scenes_survive_the_round_trip(vae, scenes, grammar, least):
    from examples.scene_reader import score

    captions, pictures = scenes[grammar]
    latents, _, decoded = round_trip(vae, pictures)
    assert latents.shape == (len(captions), 4, 8, 8)
    error = np.square(decoded.astype(float) - pictures).mean(axis=(1, 2, 3))
    psnr_db = float((10 * np.log10(255**2 / error)).mean())
    assert psnr_db >= {"single": 30, "pairs": 27}[grammar]
    assert score(captions, list(decoded)).all_right >= least


def test_latents_are_near_unit_scale_and_the_posterior_is_narrow(vae, scenes):
    for _, pictures in scenes.values():
        latents, posterior_std, _ = round_trip(vae, pictures)
        assert 0.9 < latents.std() < 1.1
        assert abs(latents.mean()) < 0.3
        assert posterior_std.max() < 0.5
        assert 0.001 < posterior_std.mean() < 0.2


@pytest.mark.parametrize("side", [64, 128])
def test_latents_of_richer_pictures_keep_their_scale(vae, side):
    rng = np.random.default_rng(21)
    pictures = np.stack([draw_picture(rng) for _ in range(32)])
    if side == 64:
        pictures = pictures.reshape(-1, 64, 2, 64, 2, 3).mean(axis=(2, 4)).astype(np.uint8)
    latents, _, decoded = round_trip(vae, pictures)
    assert latents.shape[-1] == side // 8
    assert 0.8 < latents.std() < 1.2
    error = np.square(decoded.astype(float) - pictures).mean()
    assert 10 * math.log10(255**2 / error) > 17


def test_extreme_pictures_give_finite_moments(vae):
    rng = np.random.default_rng(22)
    flat = [np.full((64, 64, 3), value, np.uint8) for value in (0, 128, 255)]
    checks = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    latents, posterior_std, _ = round_trip(vae, [*flat, checks, noise])
    assert latents.isfinite().all()
    assert posterior_std.isfinite().all()
    assert latents.abs().max() < 30


def test_every_word_of_the_grammar_is_one_token(tokenizer):
    ids = [tokenizer(word).input_ids for word in words()]
    assert {len(item) for item in ids} == {3}
    assert len({item[1] for item in ids}) == len(words())


LONG = "a very long caption " * 40


@pytest.mark.parametrize(
    "caption",
    [
        "",
        " ",
        "lion, alpha, animal, face, leo",
        "grinning face 😀, 👩‍👩‍👧‍👦, été, Ünïcode",
        "日本語のキャプション",
        "\x00\n\t\u202e",
        "<|endoftext|> inside",
        LONG,
        "x" * 5000,
    ],
)
def test_any_caption_becomes_77_ids_and_finite_states(tokenizer, text_encoder, caption):
    batch = tokenizer(caption, padding="max_length", truncation=True)
    assert len(batch.input_ids) == 77
    assert batch.input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id in batch.input_ids
    assert 0 <= min(batch.input_ids) <= max(batch.input_ids) < len(tokenizer)
    assert encode_captions(tokenizer, text_encoder, [caption]).isfinite().all()


def test_unknown_words_are_not_lost(tokenizer):
    for caption in ("zebra quokka", "日本語", "🦁 löwe"):
        ids = tokenizer(caption).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == caption
        assert ids.count(tokenizer.unk_token_id) == 1, "only the end token, which is also unk"


def test_different_captions_have_different_ids_and_states(tokenizer, text_encoder):
    captions = [
        "lion, alpha, animal, face, leo",
        "lion, alpha, animal, face, lea",
        "tiger, animal, face",
        "😀",
        "😁",
        "",
        "a large red circle on a yellow background",
        "a large red circle on a blue background",
    ]
    ids = {tuple(tokenizer(caption).input_ids) for caption in captions}
    assert len(ids) == len(captions)
    states = encode_captions(tokenizer, text_encoder, captions).flatten(1)
    distance = torch.cdist(states, states) + 1e9 * torch.eye(len(captions))
    assert distance.min() > 1.0


def test_order_and_binding_reach_the_states(tokenizer, text_encoder):
    """A bag of words would give these pairs the same summary, up to the order of words."""
    pairs = [
        (
            "a large red circle above a small blue square on a yellow background",
            "a large red circle below a small blue square on a yellow background",
        ),
        (
            "a large red circle above a small blue square on a yellow background",
            "a large blue circle above a small red square on a yellow background",
        ),
    ]
    for pair in pairs:
        states = encode_captions(tokenizer, text_encoder, list(pair))
        summary = states[:, 16]  # a padding token after the end: it has seen the whole caption
        summary = summary - encode_captions(tokenizer, text_encoder, [""])[:, 16]
        cosine = torch.nn.functional.cosine_similarity(summary[0], summary[1], dim=0)
        assert cosine < 0.95


def test_folding_the_scale_changes_no_reconstruction(vae, scenes):
    import copy

    from examples.train_vae import fold_scale

    pixel_values = pixel_values_of(scenes["single"][1][:16])
    folded = copy.deepcopy(vae)
    fold_scale(folded, [pixel_values])
    with torch.inference_mode():
        before, after = (model.encode(pixel_values).latent_dist for model in (vae, folded))
        decoded = [m.decode(p.mean).sample for m, p in ((vae, before), (folded, after))]
        latents = after.sample(torch.Generator().manual_seed(1)) * folded.config.scaling_factor
    assert torch.allclose(decoded[0], decoded[1], atol=1e-4)
    assert torch.allclose(latents.mean(dim=(0, 2, 3)), torch.zeros(4), atol=0.02)
    assert torch.allclose(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=0.02)


def test_hard_negatives_use_the_same_words_and_show_something_else():
    from examples.train_text import hard_negative

    rng = np.random.default_rng(23)
    scene = parse_caption("a large red circle above a small blue square on a yellow background")
    for kind in ("relation", "colours", "shapes", "sizes", "background"):
        other = hard_negative(scene, kind, rng)
        assert other is not None
        assert other.canonical() != scene.canonical()
        if kind != "relation":
            assert sorted(caption_of(other).split()) == sorted(caption_of(scene).split())
    single = parse_caption("a large red circle on a yellow background")
    assert hard_negative(single, "relation", rng) is None
    alike = parse_caption("a large red circle above a small red circle on a yellow background")
    assert hard_negative(alike, "colours", rng) is None
    assert hard_negative(alike, "sizes", rng) is not None


def test_the_written_tokenizer_is_the_committed_one(tmp_path, tokenizer):
    from examples.tokenizer_build import build_vocabulary

    vocabulary, _ = build_vocabulary()
    assert tokenizer.get_vocab() == vocabulary


def test_an_interrupted_vae_training_goes_on(tmp_path):
    from examples.train_vae import VaeTraining, train_vae

    small = {"num_pictures": 2, "scenes_per_step": 2, "pictures_per_step": 1}
    train_vae(VaeTraining(minutes=0.002, **small), tmp_path)
    first = torch.load(tmp_path / "vae.pt", weights_only=True)
    train_vae(VaeTraining(minutes=first["used_sec"] / 60 + 0.002, **small), tmp_path)
    second = torch.load(tmp_path / "vae.pt", weights_only=True)
    assert second["step"] > first["step"] >= 1
    assert second["used_sec"] > first["used_sec"]
    again = train_vae(VaeTraining(minutes=0.002, **small), tmp_path)
    for name, value in again.state_dict().items():
        assert torch.equal(value, second["average"][name])


def test_replacing_the_folder_leaves_nothing_of_the_old_one(tmp_path):
    from examples.tiny_model import replace_folder

    fresh, out = tmp_path / "fresh", tmp_path / "models" / "tiny"
    for name in ("old", "new"):
        fresh.mkdir(exist_ok=True)
        for path in fresh.iterdir():
            path.unlink()
        (fresh / name).write_text(name)
        replace_folder(fresh, out)
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]


def test_help_needs_no_heavy_library():
    code = (
        "import sys, examples.tiny_model as s\n"
        "try: s.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=20)
