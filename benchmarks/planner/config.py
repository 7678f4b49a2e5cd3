"""What the planner is asked: everything that decides the time, the bytes and the money of a job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Latents = Literal["moments", "mean", "moments-int8", "mean-int8"]
TextStates = Literal["fp16", "int8"]
UNet = Literal["sd2-base", "sd15", "tiny"]


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """The bill of a training job before it is started.

    A number of the job stands alone, or for one resolution (256=740), a speed also for so many
    GPUs together (256@8=5600).
    """

    preset: str = ""
    """A job to start from: mosaicml-a100, anyscale-a100 (published), sd2-base (our recipe); flags
    take the place of its inputs."""

    # The job
    resolutions: str = ""
    """One phase of training each, in this order, in pixels: 256,512."""
    images: tuple[str, ...] = ()
    """Distinct images: 4e6, or 256=790e6 512=300e6 where not all are large enough."""
    epochs: tuple[str, ...] = ()
    """Passes over the images of a phase; or give --steps."""
    steps: tuple[str, ...] = ()
    """Optimizer updates of a phase: 256=550_000 512=850_000."""
    global_batch_size: tuple[str, ...] = ()
    """Images per update, over all GPUs, where --steps are given; default: 2048."""
    runs: int = 1
    """Trainings that read the same latents: repeats, sweeps, other U-Nets."""
    unet: UNet = "sd2-base"
    """U-Net of train/unets: gives the shapes of latents and text states, and the FLOPs."""

    # How fast; what is given beats what was measured, and that what FLOPs predict
    images_per_sec: tuple[str, ...] = ()
    """Training from latents (offline): 256=740 of one GPU, 256@8=5600 of eight together."""
    online_images_per_sec: tuple[str, ...] = ()
    """Training with the VAE and the text encoder in every step, in the same form."""
    ids_images_per_sec: tuple[str, ...] = ()
    """Training from stored latents with the text encoder in every step, in the same form."""
    online_factor: float = 0.0
    """Time of an online step over an offline one's, where that is all that is known: 1 to 10."""
    results: tuple[str, ...] = ()
    """Results to take speeds from: files of online-offline, train-step and scaling."""
    hardware: str = ""
    """Of the results, those of this hardware, as their files are named: h200, 8xa100-sxm4-80gb."""
    gpu_hours: float = 0.0
    """Of one training on the first of --gpus, where only that total is known."""
    tflops: float = 0.0
    """Predict from FLOPs: what the GPU reaches in matrix products, in TFLOP/s (790); with --mfu."""
    mfu: float = 0.0
    """The share of --tflops that training reaches (0.5)."""
    efficiency: float = 0.0
    """What is left of a GPU's speed at each doubling of their number beyond what is known (0.97, at
    least 0.1); default: all of it, which is said."""

    # GPUs and money; without a price there are GPU-hours
    gpus: tuple[int, ...] = ()
    """GPU counts to compare; the first is the one that totals are stated for. Default: 8."""
    gpus_per_node: int = 8
    """For the MB/s that a node reads."""
    usd_per_gpu_hour: tuple[str, ...] = ()
    """Price plans: 2.50, or by name, side by side: reserved=3.00 on-demand=5.12."""

    # Stage 1
    encode_images_per_sec: tuple[str, ...] = ()
    """What one GPU encodes: 256=1500 512=400; default: what an online step takes longer."""
    encode_gpu_hours: float = 0.0
    """Of the whole of stage 1, where it is known."""
    encode_gpus: int = 0
    """GPUs of stage 1; default: as many as train."""
    encode_usd_per_gpu_hour: float = 0.0
    """Price of other, cheaper GPUs for stage 1, with what those encode or take; default: that of
    training."""

    # Bytes
    latents: Latents = "moments"
    """What is stored of an image, as make precompute's --latents."""
    text: TextStates = "fp16"
    """What is stored of a caption for training offline; that of token ids is always beside it."""
    storage_usd_per_tb_month: float = 0.0
    """Of the latent dataset; 0: not counted, which is said."""
    storage_months: float = 0.0
    """How long it is kept; default: stage 1 and all runs."""
    egress_usd_per_tb: float = 0.0
    """For moving the latents once from where they are encoded to where training reads them."""

    # The business case: what the model is expected to bring is an input, not a prediction
    budget_usd: float = 0.0
    """What may be spent on compute."""
    return_before_usd: float = 0.0
    """Expected return of a year without the model."""
    return_after_usd: float = 0.0
    """Expected return of a year with the model of one's own."""
    return_pretrained_usd: float = 0.0
    """Expected return of a year with a pre-trained model as it is."""
    years: float = 1.0
    """For which the returns are counted."""

    plot: str = ""
    """Draw it: a file that ends with .png, .svg or .pdf."""
    json: bool = False
    """End with the whole plan as one JSON document."""
