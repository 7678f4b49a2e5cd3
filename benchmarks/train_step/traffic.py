"""Bytes that a training step moves, counted on no device, rung by rung of what makes it fast.

A large part of the step waits for memory, so its bytes are what fusing kernels changes, and they
need no GPU to be counted: from the operators that PyTorch dispatches for one, or, compiled, from
inductor's schedule. They are a count, and a prediction of time no further than that.

GB per image grow with the micro-batch; GB per step are the same for any: weights read, gradients
written, casts of both. The update is counted in bytes per parameter, average included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.result import result
from shards.column import Json
from train.unet import load_unet_config

if TYPE_CHECKING:
    from benchmarks.train_step.traffic_unet import Setting

_MICRO_BATCHES = {512: 32, 256: 64}  # samples of a forward pass, by resolution
_DOWNSAMPLE_FACTOR = 8


@dataclass(frozen=True, kw_only=True)
class TrafficConfig:
    """Count the bytes of the U-Net's training step, with one switch more in each row."""

    unet: str = "sd2-base"
    """U-Net configuration: a name in train/unets, or a path to a diffusers config.json."""
    compiled: bool = False
    """Count compiled passes as well; takes minutes on a CPU."""
    out: str = ""
    """File of the result; default: its place in benchmarks/results; `-`: none."""


def measure(config: TrafficConfig) -> dict[str, Any]:
    """Count, and return the result document; the machine in it has no part in the numbers."""
    rows = ladder_rows(load_unet_config(config.unet), compiled=config.compiled)
    return result("traffic", config, variant=Path(config.unet).stem, rows=rows)


def ladder_rows(
    unet_config: dict[str, Any],
    *,
    resolutions: Sequence[int] = tuple(_MICRO_BATCHES),
    compiled: bool = False,
) -> list[Json]:
    """Each rung at each resolution.

    Args:
        unet_config: diffusers configuration.
        resolutions: of those in `_MICRO_BATCHES`.
        compiled: count compiled passes as well, which takes minutes.

    Returns:
        a row for each rung and resolution, of the rungs in the order of the ladder: bytes of a
        sample and of a pass by kind of operator, what is kept for the backward pass, operators,
        and bytes per parameter of the update by operator.
    """
    from benchmarks.train_step.traffic_unet import count_parameters

    num_parameters = count_parameters(unet_config)
    return [
        {"rung": name, **_row(unet_config, num_parameters, resolution, setting)}
        for name, setting in _rungs()
        if compiled or setting.plan.compile == "off"
        for resolution in resolutions
    ]


def _rungs() -> Iterator[tuple[str, Setting]]:
    """Name and setting: those of `benchmarks.train_step.rungs` that change what is read."""
    from benchmarks.train_step.traffic_unet import Setting
    from train.step_plan import StepPlan

    bare = StepPlan(
        compile="off",
        channels_last=False,
        fused_update=False,
        fused_norms=False,
        fused_geglu=False,
        batched_projections=False,
        conv_search=False,
        cuda_graph=False,
    )
    yield "autocast", Setting(plan=bare, low_weights=False)
    updated = replace(bare, fused_update=True)
    nhwc = replace(updated, channels_last=True)
    norms = replace(nhwc, fused_norms=True)
    geglu = replace(norms, fused_geglu=True)
    batched = replace(geglu, batched_projections=True)
    compiled = replace(batched, compile="full")
    plans = {
        "bf16-weights": bare,
        "fused-update": updated,
        "channels-last": nhwc,
        "fused-norms": norms,
        "fused-geglu": geglu,
        "batched-projections": batched,
        "compile": compiled,
        "compile-without-kernels": replace(compiled, fused_norms=False, fused_geglu=False),
    }
    for name, plan in plans.items():
        yield name, Setting(plan=plan, low_weights=True)


