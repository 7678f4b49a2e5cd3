"""The presets: recipes that were published, number for number, and one that fits a laptop."""

from __future__ import annotations

from dataclasses import replace

from shards.errors import UserError
from train.config import TrainConfig

# mosaicml/diffusion, SD-2-base-256.yaml and SD-2-base-512.yaml: AdamW 1e-4, weight decay 0.01,
# batch 2048, 10,000 steps of warm-up, then constant; 550,000 steps at 256, then 850,000 at 512 with
# an EMA over the last 50,000. Ours clips gradients as well: without it users of that recipe have
# reported NaN after some thousand steps.
_SD2_BASE_256 = TrainConfig(
    unet="sd2-base",
    resolution=256,
    max_steps=550_000,
    global_batch_size=2048,
    micro_batch_size="auto",
    warmup_steps=10_000,
    output_dir="runs/sd2-base-256",
    checkpoint_every=10_000,
    validation_samples=2048,
    validation_every=10_000,
    sample_every=10_000,
)
_SD2_BASE_512 = replace(
    _SD2_BASE_256,
    resolution=512,
    max_steps=850_000,
    ema_decay=0.9999,
    ema_start_step=800_000,
    output_dir="runs/sd2-base-512",
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
        validation_samples=128,
        validation_every=500,
        output_dir="runs/tiny",
    ),
    "sd2-base-256": _SD2_BASE_256,
    "sd2-base-512": _SD2_BASE_512,
    # The model card of stable-diffusion-v1-5: batch 2048, 10,000 steps of warm-up to 1e-4, 10% of
    # the captions dropped, 595,000 steps (it went on from v1-2: --init-from). Decay and
    # start of the average are those of CompVis' trainer, from the first step.
    "sd15-512": replace(
        _SD2_BASE_512,
        unet="sd15",
        max_steps=595_000,
        ema_start_step=0,
        output_dir="runs/sd15-512",
    ),
    # MLPerf Training 3.1 to 5.0, Stable Diffusion v2: the reference at batch 512, learning rate
    # 1.25e-7 x batch, 1,000 steps of warm-up, v-prediction, no average, no dropped captions, no
    # clipping; it converges within 3,072,000 samples. The reference's residual blocks have 16
    # groups in their norms, its transformers 32; diffusers has one number for both, 32 here.
    "mlperf-sd2-512": replace(
        _SD2_BASE_512,
        prediction_type="v_prediction",
        max_steps=6_000,
        global_batch_size=512,
        learning_rate=6.4e-5,
        warmup_steps=1_000,
        caption_drop_prob=0.0,
        max_grad_norm=0.0,
        ema_decay=0.0,
        ema_start_step=0,
        checkpoint_every=1_000,
        validation_every=1_000,
        sample_every=1_000,
        output_dir="runs/mlperf-sd2-512",
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
