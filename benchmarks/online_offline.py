"""Online against offline: one loop, one U-Net, one order of samples, four sources of batches.

Four arms: `resident` (the U-Net only, its batches on the device already: the ceiling), `offline`
(from latent shards, end to end), `ids` (from latent shards with token ids; the text encoder runs in
the loop), `online` (from image shards, end to end: read, decode, VAE, text encoder).

The arms run in turns, block by block, so that a machine that slows down slows all. The first steps
of a block are not timed. Before its time is trusted, an arm's samples, latents, texts and loss are
held to those of the others; for that the learning rate is 0, and the weights stay the same.

Without --data, images are drawn and encoded on first use: the demo's scenes for the tiny preset
(minutes in all on a laptop); JPEGs for the others, through encoders of the real size with random
weights. sd2-base-256 with --steps 2 on two cores takes seven minutes and 21 GiB, and says little of
a GPU.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.arms import MEANING, ArmName, Arms, Blocks, Timed, open_columns
from benchmarks.bench_data import own_dataset
from benchmarks.break_even import encode_images_per_sec, receipts_images_per_sec, totals
from benchmarks.components import measure_components
from benchmarks.flops import flops_per_image, predicted_ratio
from benchmarks.result import result, spread
from precompute.model_folder import find_model
from shards.dataset import Dataset
from shards.errors import UserError
from train.config import AttentionChoice, CompileMode, Precision, TrainConfig
from train.presets import preset

# Samples of a step where the preset's own batch is one for hundreds of GPUs.
_LARGE_BATCH = 256
_BATCHES = {"cpu": 1, "cuda": 64}
# Online, six batches lie decoded: four in the queue, one behind it, one before it.
_USUAL_WARMUP = 7
_NOISE = 1.5  # p90 over p10 of a ratio, from which on the machine was too busy to tell
_FLOAT32 = {"no": "float32"}  # what no mixed precision is
_EMA_DECAY = 0.9999  # for presets that keep no average


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measure online against offline training of the same U-Net."""

    data: str = ""
    """Latent dataset whose image shards are still there; default: drawn into data/bench."""
    preset: str = "tiny"
    """Training preset; its U-Net, objective and optimizer are what is timed."""
    arms: tuple[ArmName, ...] = ("resident", "offline", "ids", "online")
    """Which, in the order of their turns."""
    global_batch_size: int = 0
    """Samples per step; 0: the preset's, where that is a batch for one device, else 64 on a GPU and
    1 on a CPU."""
    micro_batch_size: int = 0
    """Samples per forward pass; 0: all of them."""
    precision: Precision = "auto"
    """As --mixed-precision of the trainer."""
    attention: AttentionChoice = "auto"
    """As the trainer's."""
    compile: CompileMode = "auto"
    """As the trainer's; compiling counts as warm-up."""
    ema: Literal["on", "off"] = "on"
    """Keep a moving average of the weights, updated every step."""
    blocks: int = 0
    """Timed blocks for each arm; 0: 5, or 2 for a large U-Net on a CPU."""
    steps: int = 8
    """Timed steps in a block."""
    warmup: int = 0
    """Steps before each block that are not timed; 0: 7, one more than the sources prefetch, or 1
    for a large U-Net on a CPU."""
    num_images: int = 0
    """Distinct images to draw for the SD2 presets; 0: 16 batches, at most 1024."""
    out: str = ""
    """File of the result; default: its place in benchmarks/results; `-`: none."""


