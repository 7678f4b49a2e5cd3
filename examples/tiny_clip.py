"""Makes the tiny CLIP model that the embedded default is measured with.

    python -m examples.tiny_clip --out examples/tiny-clip

Trains a transformers `CLIPModel` from scenes drawn on the spot: pictures of 64 pixels against their
captions, among them *hard negatives* (the same words with the relation turned, colours exchanged,
one attribute changed), without which the text tower becomes a bag of words. Pictures have theirs
too: spoilt ones (noise, blur, another picture shining through), without which the image tower would
overlook what makes a generated picture bad. Then measures it on combinations held out and writes a
folder that `CLIPModel` and `CLIPProcessor` load: weights in half precision, the tokenizer of the
tiny model, a model card. Ten to twenty minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from examples.grammar import Grammar, Scene, Split

logger = logging.getLogger(__name__)

TOKENIZER = Path(__file__).parent / "tiny-model" / "tokenizer"
SIDE = 64
NUM_NEGATIVES = 2
MAX_LOGIT_SCALE = 100.0  # as CLIP clips it (arXiv:2103.00020, section 2.5)
TEXT_CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION_CONFIG = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 8,
}


@dataclass(frozen=True, kw_only=True)
class ClipTraining:
    """How it is trained; the weights follow from this and the machine's arithmetic."""

    steps: int = 900
    batch_size: int = 96
    num_spoilt: int = 24
    lr: float = 1.5e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    seed: int = 0


def build_clip(tokenizer: Any) -> Any:
    """Build the untrained `CLIPModel` that fits the tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        **TEXT_CONFIG,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=VISION_CONFIG, projection_dim=64))


def train_clip(options: ClipTraining, tokenizer: Any) -> Any:
    """Train on scenes of the train split."""
    import torch

    from examples.train_vae import learning_rate

    torch.manual_seed(options.seed)
    model = build_clip(tokenizer).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=options.weight_decay, fused=True
    )
    started = time.monotonic()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            used_frac = step / options.steps
            group["lr"] = learning_rate(options.lr, options.warmup_steps, step, used_frac)
        rng = np.random.default_rng([options.seed, 11, step])
        batch = _draw_batch(options.batch_size, rng)
        loss, right = _contrast(model, tokenizer, batch, options.num_spoilt, rng)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"gradient is {norm.item()}; lower the learning rate")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            minutes = (time.monotonic() - started) / 60
            logger.info(
                "step %d, %.1f min, loss %.3f, right %.3f", step + 1, minutes, loss.item(), right
            )
    return model.eval()


def _draw_batch(count: int, rng: np.random.Generator) -> list[tuple[Scene, list[Scene]]]:
    """Scenes of one object and of two, each with scenes of nearly the same words."""
    from examples.grammar import sample_scene

    scenes = [sample_scene("mixed", "train", rng) for _ in range(count)]
    return [(scene, _negatives(scene, rng)) for scene in scenes]


def _negatives(scene: Scene, rng: np.random.Generator) -> list[Scene]:
    """`NUM_NEGATIVES` scenes of the train split that show something else."""
    from examples.grammar import sample_scene, split_of
    from examples.train_text import NEGATIVE_KINDS, hard_negative

    found: list[Scene] = []
    for kind in (*rng.permutation(NEGATIVE_KINDS), *["one attribute"] * 6):
        changed = hard_negative(scene, kind, rng)
        if changed is not None and changed not in found and split_of(changed) == "train":
            found.append(changed)
        if len(found) == NUM_NEGATIVES:
            return found
    while len(found) < NUM_NEGATIVES:
        changed = sample_scene("mixed", "train", rng)
        if changed.canonical() != scene.canonical():
            found.append(changed)
    return found


def _contrast(
    model: Any,
    tokenizer: Any,
    batch: list[tuple[Scene, list[Scene]]],
    num_spoilt: int,
    rng: np.random.Generator,
) -> tuple[Tensor, float]:
    """Return the loss, and the share of pictures that prefer their caption to all others.

    Cross-entropy of pictures over captions and of captions over pictures (arXiv:2103.00020, figure
    3). The hard negatives of a picture join its row alone; spoilt pictures join all captions' rows.
    """
    import torch
    import torch.nn.functional as F

    from examples.grammar import caption_of

    scenes, count = [scene for scene, _ in batch], len(batch)
    others = [other for _, negatives in batch for other in negatives]
    drawn = draw_scenes(scenes, rng)
    pictures = embed_pictures(model, torch.cat([drawn, spoil(drawn[:num_spoilt], rng)]))
    texts = embed_captions(model, tokenizer, [caption_of(item) for item in scenes + others])
    scale = model.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
    contents = [caption_of(scene.canonical()) for scene in scenes]
    same = torch.tensor([[a == b for b in contents] for a in contents]).fill_diagonal_(False)
    logits = (scale * pictures[:count] @ texts[:count].T).masked_fill(same, -1e4)
    negatives = texts[count:].view(count, NUM_NEGATIVES, -1)
    hard = scale * torch.einsum("id,ikd->ik", pictures[:count], negatives)
    spoilt = scale * texts[:count] @ pictures[count:].T
    targets = torch.arange(count)
    by_picture = torch.cat([logits, hard], dim=1)
    by_caption = torch.cat([logits.T, spoilt], dim=1)
    loss = 0.5 * (F.cross_entropy(by_picture, targets) + F.cross_entropy(by_caption, targets))
    return loss, (by_picture.argmax(dim=1) == targets).float().mean().item()


def spoil(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1], each with noise, blurred, or with another one in it."""
    import torch
    import torch.nn.functional as F

    spoilt = pictures.clone()
    for index, picture in enumerate(pictures):
        kind, strength = rng.integers(3), rng.uniform(0.1, 0.5)
        if kind == 0:
            noise = rng.standard_normal(tuple(picture.shape), dtype=np.float32)
            spoilt[index] += torch.from_numpy(noise) * strength
        elif kind == 1:
            coarse = F.avg_pool2d(picture[None], int(rng.choice([4, 8])))
            spoilt[index] = F.interpolate(coarse, size=picture.shape[1:], mode="bilinear")[0]
        else:
            spoilt[index].lerp_(pictures[index - 1], strength)
    return spoilt.clamp(-1, 1)