def _row(
    unet_config: dict[str, Any], num_parameters: int, resolution: int, setting: Setting
) -> Json:
    from benchmarks.train_step.traffic_compiled import count_compiled
    from benchmarks.train_step.traffic_unet import count_traffic
    from benchmarks.train_step.traffic_update import update_bytes_per_parameter

    is_compiled = setting.plan.compile == "full"
    count = count_compiled if is_compiled else count_traffic
    batch = _MICRO_BATCHES[resolution]
    traffic = count(unet_config, resolution // _DOWNSAMPLE_FACTOR, setting, batch)
    update = update_bytes_per_parameter(
        low_weights=setting.low_weights, fused=setting.plan.fused_update
    )
    of_pass = traffic.bytes_per_step + num_parameters * sum(update.values())
    return {
        "resolution": resolution,
        "precision": "bf16-weights" if setting.low_weights else "bf16",
        "switches": str(setting.plan),
        "counted": "inductor's schedule" if is_compiled else "operators",
        "micro_batch": batch,
        "num_parameters": num_parameters,
        "bytes_per_image": traffic.bytes_per_image,
        "bytes_per_step": traffic.bytes_per_step,
        "bytes_per_image_in_batch": traffic.bytes_per_image_in_batch,
        "bytes_per_image_with_update": traffic.bytes_per_image + of_pass / batch,
        "image_bytes": dict(traffic.image_bytes),
        "step_bytes": dict(traffic.step_bytes),
        "saved_bytes_per_image": traffic.saved_bytes_per_image,
        "num_operators": traffic.num_operators,
        "update_bytes_per_parameter": update,
    }


# For people ---------------------------------------------------------------------------------------


def print_table(document: dict[str, Any]) -> None:
    """The result for people."""
    unet = document["protocol"]["unet"]
    print(f"\n{unet}, {document['rows'][0]['num_parameters']:,} parameters, counted on no device")
    print_rows(document["rows"])


def print_rows(rows: list[Json]) -> None:
    """Rows of `ladder_rows`: what moves, and by which kind of operator."""
    by_rung: dict[str, list[Json]] = {}
    for row in rows:
        by_rung.setdefault(row["rung"], []).append(row)
    resolutions = [row["resolution"] for row in rows if row["rung"] == rows[0]["rung"]]
    width = 8 * len(resolutions)
    print(f"\n{'':<30}{'GB/image':>{width}}{'GB/image*':>{width}}{'MB saved':>{width}}")
    pixels = "".join(f"{resolution:>8}" for resolution in resolutions) * 3
    print(f"{'rung':<30}{pixels}{'GB/step':>9}{'operators':>11}  update B/parameter")
    for name, found in by_rung.items():
        print(f"{name:<30}{_columns(found)}")
    batches = ", ".join(f"{_MICRO_BATCHES[of]} at {of} px" for of in resolutions)
    print(f"* with its share of GB/step and of the update, in micro-batches of {batches}")
    _print_kinds(rows)


def _columns(rows: list[Json]) -> str:
    """Of one rung's rows, which differ by resolution."""
    figures = (("bytes_per_image", 1e9, 2), ("bytes_per_image_with_update", 1e9, 2))
    columns = "".join(
        f"{row[name] / unit:>8.{digits}f}"
        for name, unit, digits in (*figures, ("saved_bytes_per_image", 1e6, 0))
        for row in rows
    )
    first = rows[0]
    update = sum(first["update_bytes_per_parameter"].values())
    per_step = first["bytes_per_step"] / 1e9
    return f"{columns}{per_step:>9.2f}{first['num_operators']:>11,}{update:>20}"


def _print_kinds(rows: list[Json]) -> None:
    from benchmarks.train_step.traffic_operators import KINDS

    largest = max(row["resolution"] for row in rows)
    print(f"\n{f'MB/image at {largest} px':<30}" + "".join(f"{kind:>12}" for kind in KINDS))
    for row in rows:
        if row["resolution"] == largest:
            sizes = (row["image_bytes"].get(kind, 0) / 1e6 for kind in KINDS)
            print(f"{row['rung']:<30}" + "".join(f"{size:>12,.0f}" for size in sizes))
