"""Sweep the guidance scale: images, FID against CLIP score, a plot; the same command continues."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from evaluate.commands.generate import share_of
from evaluate.protocols import PROTOCOLS, Protocol
from shards.errors import UserError


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Settings of `python -m evaluate guidance`; what is not given is the protocol's."""

    source: str
    """A training run or one of its checkpoints, an exported pipeline, or a hub id."""
    scenes: str = ""
    """Folder with image shards of scenes: their captions are the prompts, their pictures the
    reference, and generated pictures are read back (the embedded default)."""
    prompts: str = ""
    """Instead of --scenes: prompts as `python -m evaluate generate` takes them, such as
    coco:<captions_val2014.json>."""
    reference: str = ""
    """With --prompts: a folder of pictures, image shards, or saved statistics (.safetensors of
    `metrics --save-reference`, .npz with mu and sigma)."""
    protocol: Literal["scenes", "coco-30k", "mlperf-sd2"] = "scenes"
    """Where the numbers below come from unless they are given (evaluate/protocols.py)."""
    scales: tuple[float, ...] = ()
    """Guidance scales; 1 is off."""
    num_images: int | None = None
    """At each scale."""
    num_steps: int | None = None
    """Of the sampler."""
    scheduler: str = ""
    """The sampler: dpm++, ddim, ddpm, euler, euler-a, heun, pndm or unipc."""
    side: int | None = None
    """Of the images in pixels; 0: the U-Net's own."""
    features: str = ""
    """Network of FID and KID: a CLIP folder or hub id, inception[:file.pth], or TorchScript .pt."""
    clip: str = ""
    """CLIP folder or hub id of the CLIP score."""
    model: str = ""
    """Model folder or hub id of a run's encoders; default: those that it was trained with."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """Of a run; auto takes the averaged ones where there are any."""
    seed: int = 0
    """The image of id n starts from the noise of seed + n, at every scale."""
    batch_size: int = 50
    """Images at a time on each process."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """That the pipeline runs in."""
    device: str = ""
    """Default: the GPU of the process's rank, else the CPU."""
    out: str = ""
    """The folder; default: guidance in the run."""


def run(config: GuidanceConfig) -> None:
    """Generate, measure, and write guidance.json, guidance.md, guidance.png and grid.png."""
    protocol = chosen_protocol(config)
    if bool(config.scenes) == bool(config.prompts and config.reference):
        raise UserError(
            "guidance",
            "what to draw and to compare with",
            wanted="--scenes, or both --prompts and --reference",
        )
    process, num_processes = share_of("")

    from evaluate.clip import Clip
    from evaluate.feature_networks import identity_of, load_feature_network
    from evaluate.guidance import measure_sweep
    from evaluate.reference import open_reference
    from precompute.loading import choose_device

    device = str(choose_device(config.device or _device()))
    # Before hours of generating: what is missing for the measuring.
    network = load_feature_network(protocol.features, device) if process == 0 else None
    clip = Clip(protocol.clip, device) if process == 0 else None
    sweep = build_sweep(config, protocol, process, num_processes)
    folders = sweep.generate(_load_pipeline(config, protocol, device))
    if network is None or clip is None:
        return
    sweep.wait_for_others(folders)
    size = folders[0].settings["height"], folders[0].settings["width"]
    reference = open_reference(config.reference or config.scenes, network, size=size)
    rows = measure_sweep(folders, reference, network, clip, with_scenes=bool(config.scenes))
    about = {
        "source": config.source,
        "weights": config.weights,
        "seed": config.seed,
        "protocol": {"name": config.protocol, **_as_json(PROTOCOLS[config.protocol])},
        "used": _as_json(protocol),
        "features": identity_of(network),
        "clip": {"name": clip.name, "weights_sha256": clip.weights_sha256},
        "reference": reference.about,
    }
    _write(sweep.out, about, rows, folders)
    _report(rows, protocol, sweep.out)


