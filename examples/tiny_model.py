"""Makes the tiny diffusers model folder that the embedded default trains and samples with.

    python -m examples.tiny_model --out examples/tiny-model

Trains the VAE (`examples/train_vae.py`) and the text encoder (`examples/train_text.py`) from
scenes drawn on the spot, measures both on combinations held out, and writes a folder of
Stable Diffusion's layout: weights of the VAE and the text encoder in half precision, tokenizer,
scheduler, the U-Net's config (its weights are what the trainer is for) and a model card. Takes
three quarters of an hour on two CPU cores. Interrupt it at will: the same command goes on from
the last checkpoint in `--work-dir`, and the folder is replaced only when everything is done.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from examples.grammar import Grammar
    from examples.train_text import TextTraining
    from examples.train_vae import VaeTraining

UNET_CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 128,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}
# Real pictures are calmer than the drawn ones, and their latents a tenth smaller; so the drawn
# ones are set a little above 1, and both stay within a tenth of it.
TARGET_STD = 1.078
MODEL_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.35.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def make_tiny_model(
    out: Path,
    work_dir: Path,
    vae_training: VaeTraining,
    text_training: TextTraining,
) -> dict[str, Any]:
    """Train, measure and write the folder; return the measured figures."""
    from transformers import CLIPTokenizer

    from examples.tokenizer_build import save_tokenizer
    from examples.train_text import measure_text, train_text
    from examples.train_vae import steps_taken, train_vae

    folder = work_dir / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    save_tokenizer(folder / "tokenizer")
    # The two trainings need nothing of each other, and models this small do not keep many cores
    # busy, so they run side by side.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        text_done = pool.submit(_train_text_aside, text_training, folder / "tokenizer", work_dir)
        vae = train_vae(vae_training, work_dir)
        text_done.result()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    towers = train_text(text_training, tokenizer, work_dir)  # reads the finished checkpoint
    write_configs(folder)
    save_weights(folder, vae, towers.text_encoder)
    figures = {
        "vae": measure_vae(folder),
        "text": measure_text(towers, tokenizer),
        "minutes_vae": vae_training.minutes,
        "minutes_text": text_training.minutes,
        "steps_vae": steps_taken(work_dir / "vae.pt"),
        "steps_text": steps_taken(work_dir / "text.pt"),
        "size_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    }
    (folder / "README.md").write_text(model_card(figures), encoding="utf-8")
    replace_folder(folder, out)
    return figures


def set_up_torch(num_threads: int) -> None:
    """Prepare a process for training on CPU cores, and let it tell how it gets on."""
    import torch

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)  # denormals make convolutions on CPUs several times slower


def _train_text_aside(options: TextTraining, tokenizer_folder: Path, work_dir: Path) -> None:
    """Train the text encoder in a process of its own; what it learns is in its checkpoint."""
    from transformers import CLIPTokenizer

    from examples.train_text import train_text

    set_up_torch(num_threads=1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    train_text(options, CLIPTokenizer.from_pretrained(tokenizer_folder), work_dir)


def _end_with_parent() -> None:
    """Stop when the main process is killed: two trainings must not write one checkpoint."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def write_configs(folder: Path) -> None:
    """Write the parts that are not trained here: scheduler, U-Net config, index."""
    from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel

    DPMSolverMultistepScheduler(**SCHEDULER_CONFIG).save_pretrained(folder / "scheduler")
    UNet2DConditionModel(**UNET_CONFIG).save_config(folder / "unet")
    index = json.dumps(MODEL_INDEX, indent=2) + "\n"
    (folder / "model_index.json").write_text(index, encoding="utf-8")


def save_weights(folder: Path, vae: Any, text_encoder: Any) -> None:
    """Fold the latents' scale into the VAE and store both encoders in half precision."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    from examples.train_vae import VAE_CONFIG, fold_scale

    folded = AutoencoderKL(**VAE_CONFIG).eval()
    folded.load_state_dict(vae.state_dict())
    fold_scale(folded, calibration_pixels(), TARGET_STD)
    folded.half().save_pretrained(folder / "vae")
    half = CLIPTextModel(text_encoder.config)
    half.load_state_dict(text_encoder.state_dict())
    half.half().save_pretrained(folder / "text_encoder")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)
    # Loaders that follow the config's dtype must compute in float32 all the same.
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(torch.float32).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def calibration_pixels() -> list[Any]:
    """Draw what the latents' scale is set on: scenes, and richer pictures at two resolutions."""
    import numpy as np

    from examples.train_vae import iter_scenes, to_pixel_values

    rng = np.random.default_rng(7)
    stream = iter_scenes(rng)
    scenes = np.stack([next(stream) for _ in range(384)])
    large, small = drawn_pictures(rng, 192)
    return [to_pixel_values(batch) for batch in (scenes, scenes, small, large)]


def drawn_pictures(rng: Any, count: int) -> tuple[Any, Any]:
    """Draw richer pictures; return them at 128 and at 64 pixels, [B, H, W, 3] uint8."""
    import numpy as np

    from examples.pictures import draw_picture

    large = np.stack([draw_picture(rng) for _ in range(count)])
    small = large.reshape(-1, 64, 2, 64, 2, 3).mean(axis=(2, 4)).round().astype(np.uint8)
    return large, small


