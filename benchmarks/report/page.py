"""The page: which card stands where, and the HTML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.report.arms import arms_card, headline_cards, totals_cards
from benchmarks.report.blocks import Card, Picture, Section
from benchmarks.report.data import loader_card, order_card, stage_one_card
from benchmarks.report.generic import generic_card
from benchmarks.report.latency import latency_card
from benchmarks.report.number_format import counted
from benchmarks.report.pictures import BUDGET_BYTES, load_picture
from benchmarks.report.provenance import provenance_card
from benchmarks.report.runs import run_card
from benchmarks.report.scaling import scaling_card
from benchmarks.report.sources import Document, Run, Sources
from benchmarks.report.step import step_cards
from shards.errors import UserError

_TEMPLATE = "report.html.jinja"

Draw = Callable[[Document], Card | list[Card]]
# Section, and what draws a result of which theme there. A theme may have several sections.
_SECTIONS: tuple[tuple[Section, dict[str, Draw]], ...] = (
    (
        Section(
            anchor="headline",
            title="Online against offline",
            says="How much faster training from stored latents is than running the VAE and the "
            "text encoder in every step: same U-Net, batch, optimizer, EMA and loop, the arms in "
            "turns, block by block. Encoding once is not counted here; it is under Total time.",
        ),
        {"online-offline": headline_cards},
    ),
    (
        Section(
            anchor="arms",
            title="The arms and their parts",
            says="Each arm differs from the others by its source of batches alone. The ceiling is "
            "the U-Net's step on batches that lie in memory. Parts are timed one by one and do "
            "not overlap here as they may within a step.",
        ),
        {"online-offline": arms_card},
    ),
    (
        Section(
            anchor="totals",
            title="Total time with stage 1",
            says="What is left of the gain when encoding is paid for: computed from the medians "
            "measured above and from the speed of stage 1, not run from end to end.",
        ),
        {"online-offline": totals_cards},
    ),
    (
        Section(
            anchor="train-step",
            title="The training step",
            says="One setting varied at a time, on latents of random numbers in full size through "
            "the real reader. It shows speed and memory, not the quality of what is learnt.",
        ),
        {"train-step": step_cards},
    ),
    (
        Section(
            anchor="scaling",
            title="Scaling",
            says="Several processes on one machine, measured; and what a model of the "
            "communication predicts for more devices. Hatched and outlined bars are predictions.",
        ),
        {"scaling": scaling_card},
    ),
    (
        Section(
            anchor="data",
            title="Loaders, stage 1, order",
            says="What feeds the training, each by itself: nothing is trained here. Loaders read "
            "from the page cache, so disks and networks are not part of it.",
        ),
        {"loader": loader_card, "precompute": stage_one_card, "order": order_card},
    ),
    (
        Section(
            anchor="latency",
            title="Latency",
            says="What a call of the pipeline takes, from prompts to pixels in the host's memory, "
            "the arms in turns; its parts are timed apart. Counts hold on any machine.",
        ),
        {"latency": latency_card},
    ),
    (
        Section(
            anchor="plan",
            title="Plan",
            says="The bill before the job, computed from a speed, prices and a dataset's size. "
            "Nothing of it was run.",
        ),
        {"plan": generic_card},
    ),
    (
        Section(
            anchor="machine",
            title="The machine",
            says="Versions, what works, and the speeds that every other figure is held against, "
            "measured for a few seconds each. Lists within rows are in the JSON alone.",
        ),
        {"env": generic_card},
    ),
)
_OTHER = Section(
    anchor="other",
    title="Other results",
    says="Results that have no form of their own here, as tables. Lists within their rows are in "
    "the JSON alone.",
)
_RUNS = Section(
    anchor="runs",
    title="Runs",
    says="Training runs on this machine: losses, speed, samples from the last step. The held-out "
    "loss is that of samples never trained on. One run is one seed.",
)
_PROVENANCE = Section(
    anchor="provenance",
    title="Provenance",
    says="Command, commit and machine of every result, and the document itself with its raw "
    "samples.",
)


def build_sections(sources: Sources) -> list[Section]:
    """All sections that have something to show; what cannot be drawn is noted in `sources`."""
    themes: set[str] = set().union(*(draws for _, draws in _SECTIONS))
    sections = []
    for section, draws in _SECTIONS:
        chosen = [document for document in sources.documents if document.theme in draws]
        sections.append(_filled(section, chosen, draws, sources))
    others = [document for document in sources.documents if document.theme not in themes]
    draws = {document.theme: generic_card for document in others}
    sections.append(_filled(_OTHER, others, draws, sources))
    sections.append(replace(_RUNS, cards=_run_cards(sources)))
    if sources.documents:
        ranked = sorted(sources.documents, key=lambda document: (document.theme, document.rank))
        sections.append(replace(_PROVENANCE, cards=[provenance_card(ranked)]))
    return [section for section in sections if section.cards]


def render(sections: list[Section], sources: Sources) -> str:
    """The HTML of a page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(_TEMPLATE).render(
        sections=sections,
        sources=sources,
        counted=counted,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )
    return encodable(page)


def encodable(text: str) -> str:
    """With `?` for what UTF-8 cannot hold: names of files are bytes of any kind."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _filled(
    section: Section, documents: list[Document], draws: dict[str, Draw], sources: Sources
) -> Section:
    cards: list[Card] = []
    for document in sorted(documents, key=lambda document: document.rank):
        try:
            drawn = draws[document.theme](document)
        except (UserError, OverflowError, RecursionError) as error:
            sources.leave_out(document.path, str(error), part=section.title)
        else:
            cards += drawn if isinstance(drawn, list) else [drawn]
    return replace(section, cards=cards)


def _run_cards(sources: Sources) -> list[Card]:
    num_grids = sum(len(run.grids) for run in sources.runs)
    max_bytes = BUDGET_BYTES // max(1, num_grids)
    cards = []
    for number, run in enumerate(sources.runs, start=1):
        pictures = _pictures(run, max_bytes, sources)
        try:
            cards.append(run_card(run, f"run-{number}", pictures))
        except (UserError, OverflowError, RecursionError) as error:
            sources.leave_out(run.path, str(error))
    return cards


def _pictures(run: Run, max_bytes: int, sources: Sources) -> list[Picture]:
    pictures = []
    for title, path in run.grids:
        alt = f"{title} of the run {run.path.name}: a grid of images with their prompts below"
        try:
            pictures.append(load_picture(path, title, alt, max_bytes))
        except UserError as error:
            sources.leave_out(path, error)
    return pictures