def draw_scenes(scenes: list[Scene], rng: np.random.Generator) -> Tensor:
    """Pictures of scenes, [B, 3, SIDE, SIDE] in [-1, 1]."""
    from examples.render import draw, place
    from examples.train_vae import to_pixel_values

    return to_pixel_values([draw(scene, place(scene, rng), SIDE) for scene in scenes])


def embed_pictures(model: Any, pixel_values: Tensor) -> Tensor:
    """Sum pictures up on the unit sphere: [B, D]."""
    import torch.nn.functional as F

    return F.normalize(model.get_image_features(pixel_values).pooler_output, dim=-1)


def embed_captions(model: Any, tokenizer: Any, captions: list[str]) -> Tensor:
    """Sum captions up on the unit sphere: [B, D]."""
    import torch.nn.functional as F

    tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
    return F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)


# Measuring, writing -------------------------------------------------------------------------------


def measure_clip(
    model: Any,
    tokenizer: Any,
    grammar: Grammar,
    *,
    split: Split = "held_out",
    num_scenes: int = 512,
) -> dict[str, Any]:
    """Measure how well it tells right captions from wrong ones.

    Args:
        model: `CLIPModel`.
        tokenizer: its own.
        grammar: of the scenes.
        split: the combinations drawn from.
        num_scenes: pictures; few captions of one object are held out, so they come again.

    Returns:
        `retrieval_top1`: share of pictures that prefer their own caption to those of all others;
        `num_captions` of these; `hard_negatives`: by kind, the share that prefer their own to that
        altered caption; `spoilt`: the share of captions that prefer the picture to a spoilt one.
    """
    import torch

    from examples.grammar import caption_of, sample_scene
    from examples.train_text import NEGATIVE_KINDS, hard_negative

    rng = np.random.default_rng([1, 12])
    scenes = [sample_scene(grammar, split, rng).canonical() for _ in range(num_scenes)]
    captions = list(dict.fromkeys(map(caption_of, scenes)))
    own = torch.tensor([captions.index(caption_of(scene)) for scene in scenes])
    by_kind = {}
    with torch.inference_mode():
        drawn = draw_scenes(scenes, rng)
        pictures = embed_pictures(model, drawn)
        scores = pictures @ embed_captions(model, tokenizer, captions).T
        own_score = scores[torch.arange(num_scenes), own]
        for kind in NEGATIVE_KINDS:
            changed = [hard_negative(scene, kind, rng) for scene in scenes]
            kept = [i for i, other in enumerate(changed) if other is not None]
            if kept:
                texts = [caption_of(other) for other in changed if other is not None]
                others = embed_captions(model, tokenizer, texts)
                is_right = own_score[kept] > (pictures[kept] * others).sum(dim=1)
                by_kind[kind] = is_right.float().mean().item()
        spoilt = embed_pictures(model, spoil(drawn, rng))
        own_texts = embed_captions(model, tokenizer, captions)[own]
        is_better = own_score > (spoilt * own_texts).sum(dim=1)
    return {
        "num_scenes": num_scenes,
        "num_captions": len(captions),
        "retrieval_top1": (scores.argmax(dim=1) == own).float().mean().item(),
        "hard_negatives": by_kind,
        "spoilt": is_better.float().mean().item(),
    }