def measure_vae(folder: Path, num_scenes: int = 400) -> dict[str, Any]:
    """Measure a written folder's VAE on scenes of the held-out split, and on richer pictures."""
    import numpy as np
    from diffusers import AutoencoderKL

    from examples.grammar import caption_of, sample_scene
    from examples.render import render
    from examples.scene_reader import score

    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    figures: dict[str, Any] = {}
    grammars: dict[str, Grammar] = {"one object": "single", "two objects": "pairs"}
    for name, grammar in grammars.items():
        rng = np.random.default_rng([8, len(grammar)])
        scenes = [sample_scene(grammar, "held_out", rng) for _ in range(num_scenes)]
        pictures = np.stack([np.asarray(render(scene, rng)) for scene in scenes])
        figures[name], decoded = _round_trip(vae, pictures)
        accuracy = score([caption_of(scene) for scene in scenes], list(decoded))
        figures[name]["read_back_all_right"] = accuracy.all_right
    large, small = drawn_pictures(np.random.default_rng(9), 96)
    figures["richer pictures"], _ = _round_trip(vae, small)
    figures["richer pictures, 128 pixels"], _ = _round_trip(vae, large)
    return figures


def _round_trip(vae: Any, pictures: Any) -> tuple[dict[str, Any], Any]:
    """Encode, sample and decode [B, H, W, 3] uint8; return figures and the decoded pictures."""
    import numpy as np
    import torch

    from examples.train_vae import to_pictures, to_pixel_values

    with torch.inference_mode():
        posterior = vae.encode(to_pixel_values(pictures)).latent_dist
        moments = posterior.sample(torch.Generator().manual_seed(0))
        decoded = to_pictures(vae.decode(moments).sample)
    latents = moments * vae.config.scaling_factor
    error = np.square(decoded.astype(np.float64) - pictures).mean(axis=(1, 2, 3))
    figures = {
        "psnr_db": float((10 * np.log10(255**2 / error)).mean()),
        "latent_mean": latents.mean().item(),
        "latent_std": latents.std().item(),
        "posterior_std": posterior.std.mean().item() * vae.config.scaling_factor,
    }
    return figures, decoded


def model_card(figures: dict[str, Any]) -> str:
    """Write the model card from the measured figures."""
    rows = "\n".join(
        f"| {name} | {part['psnr_db']:.1f} dB | {_percent(part.get('read_back_all_right'))} "
        f"| {part['latent_mean']:+.3f} | {part['latent_std']:.3f} | {part['posterior_std']:.3f} |"
        for name, part in figures["vae"].items()
    )
    text = figures["text"]
    negatives = "\n".join(
        f"| {kind} | {frac:.1%} |" for kind, frac in text["hard_negatives"].items()
    )
    return f"""\
# tiny-model

A Stable Diffusion of {figures["size_bytes"] / 1e6:.1f} MB, for trying the system on a laptop: an
8x VAE with 4 latent channels, a CLIP text encoder (128 wide, 3 layers, 77 positions) with its
tokenizer, a DPM-Solver++ scheduler for v-prediction, and the config of a U-Net of 4 million
parameters. The U-Net has no weights: training it is what the system is for.

It knows the flat scenes of `examples/grammar.py` and nothing else of the world. Real pictures pass
through the VAE blurred; real captions get states of their own, without meaning.

Made from scenes and pictures drawn on the spot, with no outside data, by

    python -m examples.tiny_model --out examples/tiny-model \\
        --minutes-vae {figures["minutes_vae"]:g} --minutes-text {figures["minutes_text"]:g}

in which two busy cores took {figures["steps_vae"]} and {figures["steps_text"]} steps.

Weights are stored in float16 and load as float32. Sampled moments times `scaling_factor` have mean
0 and deviation {TARGET_STD} per channel over a mixture of scenes and richer drawn pictures, so that
calmer, real ones stay near 1 too. That is folded into the VAE's 1x1 convolutions: stock pipelines
need nothing special.

## Measured on held-out combinations

The VAE, at 64 pixels where nothing else is said, with the posterior sampled. Read back: the share
of reconstructions from which `examples/scene_reader.py` reads everything right.

| pictures | PSNR | read back | latent mean | latent deviation | posterior deviation |
|---|---|---|---|---|---|
{rows}

The text encoder: {text["retrieval_top1"]:.1%} of {text["num_scenes"]} pictures of two objects
prefer their own caption to all the others. Preferred to an altered caption:

| altered | right |
|---|---|
{negatives}

Licence: that of this repository.
"""


def _percent(frac: float | None) -> str:
    return "" if frac is None else f"{frac:.1%}"


def replace_folder(folder: Path, out: Path) -> None:
    """Put the finished folder in the place of the old one; a reader sees one or the other."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (out.with_name(f".{out.name}.{name}") for name in ("new", "old"))
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(folder, fresh)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """Make the folder the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.tiny_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("examples/tiny-model"))
    parser.add_argument("--minutes-vae", type=float, default=47.0, help="time to train the VAE")
    parser.add_argument(
        "--minutes-text", type=float, default=22.5, help="time for the text encoder"
    )
    parser.add_argument(
        "--work-dir", type=Path, default=Path("data/tiny-model"), help="where checkpoints are kept"
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="CPU threads for the VAE; the text takes one"
    )
    args = parser.parse_args(argv)

    from examples.train_text import TextTraining
    from examples.train_vae import VaeTraining

    set_up_torch(args.threads)
    figures = make_tiny_model(
        args.out,
        args.work_dir,
        VaeTraining(minutes=args.minutes_vae),
        TextTraining(minutes=args.minutes_text),
    )
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
