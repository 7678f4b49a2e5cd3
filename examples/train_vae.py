"""Trains the tiny VAE: an `AutoencoderKL` that turns [3, 64, 64] into [4, 8, 8].

The loss is reconstruction, a little KL, and a pull of the latents' scale towards 1 on three
streams at once: scenes at 64 pixels, and richer pictures (`examples/pictures.py`) at 64 and at 128.
Without the pull, latents of pictures unlike the scenes come out a third too small or too large.

Only scenes of the train split are drawn. The learning rate follows the share of the time budget
that is used up, so a slower machine takes fewer steps of the same schedule; an interrupted run
goes on from its last checkpoint.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from examples.grammar import Split, sample_scene
from examples.pictures import draw_picture
from examples.render import draw, place

logger = logging.getLogger(__name__)

VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (16, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 64,
    "scaling_factor": 0.18215,
}


@dataclass(frozen=True, kw_only=True)
class VaeTraining:
    """How the VAE is trained."""

    minutes: float = 47.0
    scenes_per_step: int = 16
    pictures_per_step: int = 4
    large_pictures_every: int = 6
    """Steps between batches at 128 pixels, which cost four times as much."""
    num_pictures: int = 1500
    lr: float = 1.5e-3
    warmup_steps: int = 100
    l1_weight: float = 0.3
    kl_weight: float = 1e-4
    scale_weight: float = 0.05
    checkpoint_every_sec: float = 90.0
    seed: int = 0


def train_vae(options: VaeTraining, work_dir: Path) -> AutoencoderKL:
    """Train for the time given, or go on where an earlier run stopped; return the averaged VAE."""
    torch.manual_seed(options.seed)
    vae = AutoencoderKL(**VAE_CONFIG).to(memory_format=torch.channels_last)
    average = AutoencoderKL(**VAE_CONFIG).requires_grad_(False).eval()
    average.load_state_dict(vae.state_dict())
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-4, fused=True
    )
    path = work_dir / "vae.pt"
    step, used_sec = 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        vae.load_state_dict(saved["vae"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        step, used_sec = saved["step"], saved["used_sec"]
        logger.info("vae: going on from step %d, %.1f minutes used", step, used_sec / 60)
    if used_sec >= options.minutes * 60:
        return average
    streams = _Streams(options, first_step=step)
    scale = _ScalePull()
    started = last_saved = time.monotonic() - used_sec
    while used_sec < options.minutes * 60:
        used_frac = used_sec / (options.minutes * 60)
        lr = learning_rate(options.lr, options.warmup_steps, step, used_frac)
        for group in optimizer.param_groups:
            group["lr"] = lr
        parts = _train_step(vae, optimizer, streams.batches(step), scale, options)
        step += 1
        _update_average(average, vae, min(0.998, (1 + step) / (10 + step)))
        used_sec = time.monotonic() - started
        if step % 50 == 0:
            text = " ".join(f"{name} {value:.4f}" for name, value in parts.items())
            logger.info("vae: step %d, %.1f min, lr %.1e, %s", step, used_sec / 60, lr, text)
        done = used_sec >= options.minutes * 60
        if done or time.monotonic() - last_saved > options.checkpoint_every_sec:
            state = {
                "vae": vae.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "used_sec": used_sec,
            }
            save_checkpoint(state, path)
            last_saved = time.monotonic()
    return average


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.rename(path)


def steps_taken(path: Path) -> int:
    """Return the number of steps that a checkpoint has behind it."""
    return int(torch.load(path, weights_only=True)["step"])


def learning_rate(peak: float, warmup_steps: int, step: int, used_frac: float) -> float:
    """Warm up by steps, then fall to 2% of the peak along a cosine of the time used."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, used_frac)))
    return peak * min(1.0, (step + 1) / warmup_steps) * cosine


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


def _train_step(
    vae: AutoencoderKL,
    optimizer: torch.optim.Optimizer,
    batches: list[tuple[Tensor, dict[str, int]]],
    scale: _ScalePull,
    options: VaeTraining,
) -> dict[str, float]:
    parts: dict[str, float] = {}
    for pixel_values, group_sizes in batches:
        pixel_values = pixel_values.to(memory_format=torch.channels_last)
        posterior = vae.encode(pixel_values).latent_dist
        latents = posterior.sample()
        decoded = vae.decode(latents).sample
        mse = (decoded - pixel_values).square().mean()
        l1 = (decoded - pixel_values).abs().mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        pull = torch.stack(
            [
                scale.loss(name, group)
                for name, group in zip(
                    group_sizes, latents.split([*group_sizes.values()]), strict=True
                )
            ]
        ).mean()
        loss = mse + options.l1_weight * l1
        loss = loss + options.kl_weight * kl + options.scale_weight * pull
        (loss / len(batches)).backward()
        side = pixel_values.shape[-1]
        parts |= {
            f"mse{side}": mse.item(),
            f"std{side}": posterior.std.mean().item(),
        }
    norm = nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    if not torch.isfinite(norm):
        raise FloatingPointError(f"vae: gradient is {float(norm)}; lower the learning rate")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return parts | {f"scale-{name}": value for name, value in scale.figures().items()}


