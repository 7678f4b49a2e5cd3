"""What a training run is: one typed configuration, and the presets that fill it. No torch here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from shards.errors import UserError

_COUNTS = (
    *("resolution", "max_steps", "global_batch_size", "shuffle_window"),
    *("log_every", "checkpoint_every", "keep_checkpoints"),
)
_NOT_NEGATIVE = (
    *("micro_batch_size", "seed", "num_partitions", "min_snr_gamma", "learning_rate"),
    *(
        "cache_gib",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "ema_start_step",
        "num_samples",
    ),
)
_FRACTIONS = ("caption_drop_prob", "final_lr_frac", "ema_decay")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that a run depends on; the command line has a flag for each field."""

    unet: str = "tiny"
    """U-Net configuration: a name in train/unets, or a path to a diffusers config.json."""
    resolution: int = 64
    """Side of the images in pixels; chooses the dataset's image column."""

    data: str = "data/latents"
    """Latent dataset: a folder, or a URL such as s3://bucket/latents."""
    output_dir: str = "runs/latest"
    """Folder of the run: checkpoints, metrics.jsonl, the exported U-Net, sample images."""
    image_column: str = ""
    """Id of the image column, where there are several of this resolution."""
    text_column: str = ""
    """Id of the text column, where there are several."""
    text: Literal["auto", "states", "ids"] = "auto"
    """Read stored states, or stored token ids and run the text encoder; auto: states if stored."""
    cache_dir: str = ""
    """Local cache for the shards of a remote dataset; default: ~/.cache/latentmill/shards."""
    cache_gib: float = 100.0
    """Bound of that cache, for all processes on the machine."""

    max_steps: int = 1000
    """Optimizer updates in the whole run."""
    global_batch_size: int = 32
    """Samples per update, over all processes."""
    micro_batch_size: int = 0
    """Samples per forward pass and process; 0 takes a process's whole share at once."""
    seed: int = 0
    """Of the weights, the order of samples, and every random draw."""
    num_partitions: int = 0
    """Canonical partitions of the order (shards/order.py); 0 derives them from the batch."""
    shuffle_window: int = 16_384
    """Samples that are shuffled together within a partition."""

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """What the U-Net predicts."""
    min_snr_gamma: float = 0.0
    """Clip the loss weight at this signal-to-noise ratio (arXiv:2303.09556); 0 weighs all alike."""
    caption_drop_prob: float = 0.1
    """Share of captions replaced by the empty one, drawn anew every step (train/draws.py)."""

    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    final_lr_frac: float = 0.0
    """Where the cosine ends, as a share of the peak."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm to clip at; 0 never clips."""
    ema_decay: float = 0.0
    """Decay of the weights' moving average; 0 keeps none."""
    ema_start_step: int = 0
    """Updates after which the average starts, as a copy of the weights; no memory before."""

    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Autocast; auto is bf16 on a GPU that has it, else no."""
    attention: Literal["auto", "xformers", "sdpa"] = "auto"
    """auto is xFormers where it runs, else torch's own; the log says which."""

    log_every: int = 50
    """Steps between two log lines; the host waits for the device only here."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Older checkpoints are removed."""
    num_samples: int = 16
    """Images in the sample grid at the end; 0 makes none."""
    model: str = ""
    """Model folder that decodes the samples; default: the one that the dataset was encoded with."""

    def __post_init__(self) -> None:
        for names, allowed, wanted in (
            (_COUNTS, lambda value: value >= 1, "at least 1"),
            (_NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "finite and at least 0"),
            (_FRACTIONS, lambda value: 0 <= value <= 1, "between 0 and 1"),
        ):
            for name in names:
                if not allowed(getattr(self, name)):
                    raise ValueError(f"--{name.replace('_', '-')} must be {wanted}")
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError("--adam-betas must be at least 0 and below 1")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of the update that is numbered `step`, from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.lr_schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.learning_rate * (self.final_lr_frac + (1 - self.final_lr_frac) * cosine)

    def defining_fields(self) -> dict[str, Any]:
        """The part of the configuration that a resumed run must share with its beginning."""
        free = {
            *("data", "output_dir", "image_column", "text_column", "micro_batch_size"),
            *("attention", "log_every", "checkpoint_every", "keep_checkpoints"),
            *("num_samples", "model", "text", "cache_dir", "cache_gib"),
        }
        if self.lr_schedule == "constant":
            free.add("max_steps")
        fields = {name: value for name, value in asdict(self).items() if name not in free}
        return {**fields, "adam_betas": list(self.adam_betas)}


# The published SD2-base recipe (mosaicml/diffusion, SD-2-base-256.yaml and -512.yaml): AdamW 1e-4,
# weight decay 0.01, batch 2048, 10,000 steps of warm-up, then constant; 550,000 steps at 256, then
# 850,000 at 512 with an EMA over the last 50,000. Ours clips gradients as well: without it users of
# that recipe have reported NaN after some thousand steps.
_SD2_BASE_256 = TrainConfig(
    unet="sd2-base",
    resolution=256,
    max_steps=550_000,
    global_batch_size=2048,
    micro_batch_size=16,
    warmup_steps=10_000,
    output_dir="runs/sd2-base-256",
    checkpoint_every=10_000,
)
PRESETS: dict[str, TrainConfig] = {
    "tiny": TrainConfig(
        max_steps=3000,
        prediction_type="v_prediction",
        min_snr_gamma=5.0,
        learning_rate=1e-3,
        lr_schedule="cosine",
        warmup_steps=50,
        final_lr_frac=0.03,
        adam_betas=(0.9, 0.99),
        ema_decay=0.995,
        output_dir="runs/tiny",
    ),
    "sd2-base-256": _SD2_BASE_256,
    "sd2-base-512": replace(
        _SD2_BASE_256,
        resolution=512,
        max_steps=850_000,
        ema_decay=0.9999,
        ema_start_step=800_000,
        output_dir="runs/sd2-base-512",
    ),
}


def preset(name: str) -> TrainConfig:
    """A preset by name.

    Raises:
        UserError: there is none of this name.
    """
    if name not in PRESETS:
        raise UserError("preset", f"{name!r} is unknown", wanted=f"one of {', '.join(PRESETS)}")
    return PRESETS[name]
