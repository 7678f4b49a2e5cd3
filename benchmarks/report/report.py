"""Runs and results as one HTML page that needs no network, no script and no other file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.report.number_format import counted
from benchmarks.report.page import build_sections, encodable, render
from benchmarks.report.sources import find_sources
from benchmarks.result import output_file
from shards.errors import UserError
from shards.storage import write_text_whole


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Turn runs and results into one HTML page."""

    results: str = "benchmarks/results"
    """Folder of results: the JSON documents of the other commands."""
    runs: str = "runs"
    """Folder of training runs, or one run."""
    out: str = "report.html"
    """File of the page."""


def run(config: ReportConfig) -> None:
    """Write the page, and say what is in it and what is not.

    Raises:
        UserError: there is nothing at all to show, or `out` names no file.
    """
    out = output_file(config.out)
    sources = find_sources(Path(config.results), Path(config.runs))
    for folder, default in (
        (config.results, ReportConfig.results),
        (config.runs, ReportConfig.runs),
    ):
        if folder != default and not Path(folder).is_dir():
            sources.leave_out(Path(folder), "no such folder")
    sections = build_sections(sources)
    for path, reason in sources.left_out:
        print(encodable(f"left out: {path}: {reason}"))
    if not sections:
        raise UserError(
            f"{config.results}, {config.runs}",
            "nothing that can be shown",
            wanted="results or runs",
            remedy="make them: `make bench`, `python -m benchmarks train-step`, `make demo` or "
            "`make train`",
        )
    page = render(sections, sources)
    write_text_whole(out, page)
    print(
        f"written to {config.out} ({len(page.encode()) / 1e6:.1f} MB): "
        f"{counted(len(sources.documents), 'result')}, {counted(len(sources.runs), 'run')}, "
        f"{len(sources.left_out)} left out"
    )
