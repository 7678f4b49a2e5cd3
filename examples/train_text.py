"""Trains the tiny text encoder: a `CLIPTextModel` that knows what stands where in a scene.

Two losses, over captions of the train split only:

- contrast: a caption's summary must match its picture, seen by a small conv net, better than the
  other captions of the batch and than three *hard negatives* of its own: the same words with
  the relation turned, the colours, shapes or sizes exchanged, or one attribute changed. Without
  them the encoder becomes a bag of words. The summary is read at the end token or at one of the
  padding tokens after it, since the U-Net attends to those too.
- naming: the state at every token must name that token and the three before it, so that "circle"
  knows that it is red and large. Made-up captions join in here, which keeps the states of words
  outside the grammar apart.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from examples.grammar import (
    COLOURS,
    OPPOSITES,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    Split,
    caption_of,
    sample_scene,
    split_of,
)
from examples.render import draw, place
from examples.tokenizer_build import caption_words
from examples.train_vae import learning_rate, save_checkpoint, to_pixel_values

logger = logging.getLogger(__name__)

NUM_NEGATIVES = 3
SEQUENCE_LENGTH = 18  # the longest caption of the grammar has 16 tokens, both ends included
NAMED_TOKENS = 4
PICTURE_SIDE = 32
NEGATIVE_KINDS = ("relation", "colours", "shapes", "sizes", "background", "one attribute")


@dataclass(frozen=True, kw_only=True)
class TextTraining:
    """How the text encoder is trained."""

    minutes: float = 22.5
    batch_size: int = 96
    num_made_up: int = 20
    lr: float = 1.5e-3
    warmup_steps: int = 50
    naming_weight: float = 0.3
    checkpoint_every_sec: float = 60.0
    seed: int = 0


class PictureTower(nn.Module):
    """A small conv net that sums up a 32-pixel picture; used in training only."""

    def __init__(self, width: int) -> None:
        """Build the layers."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1),
            nn.GroupNorm(8, 48),
            nn.GELU(),
            nn.Conv2d(48, 96, 3, stride=2, padding=1),
            nn.GroupNorm(8, 96),
            nn.GELU(),
            nn.Conv2d(96, 64, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(64 * 8 * 8, 256),
            nn.GELU(),
            nn.Linear(256, width),
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return one summary per picture."""
        return self.layers(pixel_values)


class Towers(nn.Module):
    """The text encoder with what its training needs around it."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        """Build the picture tower and the heads for this encoder."""
        super().__init__()
        width, vocab_size = text_encoder.config.hidden_size, text_encoder.config.vocab_size
        self.text_encoder = text_encoder
        self.picture_tower = PictureTower(width)
        self.project = nn.Linear(width, width)
        self.name = nn.Linear(width, NAMED_TOKENS * vocab_size)
        self.log_temperature = nn.Parameter(torch.tensor(2.5))

    def embed_states(self, states: Tensor) -> Tensor:
        """Project summaries onto the unit sphere."""
        return F.normalize(self.project(states), dim=-1)

    def embed_pictures(self, pixel_values: Tensor) -> Tensor:
        """Sum pictures up on the unit sphere."""
        return F.normalize(self.picture_tower(pixel_values), dim=-1)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the untrained encoder that fits the tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def hard_negative(scene: Scene, kind: str, rng: np.random.Generator) -> Scene | None:
    """Return a scene of almost the same words that shows something else, or None."""
    first, second = scene.objects[0], scene.objects[-1]
    try:
        if kind == "one attribute":
            changed = _change_object(scene, rng)
        elif kind == "background":
            turned = replace(first, colour=scene.background)
            objects = (turned, *scene.objects[1:])
            changed = replace(scene, objects=objects, background=first.colour)
        elif scene.relation is None:
            return None
        elif kind == "relation":
            changed = replace(scene, relation=OPPOSITES[scene.relation])
        else:
            name = {"colours": "colour", "shapes": "shape", "sizes": "size"}[kind]
            exchanged = (
                replace(first, **{name: getattr(second, name)}),
                replace(second, **{name: getattr(first, name)}),
            )
            changed = replace(scene, objects=exchanged)
    except ValueError:  # outside the grammar: an object on its own colour, or two alike
        return None
    return None if changed.canonical() == scene.canonical() else changed


def _change_object(scene: Scene, rng: np.random.Generator) -> Scene:
    position = int(rng.integers(len(scene.objects)))
    name, values = (("size", SIZES), ("colour", tuple(COLOURS)), ("shape", SHAPES))[rng.integers(3)]
    item: SceneObject = scene.objects[position]
    others = [value for value in values if value != getattr(item, name)]
    objects = list(scene.objects)
    objects[position] = replace(item, **{name: others[rng.integers(len(others))]})
    return replace(scene, objects=tuple(objects))


def _negatives(scene: Scene, rng: np.random.Generator) -> list[Scene]:
    """Return `NUM_NEGATIVES` scenes of the train split, the hardest first."""
    found: list[Scene] = []
    for kind in (*rng.permutation(NEGATIVE_KINDS[:-1]), *["one attribute"] * 6):
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


def _made_up_caption(rng: np.random.Generator) -> str:
    """Return a meaningless caption: common words, stray letters, bytes of other scripts."""
    parts = []
    known = caption_words()
    for _ in range(rng.integers(1, 9)):
        if rng.random() < 0.6:
            parts.append(known[rng.integers(len(known))])
        else:
            high = 0x7F if rng.random() < 0.8 else 0x2FFF
            parts.append("".join(chr(c) for c in rng.integers(0x21, high, rng.integers(1, 6))))
    return ("" if rng.random() < 0.1 else " ").join(parts)


def train_text(options: TextTraining, tokenizer: CLIPTokenizer, work_dir: Path) -> Towers:
    """Train for the time given, or go on where an earlier run stopped."""
    torch.manual_seed(options.seed)
    towers = Towers(build_text_encoder(tokenizer))
    optimizer = torch.optim.AdamW(
        towers.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    path = work_dir / "text.pt"
    step, used_sec = 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        towers.load_state_dict(saved["towers"])
        optimizer.load_state_dict(saved["optimizer"])
        step, used_sec = saved["step"], saved["used_sec"]
        logger.info("text: going on from step %d, %.1f minutes used", step, used_sec / 60)
    started = last_saved = time.monotonic() - used_sec
    while used_sec < options.minutes * 60:
        used_frac = used_sec / (options.minutes * 60)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options.lr, options.warmup_steps, step, used_frac)
        parts = _train_step(towers, optimizer, tokenizer, options, step)
        step += 1
        used_sec = time.monotonic() - started
        if step % 50 == 0:
            text = " ".join(f"{name} {value:.3f}" for name, value in parts.items())
            logger.info("text: step %d, %.1f min, %s", step, used_sec / 60, text)
        done = used_sec >= options.minutes * 60
        if done or time.monotonic() - last_saved > options.checkpoint_every_sec:
            state = {
                "towers": towers.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "used_sec": used_sec,
            }
            save_checkpoint(state, path)
            last_saved = time.monotonic()
    return towers.eval()


def _train_step(
    towers: Towers,
    optimizer: torch.optim.Optimizer,
    tokenizer: CLIPTokenizer,
    options: TextTraining,
    step: int,
) -> dict[str, float]:
    rng = np.random.default_rng([options.seed, 4, step])
    scenes = [
        sample_scene("single" if rng.random() < 0.25 else "pairs", "train", rng)
        for _ in range(options.batch_size)
    ]
    others = [other for scene in scenes for other in _negatives(scene, rng)]
    made_up = [_made_up_caption(rng) for _ in range(options.num_made_up)]
    captions = [caption_of(scene) for scene in scenes + others] + made_up
    input_ids = _tokenize(tokenizer, captions, SEQUENCE_LENGTH)
    states = towers.text_encoder(input_ids=input_ids).last_hidden_state
    texts = towers.embed_states(_summaries(states, input_ids, tokenizer.eos_token_id, rng))
    pictures = towers.embed_pictures(_draw(scenes, rng))
    contrast, right = _contrast(texts, pictures, scenes, towers.log_temperature)
    kept = [*range(len(made_up)), *range(len(captions) - len(made_up), len(captions))]
    naming = _naming(towers.name(states[kept]), input_ids[kept])
    loss = contrast + options.naming_weight * naming
    loss.backward()
    norm = nn.utils.clip_grad_norm_(towers.parameters(), 1.0)
    if not torch.isfinite(norm):
        raise FloatingPointError(f"text: gradient is {norm.item()}; lower the learning rate")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"contrast": contrast.item(), "right": right, "naming": naming.item()}


def _tokenize(tokenizer: CLIPTokenizer, captions: list[str], length: int) -> Tensor:
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids


def _draw(scenes: list[Scene], rng: np.random.Generator) -> Tensor:
    return to_pixel_values([draw(scene, place(scene, rng), PICTURE_SIDE) for scene in scenes])


def _summaries(
    states: Tensor, input_ids: Tensor, end_id: int, rng: np.random.Generator | None
) -> Tensor:
    """Take the state at the end token, or with a generator at a random token from there on."""
    ends = (input_ids == end_id).int().argmax(dim=1)
    if rng is not None:
        reach = torch.from_numpy(rng.random(len(ends)) ** 3).float()
        ends = ends + (reach * (input_ids.shape[1] - ends)).long()
    return states[torch.arange(len(states)), ends]


def _contrast(
    texts: Tensor, pictures: Tensor, scenes: list[Scene], log_temperature: Tensor
) -> tuple[Tensor, float]:
    """Return the loss, and the share of pictures that prefer their caption to all others."""
    count = len(scenes)
    own, negatives = texts[:count], texts[count : count * (1 + NUM_NEGATIVES)]
    scale = log_temperature.exp().clamp(max=100.0)
    logits = scale * pictures @ own.T
    contents = [caption_of(scene.canonical()) for scene in scenes]
    same = torch.tensor([[a == b for b in contents] for a in contents])
    logits = logits.masked_fill(same & ~torch.eye(count, dtype=torch.bool), -1e4)
    hard = torch.einsum("id,ikd->ik", pictures, negatives.view(count, NUM_NEGATIVES, -1)) * scale
    targets = torch.arange(count)
    by_picture = torch.cat([logits, hard], dim=1)
    loss = 0.5 * (F.cross_entropy(by_picture, targets) + F.cross_entropy(logits.T, targets))
    return loss, (by_picture.argmax(dim=1) == targets).float().mean().item()


def _naming(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Return how badly each state names its own token and those before it."""
    logits = logits.view(*logits.shape[:2], NAMED_TOKENS, -1)
    losses = []
    for back in range(NAMED_TOKENS):
        named = input_ids[:, : input_ids.shape[1] - back]
        losses.append(F.cross_entropy(logits[:, back:, back].flatten(0, 1), named.flatten()))
    return torch.stack(losses).mean()


@torch.no_grad()
def measure_text(
    towers: Towers,
    tokenizer: CLIPTokenizer,
    *,
    split: Split = "held_out",
    num_scenes: int = 512,
    seed: int = 1,
) -> dict[str, Any]:
    """Measure retrieval on unseen combinations.

    Returns:
        `retrieval_top1`: share of pictures of two objects that prefer their own caption among
        all captions; `hard_negatives`: by kind, share that prefer it to that altered caption.
    """
    rng = np.random.default_rng([seed, 5])
    towers.eval()
    scenes: dict[str, Scene] = {}
    while len(scenes) < num_scenes:
        scene = sample_scene("pairs", split, rng)
        scenes.setdefault(caption_of(scene.canonical()), scene)
    chosen = list(scenes.values())
    pictures = towers.embed_pictures(_draw(chosen, rng))

    def embed(items: list[Scene]) -> Tensor:
        input_ids = _tokenize(tokenizer, [caption_of(item) for item in items], SEQUENCE_LENGTH)
        states = towers.text_encoder(input_ids=input_ids).last_hidden_state
        return towers.embed_states(_summaries(states, input_ids, tokenizer.eos_token_id, None))

    texts = embed(chosen)
    own = (pictures * texts).sum(dim=1)
    top1 = ((pictures @ texts.T).argmax(dim=1) == torch.arange(num_scenes)).float().mean()
    by_kind = {}
    for kind in NEGATIVE_KINDS:
        changed = [hard_negative(scene, kind, rng) for scene in chosen]
        kept = [i for i, other in enumerate(changed) if other is not None]
        others = embed([other for other in changed if other is not None])
        by_kind[kind] = (own[kept] > (pictures[kept] * others).sum(dim=1)).float().mean().item()
    return {"num_scenes": num_scenes, "retrieval_top1": top1.item(), "hard_negatives": by_kind}
