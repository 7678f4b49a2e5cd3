"""The trainer on more and more processes: images per second, efficiency, and what it sends.

Every world size runs the real loop through `torchrun`, on synthetic latents, in turns; efficiency
is images per second over those of as many single processes, of the same turn. What devices that are
not here would reach is predicted from the bytes that a step sends and the speed of given links, and
marked as predicted.

`--processes` without a number measures nothing: `--images-per-sec 149.5 --preset sd2-base-512
--micro-batch-size 64 --precision bf16-weights` predicts from a published figure.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.environment.facts import num_usable_cpus
from benchmarks.result import result, spread
from benchmarks.scaling.launch import ended_by_signals
from benchmarks.scaling.model import (
    ASSUMPTIONS,
    Links,
    Payload,
    Sharding,
    payload_of,
    predict,
    published_efficiencies,
)
from benchmarks.scaling.runs import Row, plan_rows, run_in_turns
from shards.column import Json
from shards.errors import UserError
from train.config import Precision
from train.presets import preset

_IDLE_LOAD = 0.25  # per CPU
# Of any number that is given: beyond them what is computed overflows.
_LEAST, _MOST = 1e-9, 1e12
_CPU_NOTE = (
    "processes on one CPU share its memory and caches: the efficiency is theirs as much as that of "
    "the trainer, and says nothing of the links between accelerators"
)


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Measure the trainer on several processes, and predict it on more devices."""

    preset: str = "tiny"
    """Training preset: U-Net, resolution, objective, optimizer."""
    processes: tuple[int, ...] = (1, 2)
    """World sizes; one process always runs with them. Nothing behind the flag: predict alone."""
    shardings: tuple[Sharding, ...] = ("none",)
    """Plain data parallelism, zero2, or both; one process has nothing to shard."""
    micro_batch_size: int = 16
    """Samples of a forward pass of each process."""
    strong: bool = False
    """Keep the global batch, that of the most processes: fewer of them accumulate. Else every
    process adds its own micro-batch."""
    precision: Precision = "auto"
    """Of the training."""
    steps: int = 5
    """Steps of a timed block."""
    warmup: int = 6
    """Steps before the first timed block of a run."""
    blocks: int = 2
    """Timed blocks of a run."""
    rounds: int = 2
    """Runs of each world size, in turns."""
    num_samples: int = 1024
    """Distinct samples; 223 kB each at 512 px with the states of SD 2."""

    predict_devices: tuple[int, ...] = (8, 16, 64, 512)
    """Numbers of devices to predict."""
    images_per_sec: float = 0.0
    """Of one device, to predict from; 0 takes what one process reached here."""
    devices_per_node: int = 8
    """For the prediction."""
    intra_node_gb_per_sec: float = 450.0
    """Of each device to the others of its node, one direction; 450: NVLink of an H100 or H200."""
    inter_node_gbit_per_sec: float = 3200.0
    """Of each node, one direction; 3200 is eight adapters of 400 Gbit/s."""

    scratch: str = "data"
    """Folder for a temporary folder, which is removed at the end."""
    out: str = ""
    """File of the result; default: its place in benchmarks/results; `-`: none."""

    def links(self) -> Links:
        """What devices are connected with."""
        return Links(
            devices_per_node=self.devices_per_node,
            intra_node_bytes_per_sec=self.intra_node_gb_per_sec * 1e9,
            inter_node_bytes_per_sec=self.inter_node_gbit_per_sec * 1e9 / 8,
        )


