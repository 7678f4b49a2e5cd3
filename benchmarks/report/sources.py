"""The results and runs that a report is made of, and what had to be left out of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report.fields import Fields, check_values, is_number
from benchmarks.result import read_result
from shards.errors import UserError
from train.metrics import read_metrics

METRICS, CONFIG, SCENES, BENCH = "metrics.jsonl", "config.json", "scene_accuracy.json", "bench.json"


@dataclass(frozen=True, kw_only=True)
class Document:
    """One result.

    Args:
        path: its file.
        theme: what was measured.
        fields: its content.
        text: the file as it is.
    """

    path: Path
    theme: str
    fields: Fields
    text: str

    @property
    def device(self) -> str:
        """`AMD EPYC, 2 CPUs`, `2 x NVIDIA H200`."""
        env = self.fields.fields("environment")
        name, count = env.shown("device", default="unknown device"), env.find("num_devices")
        if count:
            return name if count == 1 else f"{count} x {name}"
        return f"{name}, {env.shown('num_cpus', default='?')} CPUs"

    @property
    def rank(self) -> tuple[float, str, str]:
        """Its place among others of its theme: by the size of the U-Net, then by the machine."""
        flops = self.fields.find("flops_per_image", "unet")
        hardware = self.fields.fields("environment").shown("hardware", default="")
        return float(flops) if is_number(flops) else 0.0, hardware, str(self.path)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run, as far as it can be read.

    Args:
        path: its folder.
        rows: of metrics.jsonl, in order.
        config: of config.json.
        scenes: of scene_accuracy.json.
        grids: title and file of its pictures.
    """

    path: Path
    rows: list[dict[str, float]]
    config: Fields | None
    scenes: Fields | None
    grids: list[tuple[str, Path]]


@dataclass(frozen=True, kw_only=True)
class Sources:
    """All that was found.

    Attributes:
        documents: results, by file name.
        runs: by folder.
        left_out: file or folder, and why it is not shown, or not whole.
    """

    documents: list[Document] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def leave_out(self, path: Path, reason: UserError | str, part: str = "") -> None:
        """Note what is not shown.

        Args:
            path: file or folder.
            reason: why; where it names the file again, it is cut to the rest.
            part: of the page, where only that lacks it.
        """
        shown = str(reason).removeprefix(f"{path}: ")
        self.left_out.append((str(path), f"not under “{part}”: {shown}" if part else shown))


def find_sources(results: Path, runs: Path) -> Sources:
    """Read every result of one folder and every run of the other, with the results within.

    Args:
        results: folder of JSON documents.
        runs: folder of runs, or one run.
    """
    sources = Sources()
    for folder, glob in ((results, "*.json"), (runs, f"*/{BENCH}")):
        for path in sorted(folder.glob(glob)):
            _read_document(path, sources)
    folders = [runs] if (runs / METRICS).exists() else sorted(runs.glob("*/"))
    if runs in folders and (runs / BENCH).exists():
        _read_document(runs / BENCH, sources)
    for path in folders:
        _read_run(path, sources)
    return sources


def _read_document(path: Path, sources: Sources) -> None:
    try:
        document = read_result(path)
        check_values(document, str(path))
        fields = Fields(document, str(path))
        fields.fields("environment"), fields.fields("protocol")
        theme, text = fields.text("theme"), path.read_text(encoding="utf-8")
    except UserError as error:
        sources.leave_out(path, error)
    else:
        sources.documents.append(Document(path=path, theme=theme, fields=fields, text=text))


# Runs ---------------------------------------------------------------------------------------------


def _read_run(path: Path, sources: Sources) -> None:
    if not (path / METRICS).exists() and not (path / CONFIG).exists():
        sources.leave_out(path, f"no run: has neither {METRICS} nor {CONFIG}")
        return
    if not (path / CONFIG).exists():
        sources.leave_out(path / CONFIG, "not there; the run is shown without its settings")
    sources.runs.append(
        Run(
            path=path,
            rows=_read_rows(path / METRICS, sources),
            config=_read_fields(path / CONFIG, sources),
            scenes=_read_fields(path / SCENES, sources),
            grids=_find_grids(path),
        )
    )


def _read_rows(path: Path, sources: Sources) -> list[dict[str, float]]:
    if not path.exists():
        sources.leave_out(path, "not there; the run is shown without curves")
        return []
    try:
        rows = read_metrics(path)
        _check_numbers(path, rows)
    except (UserError, OSError, RecursionError) as error:
        sources.leave_out(path, str(error))
        return []
    if not rows:
        sources.leave_out(path, "has no whole line; the run is shown without curves")
    elif not path.read_bytes().endswith(b"\n"):
        sources.leave_out(path, "its last line was cut short; the run is shown without that line")
    return rows


def _check_numbers(path: Path, rows: list[dict[str, Any]]) -> None:
    for number, row in enumerate(rows, start=1):
        check_values(row, f"{path}: line {number}")
        for name, value in row.items():
            if not isinstance(value, int | float):
                raise UserError(path, f"line {number}: {name} is no number")


def _read_fields(path: Path, sources: Sources) -> Fields | None:
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        check_values(document, str(path))
        return Fields(document, str(path))
    except (UserError, OSError, ValueError, RecursionError) as error:
        sources.leave_out(path, str(error))
        return None


def _find_grids(run: Path) -> list[tuple[str, Path]]:
    """The samples of the last step, from the weights and from their average; held-out prompts."""
    grids = []
    drawn = {path: path.stem.removesuffix("-ema") for path in sorted(run.glob("samples/*.png"))}
    steps = {path: int(step) for path, step in drawn.items() if step.isdecimal()}
    if steps:
        last = max(steps.values())
        for path in sorted((p for p in steps if steps[p] == last), key=lambda p: len(p.stem)):
            kind = "averaged weights (EMA)" if path.stem.endswith("-ema") else "raw weights"
            grids.append((f"Samples at step {last:,}, {kind}", path))
    elif (run / "samples.png").exists():
        grids.append(("Samples at the end", run / "samples.png"))
    held_out = [path for path in (run / "held_out.png", run / "grid.png") if path.exists()]
    return grids + [("Held-out prompts", path) for path in held_out[:1]]