class _ScalePull:
    """Pulls each stream's latents towards mean 0 and deviation 1, over many batches.

    A single batch of a few pictures is rightly far from both, so what is corrected is the running
    mean and mean square: their error, times the gradient of the batch's own.
    """

    def __init__(self, keep: float = 0.97) -> None:
        self.keep = keep
        self.means: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}

    def loss(self, stream: str, latents: Tensor) -> Tensor:
        """Return a term whose gradient moves the running figures towards 0 and 1."""
        mean, square = latents.mean(dim=(0, 2, 3)), latents.square().mean()
        for kept, new in ((self.means, mean.detach()), (self.squares, square.detach())):
            kept[stream] = torch.lerp(new, kept[stream], self.keep) if stream in kept else new
        return (self.squares[stream] - 1) * square + (self.means[stream] * mean).mean()

    def figures(self) -> dict[str, float]:
        """Return the running root mean square by stream."""
        return {name: square.sqrt().item() for name, square in self.squares.items()}


class _Streams:
    """Draws the batches of a step; the same seed and step give the same pictures."""

    def __init__(self, options: VaeTraining, first_step: int) -> None:
        self.options = options
        rng = np.random.default_rng([options.seed, 1])
        self.pool = np.stack([draw_picture(rng) for _ in range(options.num_pictures)])
        self.scenes = iter_scenes(np.random.default_rng([options.seed, 2, first_step]))

    def batches(self, step: int) -> list[tuple[Tensor, dict[str, int]]]:
        """Return (pixel_values, sizes of the streams within them), one batch per resolution."""
        options = self.options
        rng = np.random.default_rng([self.options.seed, 3, step])
        scenes = [next(self.scenes) for _ in range(options.scenes_per_step)]
        pictures = [_small(self._picture(rng), rng) for _ in range(options.pictures_per_step)]
        sizes = {"scenes": len(scenes), "pictures": len(pictures)}
        batches = [(to_pixel_values(scenes + pictures), sizes)]
        if step % options.large_pictures_every == 0:
            large = [self._picture(rng) for _ in range((options.pictures_per_step + 1) // 2)]
            batches.append((to_pixel_values(large), {"large pictures": len(large)}))
        return batches

    def _picture(self, rng: np.random.Generator) -> np.ndarray:
        """Take a picture of the pool, at random mirrored and with its colour channels shuffled."""
        picture = self.pool[rng.integers(len(self.pool))]
        channels = rng.permutation(3) if rng.random() < 0.4 else slice(None)
        return picture[:, :: rng.choice([-1, 1]), channels]


def _small(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bring a picture to 64 pixels: shrunk, or cut out."""
    if rng.random() < 0.7:
        halved = picture.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        return np.rint(halved).astype(np.uint8)
    y, x = rng.integers(0, 65, size=2)
    return picture[y : y + 64, x : x + 64]


def iter_scenes(
    rng: np.random.Generator, split: Split = "train", resolution: int = 64
) -> Iterator[np.ndarray]:
    """Yield scenes of both grammars without end: [H, W, 3] uint8."""
    while True:
        scene = sample_scene("mixed", split, rng)
        yield draw(scene, place(scene, rng), resolution)


def to_pixel_values(pictures: list[np.ndarray] | np.ndarray) -> Tensor:
    """Turn [B, H, W, 3] uint8 into [B, 3, H, W] float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.stack(list(pictures)))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(pixel_values: Tensor) -> np.ndarray:
    """Turn [B, 3, H, W] in [-1, 1] into [B, H, W, 3] uint8."""
    pixels = ((pixel_values.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def fold_scale(vae: AutoencoderKL, pixel_values: list[Tensor], target_std: float = 1.0) -> None:
    """Fold per-channel centring and scaling into the VAE's two 1x1 convolutions, in place.

    Afterwards `sampled * scaling_factor` has mean 0 and the target deviation per channel over the
    given pictures, each entry of the list weighing the same; reconstructions are unchanged.
    """
    moments = []
    for batch in pixel_values:
        latents = vae.encode(batch).latent_dist.sample(torch.Generator().manual_seed(0))
        moments.append((latents.mean(dim=(0, 2, 3)), latents.square().mean(dim=(0, 2, 3))))
    mean, square = (torch.stack(part).mean(dim=0) for part in zip(*moments, strict=True))
    std = (square - mean.square()).sqrt()
    gain = target_std / (std * vae.config.scaling_factor)
    num_channels = len(gain)
    quant, post_quant = vae.quant_conv, vae.post_quant_conv
    quant.weight[:num_channels] *= gain[:, None, None, None]
    quant.bias[:num_channels] = (quant.bias[:num_channels] - mean) * gain
    quant.bias[num_channels:] += 2 * gain.log()
    post_quant.bias += (post_quant.weight[..., 0, 0] * mean).sum(dim=1)
    post_quant.weight /= gain[None, :, None, None]