def measure(bench: BenchConfig) -> dict[str, Any]:
    """Run the arms and return the result document.

    Raises:
        UserError: no usable dataset, settings that make no block, or arms that do unequal work.
    """
    import torch

    torch.set_flush_denormal(True)  # both as train/main.py sets them
    torch.set_float32_matmul_precision("high")
    _check(bench)
    config, blocks = train_config(bench), timing(bench)
    num_images = bench.num_images or min(1024, max(16, 16 * config.global_batch_size))
    dataset = Dataset(bench.data or own_dataset(config, num_images))
    columns = open_columns(dataset, config)
    batch, num_rows = config.global_batch_size, columns.image.num_rows
    if batch > num_rows:
        raise UserError("--global-batch-size", f"{batch}", wanted=f"at most {num_rows}, all images")
    with tempfile.TemporaryDirectory() as scratch:
        arms = Arms(config, columns, bench.arms, blocks, Path(scratch))
        try:
            timed = arms.run()
            components = measure_components(arms, blocks.blocks)
        finally:
            arms.close()
    flops = flops_per_image(
        config.unet, find_model(columns.image.model), columns.image.spec, columns.text.spec
    )
    device = arms.accelerator.device.type
    return result(
        "online-offline",
        bench,
        variant=bench.preset,
        preset=bench.preset,
        blocks=asdict(blocks),
        resolution=config.resolution,
        global_batch_size=batch,
        device=device,
        precision=arms.model.precision.name,
        attention=arms.model.attention,
        ema=arms.model.average is not None,
        arms={name: arm_figures(name, timed, batch) for name in timed},
        not_measured=arms.not_measured,
        components=components,
        flops_per_image=flops,
        flops_predicted_speedup=predicted_ratio(flops),
        stage1_receipts_images_per_sec=receipts_images_per_sec(
            dataset, columns.image, columns.text
        ),
        **compare(timed, components, batch, device),
    )


def _check(bench: BenchConfig) -> None:
    if bench.steps < 1:
        raise UserError("--steps", f"{bench.steps}", wanted="at least 1")
    for name in ("blocks", "warmup", "global_batch_size", "micro_batch_size", "num_images"):
        if getattr(bench, name) < 0:
            raise UserError(f"--{name.replace('_', '-')}", f"{getattr(bench, name)}")
    if not bench.arms or len(set(bench.arms)) < len(bench.arms):
        raise UserError("--arms", " ".join(bench.arms) or "none", wanted="each arm at most once")


def train_config(bench: BenchConfig) -> TrainConfig:
    """The run that all arms do: the preset's, with the batch of one device."""
    config = preset(bench.preset)
    default = _BATCHES[_device()] if _is_large(config) else config.global_batch_size
    batch = bench.global_batch_size or default
    return replace(
        config,
        global_batch_size=batch,
        micro_batch_size=bench.micro_batch_size,
        mixed_precision=bench.precision,
        attention=bench.attention,
        compile=bench.compile,
        ema_decay=(config.ema_decay or _EMA_DECAY) if bench.ema == "on" else 0.0,
        validation_samples=0,
    )


def timing(bench: BenchConfig) -> Blocks:
    """Blocks that end within minutes on the device at hand."""
    slow = _is_large(preset(bench.preset)) and _device() == "cpu"
    blocks, warmup = (2, 1) if slow else (5, _USUAL_WARMUP)
    return Blocks(blocks=bench.blocks or blocks, warmup=bench.warmup or warmup, steps=bench.steps)


def _is_large(config: TrainConfig) -> bool:
    return config.global_batch_size > _LARGE_BATCH


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# Figures ------------------------------------------------------------------------------------------


def arm_figures(name: str, timed: dict[str, list[Timed]], batch: int) -> dict[str, Any]:
    """What is reported of an arm: speeds with their spread, and the samples that they come from."""
    seconds = [block.sec_per_step for block in timed[name]]
    figures = {
        "images_per_sec": spread([batch / sec for sec in seconds]),
        "iters_per_sec": spread([1 / sec for sec in seconds]),
        "data_wait_frac": spread([block.data_wait_frac for block in timed[name]]),
        "sec_per_step": seconds,
        "losses": [block.loss for block in timed[name]],
    }
    if "resident" in timed:
        figures["share_of_ceiling"] = spread(time_ratios(timed, "resident", name))
    return figures


def time_ratios(timed: dict[str, list[Timed]], numerator: str, denominator: str) -> list[float]:
    """Time of one arm over that of another, block by block: they ran one after the other."""
    pairs = zip(timed[numerator], timed[denominator], strict=True)
    return [above.sec_per_step / below.sec_per_step for above, below in pairs]


def compare(
    timed: dict[str, list[Timed]], components: dict[str, Any], batch: int, device: str
) -> dict[str, Any]:
    """Offline against online, where both ran: the step alone, and with stage 1 counted.

    All of it follows from the ratio block by block: the medians of two arms may belong to different
    moments of a busy machine.
    """
    if not {"online", "offline"} <= set(timed):
        return {}
    speedup = spread(time_ratios(timed, "online", "offline"))
    offline = arm_figures("offline", timed, batch)["images_per_sec"]["median"]
    encode = encode_images_per_sec(components, batch, device)
    return {
        "offline_speedup": speedup,
        "is_noisy": is_noisy(speedup),
        "stage1_images_per_sec": encode,
        "totals": asdict(totals(offline / speedup["median"], offline, encode)),
    }