@ended_by_signals()
def measure(config: ScalingConfig) -> dict[str, Any]:
    """Run all world sizes, count, predict, and return the result document.

    Raises:
        UserError: settings that make no run, or a process that died.
        SystemExit: a signal asked for the end; nothing is left.
    """
    import torch

    from train.precision import resolve_precision

    check_config(config)
    load = os.getloadavg()[0]
    num_gpus = torch.cuda.device_count()
    device = torch.device("cuda" if num_gpus else "cpu")
    low_weights = resolve_precision(config.precision, device).has_low_weights
    num_parameters = count_parameters(config.preset)
    payloads = {
        sharding: payload_of(num_parameters, sharding, low_weights=low_weights)
        for sharding in config.shardings
    }
    whole = payload_of(num_parameters, "none", low_weights=low_weights)
    rows = plan_rows(config, num_gpus or num_usable_cpus(), "GPUs" if num_gpus else "CPUs")
    most = max((row.num_processes for row in rows if not row.reason), default=1)
    num_threads = max(1, num_usable_cpus() // most)
    run_in_turns(config, rows, num_threads, whole.all_reduce, on_gpu=bool(num_gpus))
    documents = [row.to_json(rows[0]) for row in rows]
    rate = config.images_per_sec or documents[0]["images_per_sec"]["median"]
    return result(
        "scaling",
        config,
        variant=config.preset,
        threads_per_process=num_threads,
        notes=_notes(load, on_gpu=bool(num_gpus)) if rows else [],
        rows=documents,
        communication={
            "num_parameters": num_parameters,
            "gradient_bytes": whole.all_reduce,
            "payload_bytes": {name: asdict(payload) for name, payload in payloads.items()},
            "counted": [_counted(row) for row in rows if _talked(row)],
            "all_reduce": _all_reduces(rows, whole.all_reduce),
        },
        predicted=_predict(config, payloads, rate),
    )


def check_config(config: ScalingConfig) -> None:
    """Refuse settings that make no run, before anything takes time."""
    counts = ("micro_batch_size", "steps", "warmup", "blocks", "rounds", "num_samples")
    positive = (*counts, "devices_per_node", "intra_node_gb_per_sec", "inter_node_gbit_per_sec")
    lists = ("processes", "predict_devices")
    given = [(name, getattr(config, name)) for name in positive]
    given += [(name, count) for name in lists for count in getattr(config, name)]
    if config.images_per_sec != 0:
        given.append(("images_per_sec", config.images_per_sec))
    for name, value in given:
        if not _LEAST <= value <= _MOST:  # nor is nan
            wanted = f"a number from {_LEAST:g} to {_MOST:g}"
            raise UserError(f"--{name.replace('_', '-')}", f"{value}", wanted=wanted)
    if not config.shardings:
        raise UserError("--shardings", "names nothing")
    if not config.processes and not config.images_per_sec:
        raise UserError(
            "--processes",
            "names nothing, and there is no speed to predict from",
            remedy="--images-per-sec, of one device",
        )
    preset(config.preset)


def count_parameters(name: str) -> int:
    """Of a preset's U-Net, built on no device."""
    import torch
    from diffusers import UNet2DConditionModel

    from train.unet import load_unet_config

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(load_unet_config(preset(name).unet))
    return sum(parameter.numel() for parameter in unet.parameters())


def _notes(load: float, *, on_gpu: bool) -> list[str]:
    """What the figures must not be read without."""
    notes = [] if on_gpu else [_CPU_NOTE]
    if load > _IDLE_LOAD * num_usable_cpus():
        notes.append(f"the machine was busy with other work before: load average {load:.1f}")
    return notes


# What comes of it ---------------------------------------------------------------------------------


def _talked(row: Row) -> bool:
    return bool(row.visits) and row.num_processes > 1


def _counted(row: Row) -> Json:
    """The payload of one step's collectives, as torch's operators got them."""
    return {
        "num_processes": row.num_processes,
        "sharding": row.sharding,
        "payload_bytes": row.visits[0]["payload_bytes"],
    }


def _all_reduces(rows: list[Row], num_bytes: int) -> list[Json]:
    """The all-reduce of all gradients, alone, by number of processes."""
    visits: dict[int, list[Json]] = {}
    for row in rows:
        if _talked(row):
            visits.setdefault(row.num_processes, []).extend(row.visits)
    return [_all_reduce(count, found, num_bytes) for count, found in visits.items()]


def _all_reduce(num_processes: int, visits: list[Json], num_bytes: int) -> Json:
    """Bus bandwidth is what each process sends a second."""
    samples = [second for visit in visits for second in visit["all_reduce_sec"]]
    sent = Payload(all_reduce=num_bytes).sent_bytes(num_processes)
    return {
        "num_processes": num_processes,
        "backend": visits[0]["backend"],
        "bytes": num_bytes,
        "samples": samples,
        "sec": spread(samples),
        "bus_bytes_per_sec": spread([sent / second for second in samples]),
    }


def _predict(config: ScalingConfig, payloads: dict[Sharding, Payload], rate: float) -> Json:
    """Rows for devices that are not here, and all that they rest on."""
    compute_sec, links = config.micro_batch_size / rate, config.links()
    rows = [
        {"sharding": sharding, **predict(count, compute_sec, payload, links)}
        for sharding, payload in payloads.items()
        for count in config.predict_devices
    ]
    return {
        "assumptions": {
            "images_per_sec": rate,
            "images_per_sec_is": "given" if config.images_per_sec else "measured here",
            "micro_batch": config.micro_batch_size,
            "compute_sec": compute_sec,
            **asdict(links),
            "model": list(ASSUMPTIONS),
        },
        "rows": rows,
        "published": published_efficiencies(),
    }


# For people ---------------------------------------------------------------------------------------


def print_table(document: dict[str, Any]) -> None:
    """The result for people."""
    env, protocol = document["environment"], document["protocol"]
    if document["rows"]:
        kind = "strong: one global batch" if protocol["strong"] else "weak: a batch per process"
        print(
            f"\nMEASURED on {env['device']}, torch {env['versions']['torch']}, threads per process "
            f"{document['threads_per_process']}; {kind}; medians over {protocol['rounds']} rounds "
            f"of {protocol['blocks']} blocks"
        )
        print(
            f"{'processes':>9}  {'':<7}{'batch':>6}{'img/s':>9}{'p10-p90':>16}{'efficiency':>12}"
            f"{'p10-p90':>12}{'data':>7}"
        )
    for row in document["rows"]:
        print(_measured_line(row))
    for note in document["notes"]:
        print(f"note: {note}")
    _print_communication(document["communication"])
    _print_prediction(document["predicted"])


def _measured_line(row: Json) -> str:
    name = f"{row['num_processes']:>9}  {row['sharding']:<7}{row['global_batch_size']:>6}"
    if row["not_measured"]:
        return f"{name}  {row['not_measured']}"
    speed, efficiency = row["images_per_sec"], row["efficiency"]
    speeds = f"{speed['p10']:.1f}-{speed['p90']:.1f}"
    efficiencies = f"{efficiency['p10']:.2f}-{efficiency['p90']:.2f}"
    return (
        f"{name}{speed['median']:>9.1f}{speeds:>16}{efficiency['median']:>12.2f}"
        f"{efficiencies:>12}{row['data_wait_frac']['median']:>7.1%}"
    )


def _print_communication(found: Json) -> None:
    gradient_mb = found["gradient_bytes"] / 1e6
    print(f"\n{found['num_parameters']:,} parameters, {gradient_mb:,.1f} MB of gradients")
    for sharding, payload in found["payload_bytes"].items():
        shown = [f"{name} {size / 1e6:,.1f} MB" for name, size in payload.items() if size]
        print(f"  {sharding}: a step takes {', '.join(shown)}")
    for row in found["counted"]:
        counted_mb = sum(row["payload_bytes"].values()) / 1e6
        print(
            f"  {row['sharding']}, {row['num_processes']} processes: {counted_mb:,.1f} MB counted "
            f"in the collectives of a step"
        )
    for row in found["all_reduce"]:
        speed = row["bus_bytes_per_sec"]
        print(
            f"  {row['num_processes']} processes ({row['backend']}): gradients all-reduced in "
            f"{row['sec']['median'] * 1e3:.1f} ms, each sends {speed['median'] / 1e9:.2f} GB/s "
            f"({speed['p10'] / 1e9:.2f}-{speed['p90'] / 1e9:.2f})"
        )


def _print_prediction(predicted: Json) -> None:
    given = predicted["assumptions"]
    print(
        f"\nPREDICTED, not measured: from {given['images_per_sec']:.4g} img/s of one device "
        f"({given['images_per_sec_is']}) at batch {given['micro_batch']}; "
        f"{given['devices_per_node']} devices a node at "
        f"{given['intra_node_bytes_per_sec'] / 1e9:g} GB/s each, "
        f"{given['inter_node_bytes_per_sec'] / 1e9:g} GB/s a node"
    )
    print(f"{'devices':>9}  {'':<7}{'efficiency':>11}{'no overlap':>12}{'sent MB':>11}{'ms':>9}")
    for row in predicted["rows"]:
        sent_mb, communication_ms = (
            row["sent_bytes_per_device"] / 1e6,
            row["communication_sec"] * 1e3,
        )
        print(
            f"{row['num_devices']:>9}  {row['sharding']:<7}{row['efficiency']:>11.3f}"
            f"{row['efficiency_without_overlap']:>12.3f}{sent_mb:>11,.1f}{communication_ms:>9.2f}"
        )
    for assumption in given["model"]:
        print(f"  assumed: {assumption}")
    print(
        "An upper bound. Published by others, against their own smallest number of devices (not "
        "all kept the batch per device):"
    )
    for row in predicted["published"]:
        print(f"{row['num_devices']:>9}  {row['efficiency']:>5.2f}  {row['source']}")
