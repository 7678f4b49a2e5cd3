"""Speeds that were measured: what results of this and other machines say of the planned phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.planner.sources import Source
from benchmarks.planner.typed_values import LARGEST, SMALLEST
from benchmarks.result import read_result, spread
from shards.errors import UserError
from train.presets import PRESETS

_SHARDING = "none"  # plain data parallelism
_MOST_SPREAD = 1.5  # 90th over 10th percentile of the blocks: beyond it a median says little


@dataclass(frozen=True)
class Speed:
    """One measured figure.

    Args:
        resolution: of its phase.
        value: images per second of one device, or a ratio of times.
        hardware: as results are named.
        file: the result's name.
        source: what was measured, where, in which file.
        caveat: what speaks against it.
    """

    resolution: int
    value: float
    hardware: str
    file: str
    source: str
    caveat: str = ""


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
        refused: why others cannot be used, file by file.
    """

    offline: list[Speed] = field(default_factory=list)
    factors: dict[str, list[Speed]] = field(default_factory=lambda: {"online": [], "ids": []})
    encode: list[Speed] = field(default_factory=list)
    efficiency: dict[int, float] = field(default_factory=dict)
    efficiency_file: str = ""
    efficiency_source: Source | None = None
    unused: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    @property
    def speeds(self) -> tuple[list[Speed], ...]:
        """All lists of figures."""
        return (self.offline, *self.factors.values(), self.encode)

    @property
    def files(self) -> set[str]:
        """Names of those that any of it is from."""
        named = {speed.file for found in self.speeds for speed in found}
        return named | ({self.efficiency_file} if self.efficiency_file else set())

    def add(self, other: Measured) -> None:
        """Take over what another result says."""
        for found, more in zip(self.speeds, other.speeds, strict=True):
            found += more
        if other.efficiency_file:
            self.efficiency |= other.efficiency
            self.efficiency_file = other.efficiency_file
            self.efficiency_source = other.efficiency_source


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
        UserError: files of which some are no results and none is of use, or speeds of several
            machines.
    """
    measured, read = Measured(), []
    for path in map(Path, paths):
        try:
            measured.add(_read(path, unet))
            read.append(path.name)
        except UserError as error:
            measured.refused.append(str(error))
    for found in measured.speeds:
        found[:] = [speed for speed in found if speed.resolution in resolutions]
    if measured.refused and not measured.files:
        reasons = [*measured.refused, *(f"{name}: nothing for this job" for name in read)]
        raise UserError("--results", f"none can be used: {'; '.join(reasons)}")
    _choose(measured, hardware)
    measured.unused = [name for name in read if name not in measured.files]
    return measured


def _read(path: Path, unet: str) -> Measured:
    """What one file says; nothing of it where a part is damaged."""
    document, found = read_result(path), Measured()
    try:
        _take(document, path.name, unet, found)
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        wanted = f"a result of {document['theme']} of this version"
        raise UserError(path, f"cannot be read ({error!r})", wanted=wanted) from error
    return found


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
    for arm in measured.factors.keys() & arms.keys():
        pairs = zip(arms[arm]["sec_per_step"], arms["offline"]["sec_per_step"], strict=True)
        ratios = spread([above / below for above, below in pairs])
        found = _speed(document, name, resolution, ratios["median"], f"{what}, block by block")
        if ratios["p90"] > _MOST_SPREAD * ratios["p10"]:
            between = f"{ratios['p10']:.3g} to {ratios['p90']:.3g} (p10 to p90)"
            caveat = f"{name}: the measurement was noisy, {arm} over offline is {between}"
            found = replace(found, caveat=caveat)
        measured.factors[arm].append(found)
    encode = document["stage1_images_per_sec"]
    measured.encode.append(_speed(document, name, resolution, encode, f"{what}, stage 1"))


def _take_scaling(document: dict[str, Any], name: str, measured: Measured) -> None:
    """Of GPUs alone: processes on one CPU share its cores, and its speed predicts nothing else."""
    on_gpus = bool(document["environment"]["num_devices"])
    prediction, predicted, of_gpus = document["predicted"], {}, {}
    if on_gpus or prediction["assumptions"]["images_per_sec_is"] == "given":
        rows = [row for row in prediction["rows"] if row["sharding"] == _SHARDING]
        # The other prediction hides all communication and is an upper bound.
        predicted = {row["num_devices"]: row["efficiency_without_overlap"] for row in rows}
    if on_gpus:
        of_gpus = {
            row["num_processes"]: row["efficiency"]["median"]
            for row in document["rows"]
            if row["sharding"] == _SHARDING and row["not_measured"] is None
        }
    found = {**predicted, **of_gpus}
    if not all(SMALLEST <= share <= LARGEST for share in found.values()):
        raise UserError(name, f"efficiencies {list(found.values())}", wanted="numbers above 0")
    if found:
        kind = "measured" if max(found) in of_gpus else "predicted"
        words = [f"{name}: scaling of {document['protocol']['preset']}"]
        if of_gpus:
            words.append(f"measured on {len(of_gpus)} numbers of GPUs")
        if predicted.keys() - of_gpus.keys():
            words.append("predicted with no communication hidden and its latency not counted")
        measured.efficiency |= found
        measured.efficiency_file = name
        measured.efficiency_source = Source(kind, ", ".join(words))


def _speed(document: dict[str, Any], name: str, resolution: int, value: float, what: str) -> Speed:
    if not SMALLEST <= value <= LARGEST:
        raise UserError(name, f"{value} for {what}", wanted="a number above 0")
    env = document["environment"]
    where = f"one {env['device']}" if env["num_devices"] else f"{env['device']} (a CPU)"
    words = f"{name}: {what}, {where}, commit {env['commit']}"
    return Speed(resolution, value, env["hardware"], name, words)


def _choose(measured: Measured, hardware: str) -> None:
    """Keep what is of one machine; first the fastest, and the least gain."""
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
