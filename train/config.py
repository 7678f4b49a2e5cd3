"""What a training run is: one typed configuration. No torch here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

_COUNTS = (
    *("resolution", "max_steps", "global_batch_size", "shuffle_window", "ema_every"),
    *("log_every", "checkpoint_every", "keep_checkpoints", "sample_steps", "online_workers"),
    "eval_steps",
)
_NOT_NEGATIVE = (
    *("seed", "num_partitions", "min_snr_gamma", "offset_noise"),
    *("learning_rate", "warmup_steps", "adam_eps", "weight_decay", "max_grad_norm"),
    *("cache_gib", "ema_start_step", "keep_every", "max_restarts"),
    *("validation_samples", "validation_every", "num_samples", "sample_every", "sample_guidance"),
    *("eval_images", "eval_every"),
)
_FRACTIONS = ("caption_drop_prob", "flip_prob", "final_lr_frac", "ema_decay", "sample_rescale")

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
Precision = Literal["auto", "no", "fp16", "bf16", "bf16-weights"]
AttentionChoice = Literal["auto", "xformers", "sdpa", "flash", "cudnn", "math"]
CompileMode = Literal["auto", "off", "regional", "full"]
Switch = Literal["auto", "on", "off"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that a run depends on; the command line has a flag for each field."""

    # The model
    unet: str = "tiny"
    """U-Net configuration: a name in train/unets, or a path to a diffusers config.json."""
    resolution: int = 64
    """Side of the images in pixels; chooses the dataset's image column."""
    init_from: str = ""
    """Start from the weights of a run, a checkpoint, a diffusers folder or a hub id; weights alone
    (the 256-px run that a 512-px run goes on from)."""
    init_weights: Literal["raw", "ema"] = "raw"
    """Which weights of --init-from: as trained, or their moving average."""

    # The data
    data: str = "data/latents"
    """Latent dataset: a folder, or a URL such as s3://bucket/latents."""
    output_dir: str = "runs/latest"
    """Of the run: checkpoints, metrics.jsonl, the exported U-Net, sample images; a folder or a URL.
    The same command again continues there."""
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
    follow: bool = False
    """Train on a dataset that stage 1 is still writing: each epoch takes the shards that are there
    when it starts, and records which (epochs.jsonl)."""
    online: str = ""
    """Train from these image shards instead, as `make precompute SHARDS=` takes them: the encoders
    of --model run in every step."""
    online_workers: int = 4
    """Threads that read and decode images for --online."""
    random_crop: bool = False
    """Cut the square at random instead of from the centre; --online alone."""

    # The length, the batch, and what depends on chance
    max_steps: int = 1000
    """Optimizer updates in the whole run."""
    global_batch_size: int = 32
    """Samples per update, over all processes."""
    micro_batch_size: int | Literal["auto"] = 0
    """Samples per forward pass and process; 0 takes a process's whole share at once, auto as much
    of it as a GPU's memory holds (16 on a CPU)."""
    seed: int = 0
    """Of the weights, the order of samples, and every random draw."""
    num_partitions: int = 0
    """Canonical partitions of the order (shards/order.py); 0 derives them from the batch."""
    shuffle_window: int = 16_384
    """Samples that are shuffled together within a partition."""
    caption_drop_prob: float = 0.1
    """Share of captions replaced by the empty one, drawn anew every step (train/draws.py)."""
    flip_prob: float = 0.0
    """Share of images that are mirrored; takes a column precomputed with --flip, or --online."""

    # The objective
    prediction_type: PredictionType = "epsilon"
    """What the U-Net predicts; flow is flow matching on straight lines (arXiv:2209.03003)."""
    min_snr_gamma: float = 0.0
    """Clip the loss weight at this signal-to-noise ratio (arXiv:2303.09556); 0 weighs all alike."""
    zero_terminal_snr: bool = False
    """Rescale the betas so that the last timestep is pure noise (arXiv:2305.08891)."""
    snr_shift: float = 1.0
    """Multiply every timestep's signal-to-noise ratio: 0.25 when the side is twice that of the
    schedule (arXiv:2301.11093). Flow: its timesteps move likewise (arXiv:2403.03206)."""
    offset_noise: float = 0.0
    """Add noise of this deviation that is constant over each channel; 0.05 to 0.1 is usual."""
    timestep_sampling: Literal["uniform", "sobol", "logit-normal"] = "uniform"
    """Independent; quasi-random over the batch, and over the run; or mostly the middle."""

    # The optimizer
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
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm to clip at; 0 never clips."""
    ema_decay: float = 0.0
    """Decay per step of the weights' moving average; 0 keeps none."""
    ema_start_step: int = 0
    """Updates after which the average starts, as a copy of the weights; no memory before."""
    ema_every: int = 1
    """Steps between two updates of the average; the decay is raised to this power."""

    # How it is computed: none of this changes what is trained, but for rounding
    mixed_precision: Precision = "auto"
    """fp16 and bf16 are autocast; bf16-weights keeps the model in bfloat16 and float32 masters.
    auto: what accelerate launch was told, else bf16-weights on a GPU that has bfloat16, else no."""
    low_precision_norm: bool = False
    """Under autocast, run group and layer norms in the low precision as well."""
    attention: AttentionChoice = "auto"
    """auto measures what runs on a GPU and takes the fastest; the log says which."""
    compile: CompileMode = "auto"
    """torch.compile: full makes one graph from moments to loss; regional compiles each block once,
    in a fraction of the time. auto: on a GPU full, or regional with --sharding zero2."""
    channels_last: Switch = "auto"
    """Keep activations in NHWC from end to end, as convolutions want them. auto: on. The log says
    which of this and the switches below are on, and why one is off."""
    fused_update: Switch = "auto"
    """Clip, AdamW, average and bfloat16 copy in one pass over the weights, by a Triton kernel.
    auto, here and below: on a GPU where the kernel agrees with torch on the device at hand."""
    fused_norms: Switch = "auto"
    """GroupNorm, time embedding and SiLU in NHWC by Triton kernels, forward and backward."""
    fused_geglu: Switch = "auto"
    """The feed-forward layers' gate by a Triton kernel, forward and backward."""
    batched_projections: Switch = "auto"
    """Query, key and value in one product; all cross-attention's keys and values in one; all time
    embeddings' projections in one. Checkpoints stay diffusers'. auto: on a GPU."""
    conv_search: Switch = "auto"
    """Let cuDNN try its algorithms for each convolution and keep the fastest. auto: on a GPU."""
    cuda_graph: Switch = "auto"
    """Record the whole step once and replay it: the host hands out one graph, not thousands of
    kernels. auto: on a GPU, of one process."""
    sharding: Literal["off", "zero2"] = "off"
    """zero2 splits gradients, masters, optimizer and average among the processes."""

    # Seeing it learn
    log_every: int = 50
    """Steps between two log lines; the host waits for the device only here."""
    trackers: str = ""
    """Also log to these: tensorboard, wandb, trackio; comma-separated."""
    validation_samples: int = 512
    """Samples that are never trained on (at most 5% of them); 0 holds none out."""
    validation_every: int = 1000
    """Steps between two measurements of their loss; 0: at the end alone."""
    num_samples: int = 16
    """Images in a sample grid; 0 makes none."""
    sample_every: int = 0
    """Steps between two sample grids; 0: at the end alone."""
    sample_prompts: str = ""
    """A text file, a prompt a line, or prompts with semicolons between; default: captions."""
    sample_negative_prompt: str = ""
    """What the images are to lack."""
    sample_guidance: float = 3.0
    """Scale of classifier-free guidance."""
    sample_rescale: float = 0.0
    """Rescale guided predictions (arXiv:2305.08891); 0.7 goes with --zero-terminal-snr."""
    sample_steps: int = 20
    """Steps of the sampler."""
    eval_images: int = 0
    """Images to measure FID, KID and CLIP score on, from captions that are held out, against their
    latents decoded by the VAE; 0 measures none. Small: all processes wait meanwhile."""
    eval_every: int = 0
    """Steps between two such measurements; 0: at the end alone."""
    eval_guidance: tuple[float, ...] = (3.0,)
    """Scales of classifier-free guidance to measure at."""
    eval_steps: int = 20
    """Steps of the sampler."""
    eval_features: str = "examples/tiny-clip"
    """Network of FID and KID, and of the CLIP score where it is a CLIP: a folder or hub id, or what
    else `python -m evaluate metrics --features` takes. The default knows drawn scenes alone."""
    model: str = ""
    """Model folder or hub id of the encoders; default: the one that the dataset was made with."""

    # Staying alive
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Older checkpoints are removed."""
    keep_every: int = 0
    """Checkpoints of multiples of this many steps stay for ever; 0: none."""
    checkpoint_format: Literal["full", "sharded"] = "full"
    """sharded, with --sharding zero2: every process writes its own part."""
    checkpoint_in_background: bool = True
    """Copy to the host's memory, where there is room, and train on while the copy is written."""
    max_restarts: int = 0
    """Start again from the last checkpoint after a failure, this many times. Of several processes
    the launcher must do it: accelerate launch --max_restarts."""

    def __post_init__(self) -> None:
        for names, allowed, wanted in (
            (_COUNTS, lambda value: value >= 1, "at least 1"),
            (_NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "finite and at least 0"),
            (_FRACTIONS, lambda value: 0 <= value <= 1, "between 0 and 1"),
        ):
            for name in names:
                if not allowed(getattr(self, name)):
                    raise ValueError(f"--{name.replace('_', '-')} must be {wanted}")
        if self.micro_batch_size != "auto" and self.micro_batch_size < 0:
            raise ValueError("--micro-batch-size must be auto or at least 0")
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError("--adam-betas must be at least 0 and below 1")
        scales = self.eval_guidance
        if not scales or not all(0 <= scale < math.inf for scale in scales):
            raise ValueError("--eval-guidance must be scales, finite and at least 0")
        if not 0 < self.snr_shift < math.inf:
            raise ValueError("--snr-shift must be finite and above 0")
        for wrong, why in self._contradictions():
            if wrong:
                raise ValueError(why)

    def _contradictions(self) -> list[tuple[bool, str]]:
        """Pairs of settings that cannot both be meant."""
        at_zero_snr = self.zero_terminal_snr and self.prediction_type in ("epsilon", "flow")
        return [
            (
                at_zero_snr,
                "--zero-terminal-snr needs --prediction-type v_prediction or sample: "
                "pure noise says nothing about epsilon, and flow ends there anyway",
            ),
            (
                self.prediction_type == "flow" and self.min_snr_gamma > 0,
                "--prediction-type flow has no noise schedule to weigh by: --min-snr-gamma 0",
            ),
            (
                self.sharding == "zero2" and self.compile == "full",
                "--sharding zero2 gathers weights between blocks; --compile regional goes with it",
            ),
            (
                self.low_precision_norm and self.mixed_precision not in ("auto", "fp16", "bf16"),
                "--low-precision-norm belongs to --mixed-precision fp16 or bf16",
            ),
            (
                self.checkpoint_format == "sharded" and self.sharding == "off",
                "--checkpoint-format sharded needs --sharding zero2",
            ),
            (
                self.random_crop and not self.online,
                "--random-crop needs pixels: --online; stored latents were cropped by stage 1",
            ),
            (
                bool(self.online) and self.follow,
                "--follow is for a dataset that is being written; --online reads none",
            ),
        ]

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
            *("data", "output_dir", "image_column", "text_column", "text", "model"),
            *("cache_dir", "cache_gib", "online", "online_workers", "micro_batch_size"),
            *("attention", "compile", "sharding", "log_every", "trackers", "validation_every"),
            *("channels_last", "fused_update", "fused_norms", "fused_geglu"),
            *("batched_projections", "conv_search", "cuda_graph"),
            *("checkpoint_every", "keep_checkpoints", "keep_every", "checkpoint_format"),
            *("checkpoint_in_background", "max_restarts", "num_samples"),
            *(n for n in self.__dataclass_fields__ if n.startswith(("sample_", "eval_"))),
        }
        if self.lr_schedule == "constant":
            free.add("max_steps")
        fields = {name: value for name, value in asdict(self).items() if name not in free}
        return {**fields, "adam_betas": list(self.adam_betas)}