def make_tiny_clip(out: Path, options: ClipTraining) -> dict[str, Any]:
    """Train, write the folder, measure what was written; return the figures."""
    from transformers import CLIPModel, CLIPTokenizer

    from examples.tiny_model import replace_folder

    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    started = time.monotonic()
    model = train_clip(options, tokenizer)
    minutes = (time.monotonic() - started) / 60
    folder = out.with_name(f".{out.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    save_clip(folder, model, tokenizer)
    written = CLIPModel.from_pretrained(folder).eval()
    grammars: tuple[Grammar, ...] = ("single", "pairs")
    figures: dict[str, Any] = {name: measure_clip(written, tokenizer, name) for name in grammars}
    figures["minutes"] = minutes
    figures["weights_bytes"] = (folder / "model.safetensors").stat().st_size
    (folder / "README.md").write_text(model_card(figures, options), encoding="utf-8")
    replace_folder(folder, out)
    shutil.rmtree(folder)
    return figures


def save_clip(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write what `CLIPModel` and `CLIPProcessor` load: half precision that computes in float32."""
    from transformers import CLIPImageProcessorPil, CLIPProcessor

    # PIL's resizing, whether torchvision is there or not: the figures must not depend on it.
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for noise in ("is_local", "local_files_only"):  # how this very object was loaded
        config.pop(noise, None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def model_card(figures: dict[str, Any], options: ClipTraining) -> str:
    """Write the model card from the measured figures."""
    single, pairs = figures["single"], figures["pairs"]
    kinds = pairs["hard_negatives"]
    rows = "\n".join(
        f"| {kind} | {_percent(single['hard_negatives'].get(kind))} | {right:.1%} |"
        for kind, right in kinds.items()
    )
    return f"""\
# tiny-clip

A CLIP of {figures["weights_bytes"] / 1e6:.1f} MB that knows the flat scenes of
`examples/grammar.py` and nothing else of the world. It measures the embedded default: CLIP scores,
and the features of FID and KID, without any download. Its figures can be compared among runs on
such scenes, and with nothing published.

Made from scenes drawn on the spot, of combinations of the train split, with no outside data, by

    python -m examples.tiny_clip --out examples/tiny-clip --steps {options.steps}

which took {figures["minutes"]:.0f} minutes on a CPU. Seeds are fixed: the same machine makes the
same weights, another one similar weights.

Image tower: ViT of {VISION_CONFIG["num_hidden_layers"]} layers, {VISION_CONFIG["hidden_size"]}
wide, patches of {VISION_CONFIG["patch_size"]} of {SIDE} pixels. Text tower:
{TEXT_CONFIG["num_hidden_layers"]} layers, {TEXT_CONFIG["hidden_size"]} wide, 77 positions, the
tokenizer of `examples/tiny-model`. Both project to 64 dimensions. Weights are stored in float16 and
load as float32.

## Measured on held-out combinations

Share of {single["num_scenes"]} pictures that prefer their own caption to all the others:

- one object: {single["retrieval_top1"]:.1%}, of {single["num_captions"]} captions
- two objects: {pairs["retrieval_top1"]:.1%}, of {pairs["num_captions"]} captions

Preferred to an altered caption, where a half is chance:

| altered | one object | two objects |
|---|---|---|
{rows}

Of captions, {single["spoilt"]:.1%} (one object) and {pairs["spoilt"]:.1%} (two) prefer their
picture to the same one with noise, blur or another picture in it.

Licence: that of this repository.
"""


def _percent(frac: float | None) -> str:
    return "" if frac is None else f"{frac:.1%}"


def main(argv: list[str] | None = None) -> int:
    """Make the folder the command line asks for."""
    default = ClipTraining()
    parser = argparse.ArgumentParser(
        prog="python -m examples.tiny_clip",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("examples/tiny-clip"))
    parser.add_argument("--steps", type=int, default=default.steps, help="of training")
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.batch_size < 2:
        parser.error("--steps must be at least 1, --batch-size at least 2")

    from examples.tiny_model import set_up_torch

    set_up_torch(args.threads)
    options = ClipTraining(steps=args.steps, batch_size=args.batch_size, seed=args.seed)
    print(json.dumps(make_tiny_clip(args.out, options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