def is_noisy(ratio: dict[str, float]) -> bool:
    """Whether a ratio's spread leaves open what the machine was busy with."""
    return ratio["p10"] < 1 < ratio["p90"] or ratio["p90"] > _NOISE * ratio["p10"]


# For people ---------------------------------------------------------------------------------------


def print_table(document: dict[str, Any]) -> None:
    """The result for people."""
    env, ema = document["environment"], "on" if document["ema"] else "off"
    precision = _FLOAT32.get(document["precision"], document["precision"])
    print(
        f"\n{document['preset']} at {document['resolution']} px, batch "
        f"{document['global_batch_size']}, {precision}, EMA {ema}, "
        f"attention {document['attention']}; {env['device']}, torch {env['versions']['torch']}"
    )
    _print_arms(document)
    _print_parts(document)
    if "offline_speedup" in document:
        _print_comparison(document)


def _print_arms(document: dict[str, Any]) -> None:
    print(f"{'arm':<10}{'it/s':>8}{'img/s':>9}{'p10-p90':>18}{'of ceiling':>12}{'waits':>8}")
    for name, arm in document["arms"].items():
        speed, iters = arm["images_per_sec"], arm["iters_per_sec"]["median"]
        share = f"{arm['share_of_ceiling']['median']:.0%}" if "share_of_ceiling" in arm else "-"
        between = f"{speed['p10']:.3g}-{speed['p90']:.3g}"
        print(
            f"{name:<10}{iters:>8.3g}{speed['median']:>9.3g}{between:>18}{share:>12}"
            f"{arm['data_wait_frac']['median']:>8.1%}  {MEANING[name]}"
        )
    for name, reason in document["not_measured"].items():
        print(f"{name:<10}not measured: {reason}")
    print("waits: of the time, for the next batch; ids and online encode there")
    if len(document["arms"]) > 1:
        print("equal work: in every block all arms had the same samples, latents, texts and losses")
    if document["blocks"]["warmup"] < _USUAL_WARMUP:
        print("few steps: some were timed with batches that had been decoded before")


def _print_parts(document: dict[str, Any]) -> None:
    """Each part alone; what a part computes, where it computes anything worth counting."""
    flops, batch = document["flops_per_image"], document["global_batch_size"]
    print("each part alone, for a batch:")
    for name, part in document["components"].items():
        sec = part["sec_per_step"]
        unit, scale = ("ms", 1e3) if sec["median"] < 1 else ("s ", 1.0)
        between = f"({scale * sec['p10']:.3g}-{scale * sec['p90']:.3g})"
        line = f"  {name:<10}{scale * sec['median']:>8.3g} {unit} {between}"
        if name in flops:
            rate = batch * flops[name] / sec["median"]
            line += f", {flops[name] / 1e9:.4g} GFLOP an image, {rate / 1e12:.3g} TFLOP/s"
        print(line)


def _print_comparison(document: dict[str, Any]) -> None:
    speedup, sums = document["offline_speedup"], document["totals"]
    print(
        f"offline is {speedup['median']:.2f}x as fast as online (p10-p90 {speedup['p10']:.2f}-"
        f"{speedup['p90']:.2f}); FLOPs alone predict {document['flops_predicted_speedup']:.2f}x"
    )
    if document["is_noisy"]:
        load = document["environment"]["load_average"]
        print(f"the machine was too busy to conclude from that (load {load:.1f})")
    print(
        f"with stage 1 counted, at the {document['stage1_images_per_sec']:.3g} img/s of its parts "
        f"(its receipts: {document['stage1_receipts_images_per_sec']:.3g} img/s), for a million "
        "images:"
    )
    for epochs, total in sums["epochs"].items():
        hours = {arm: total[f"{arm}_sec_per_image"] * 1e6 / 3600 for arm in ("offline", "online")}
        shown = ", ".join(f"{arm} {value:,.3g} h" for arm, value in hours.items())
        print(f"  epochs: {epochs:>2}   {shown}: {total['speedup']:.2f}x")
    even = sums["break_even_epochs"]
    print(f"break-even after {even:.2f} epochs" if even else "break-even: never")