def _write(
    out: Any, about: dict[str, Any], rows: Sequence[dict[str, Any]], folders: Sequence[Any]
) -> None:
    """Figures, table, plot and grid."""
    from evaluate.guidance import table_of
    from evaluate.guidance_plot import write_plot, write_scale_grid
    from shards.canonical import canonical_json
    from shards.storage import write_text_whole

    write_text_whole(out / "guidance.json", canonical_json({**about, "scales": list(rows)}))
    write_text_whole(out / "guidance.md", table_of(rows) + "\n")
    network = about["features"]["name"]
    title = f"{about['source']}: {rows[0]['num_images']} images a scale, features of {network}"
    write_plot(out / "guidance.png", rows, title)
    write_scale_grid(out / "grid.png", folders, num_prompts=6)


def chosen_protocol(config: GuidanceConfig) -> Protocol:
    """The protocol with what the flags overrule.

    Raises:
        UserError: a number that cannot be meant.
    """
    from dataclasses import replace

    given = {
        name: value
        for name in ("scales", "num_images", "num_steps", "scheduler", "side", "features", "clip")
        if (value := getattr(config, name)) not in (None, "", ())
    }
    protocol = replace(PROTOCOLS[config.protocol], **given)
    if protocol.num_images < 2:
        raise UserError("--num-images", f"{protocol.num_images}", wanted="at least 2")
    if len(set(protocol.scales)) != len(protocol.scales):
        raise UserError("--scales", " ".join(map(str, protocol.scales)), wanted="each once")
    return protocol


def build_sweep(
    config: GuidanceConfig, protocol: Protocol, process: int, num_processes: int
) -> Any:
    """The prompts and settings of all images."""
    from evaluate.generate import GenerationSettings
    from evaluate.guidance import Sweep
    from evaluate.prompts import Prompts, load_prompts
    from evaluate.scenes import held_out_captions
    from shards.storage import location

    num = protocol.num_images
    if config.scenes:
        prompts = Prompts(held_out_captions(config.scenes, num), [])
    else:
        prompts = load_prompts(config.prompts, config.source, num_images=num, seed=config.seed)
    settings = GenerationSettings(
        num_steps=protocol.num_steps,
        width=protocol.side,
        height=protocol.side,
        seed=config.seed,
        batch_size=config.batch_size,
        source=config.source,
        weights=config.weights,
    )
    out = location(config.out or f"{config.source}/guidance")
    if not config.out and not Path(config.source).is_dir():
        raise UserError("--out", "not given", wanted="a folder: --source is no local run")
    return Sweep(
        prompts.texts, protocol.scales, settings, out, prompts.keys, process, num_processes, _say
    )


def _load_pipeline(config: GuidanceConfig, protocol: Protocol, device: str) -> Any:
    from evaluate.pipeline import load_pipeline

    return load_pipeline(
        config.source,
        config.model,
        weights=config.weights,
        device=device,
        dtype=config.dtype,
        scheduler=protocol.scheduler,
        say=_say,
    )


def _device() -> str:
    import os

    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def _report(rows: Sequence[dict[str, Any]], protocol: Protocol, out: Any) -> None:
    from evaluate.guidance import table_of

    print(table_of(rows))
    for warning in dict.fromkeys(text for row in rows for text in row["warnings"]):
        print(f"note: {warning}")
    for row in rows:
        if protocol.max_fid and row["guidance_scale"] in protocol.scales:
            is_met = row["fid"] <= protocol.max_fid
            is_met &= row["clip_score"] >= protocol.min_clip_score
            target = f"FID <= {protocol.max_fid:g}, CLIP score >= {protocol.min_clip_score:g}"
            print(
                f"target at {row['guidance_scale']:g} ({target}): {'met' if is_met else 'missed'}"
            )
    print(f"{out}: guidance.json, guidance.md, guidance.png, grid.png")
    short = ("guidance_scale", "num_images", "fid", "clip_score")
    print(json.dumps([{name: row[name] for name in short} for row in rows]))


def _as_json(protocol: Protocol) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(protocol), "scales": list(protocol.scales)}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
