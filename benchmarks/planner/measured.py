"""Speeds that were measured: what results of this and other machines say of the planned phases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.planner.sources import Source
from benchmarks.result import read_result
from shards.errors import UserError
from train.presets import PRESETS

_SHARDING = "none"  # plain data parallelism


@dataclass(frozen=True)
class Speed:
    """One measured figure.

    Args:
        resolution: of its phase.
        value: images per second of one device, or a ratio of times.
        hardware: as results are named.
        file: the result's name.
        source: what was measured, where, in which file.
    """

    resolution: int
    value: float
    hardware: str
    file: str
    source: str


@dataclass
class Measured:
    """What results say of the planned phases.

    Attributes:
        offline: images per second from latents.
        factors: times over that of an offline step, by arm.
        encode: images per second of stage 1.
        efficiency: share of a GPU's speed that is left, by number of GPUs.
        efficiency_file: where that is from,
        efficiency_source: and in words.
        unused: files that have nothing for this job.
    """

    offline: list[Speed] = field(default_factory=list)
    factors: dict[str, list[Speed]] = field(default_factory=lambda: {"online": [], "ids": []})
    encode: list[Speed] = field(default_factory=list)
    efficiency: dict[int, float] = field(default_factory=dict)
    efficiency_file: str = ""
    efficiency_source: Source | None = None
    unused: list[str] = field(default_factory=list)

    @property
    def speeds(self) -> tuple[list[Speed], ...]:
        """All lists of figures."""
        return (self.offline, *self.factors.values(), self.encode)


def read_measured(
    paths: Sequence[str], unet: str, resolutions: Sequence[int], hardware: str
) -> Measured:
    """Read results.

    Args:
        paths: of their files.
        unet: speeds of other U-Nets are left out,
        resolutions: and those of other resolutions.
        hardware: and those of other hardware; empty: there must not be several.

    Raises:
        UserError: a file that is no result, or speeds of several machines.
    """
    measured = Measured()
    for path in map(Path, paths):
        document = read_result(path)
        try:
            _take(document, path.name, unet, measured)
        except (AttributeError, KeyError, TypeError) as error:
            wanted = f"a result of {document['theme']} of this version"
            raise UserError(path, f"cannot be read ({error!r})", wanted=wanted) from error
    _choose(measured, resolutions, hardware)
    used = {speed.file for found in measured.speeds for speed in found}
    used.add(measured.efficiency_file)
    measured.unused = [name for name in (Path(path).name for path in paths) if name not in used]
    return measured


def _take(document: dict[str, Any], name: str, unet: str, measured: Measured) -> None:
    if document["theme"] == "train-step":
        _take_train_step(document, name, unet, measured)
    elif document["theme"] == "online-offline" and _is_of(document["preset"], unet):
        _take_arms(document, name, measured)
    elif document["theme"] == "scaling" and _is_of(document["protocol"]["preset"], unet):
        _take_scaling(document, name, measured)


def _is_of(preset: str, unet: str) -> bool:
    return preset in PRESETS and PRESETS[preset].unet == unet


def _take_train_step(document: dict[str, Any], name: str, unet: str, measured: Measured) -> None:
    """Rows of our loop; of a preset that has some with a moving average, those alone."""
    rows = [
        row
        for row in document["rows"]
        if row["loop"] == "latentmill"
        and row["not_measured"] is None
        and _is_of(row["preset"], unet)
    ]
    averaged = {row["preset"] for row in rows if row["ema"] == "on"}
    for row in (row for row in rows if row["ema"] == "on" or row["preset"] not in averaged):
        what = f"{row['preset']}, micro-batch {row['micro_batch']}, {row['precision']}"
        measured.offline.append(
            _speed(
                document,
                name,
                PRESETS[row["preset"]].resolution,
                row["images_per_sec"]["median"],
                f"train-step {what}, EMA {row['ema']}",
            )
        )


def _take_arms(document: dict[str, Any], name: str, measured: Measured) -> None:
    arms, resolution = document["arms"], document["resolution"]
    if "offline" not in arms:
        return
    what = f"online-offline {document['preset']}"
    offline = arms["offline"]["images_per_sec"]["median"]
    measured.offline.append(_speed(document, name, resolution, offline, what))
    if "online" in arms:
        factor = document["offline_speedup"]["median"]
        found = _speed(document, name, resolution, factor, f"{what}, block by block")
        measured.factors["online"].append(found)
    if "ids" in arms:
        factor = offline / arms["ids"]["images_per_sec"]["median"]
        found = _speed(document, name, resolution, factor, f"{what}, of medians")
        measured.factors["ids"].append(found)
    encode = document["stage1_images_per_sec"]
    measured.encode.append(_speed(document, name, resolution, encode, f"{what}, stage 1"))


def _take_scaling(document: dict[str, Any], name: str, measured: Measured) -> None:
    """Of GPUs alone: processes on one CPU share its cores, and its speed predicts nothing else."""
    on_gpus = bool(document["environment"]["num_devices"])
    predicted, found = document["predicted"], {}
    if on_gpus or predicted["assumptions"]["images_per_sec_is"] == "given":
        rows = [row for row in predicted["rows"] if row["sharding"] == _SHARDING]
        found = {row["num_devices"]: row["efficiency"] for row in rows}
    source = Source("predicted", f"{name}: scaling of {document['protocol']['preset']}")
    if on_gpus:
        rows = [row for row in document["rows"] if row["sharding"] == _SHARDING]
        of_gpus = {
            row["num_processes"]: row["efficiency"]["median"]
            for row in rows
            if row["not_measured"] is None
        }
        found |= of_gpus
        kind = "measured" if max(found, default=0) in of_gpus else "predicted"
        source = Source(kind, f"{source.words}, measured on {len(of_gpus)} numbers of GPUs")
    if not all(0 < share < math.inf for share in found.values()):
        raise UserError(name, f"efficiencies {list(found.values())}", wanted="numbers above 0")
    if found:
        measured.efficiency |= found
        measured.efficiency_file, measured.efficiency_source = name, source


def _speed(document: dict[str, Any], name: str, resolution: int, value: float, what: str) -> Speed:
    if not 0 < value < math.inf:
        raise UserError(name, f"{value} for {what}", wanted="a number above 0")
    env = document["environment"]
    where = f"one {env['device']}" if env["num_devices"] else f"{env['device']} (a CPU)"
    words = f"{name}: {what}, {where}, commit {env['commit']}"
    return Speed(resolution, value, env["hardware"], name, words)


def _choose(measured: Measured, resolutions: Sequence[int], hardware: str) -> None:
    """Keep what is of these phases and of one machine; first the fastest, and the least gain."""
    for found in measured.speeds:
        found[:] = [speed for speed in found if speed.resolution in resolutions]
    known = sorted({speed.hardware for found in measured.speeds for speed in found})
    if hardware and hardware not in known:
        wanted = f"one of {', '.join(known)}" if known else "results of this job's U-Net and sizes"
        raise UserError("--hardware", f"nothing measured on {hardware!r}", wanted=wanted)
    if len(known) > 1 and not hardware:
        named = f"--hardware {known[0]}"
        raise UserError("--results", f"are of {' and of '.join(known)}", wanted=named)
    for found in measured.speeds:
        found[:] = [speed for speed in found if speed.hardware == (hardware or speed.hardware)]
    for found in (measured.offline, measured.encode):
        found.sort(key=lambda speed: -speed.value)
    for found in measured.factors.values():
        found.sort(key=lambda speed: speed.value)
