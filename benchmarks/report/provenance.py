"""Where every figure comes from: command, commit, machine, versions, and the raw document."""

from __future__ import annotations

from benchmarks.report.blocks import NOTHING, Block, Card, Details, Facts, Table
from benchmarks.report.fields import Fields
from benchmarks.report.number_format import quantity
from benchmarks.report.sources import Document

_CLOCKS = {
    "clocks.sm": "SM",
    "clocks.mem": "memory",
    "power.draw": "power",
    "power.limit": "power limit",
    "temperature.gpu": "°C",
}
_MACHINE = (
    *("device", "num_devices", "cpu", "num_cpus", "cpu_mhz", "memory_gib", "torch_threads"),
    *("platform", "python", "cuda", "cudnn"),
)


def provenance_card(documents: list[Document]) -> Card:
    """A row for every result, and all of it on demand."""
    table = Table(
        title="Every result on this page",
        header=["result", "date", "commit", "device", "clocks and power", "command"],
        rows=[_row(document) for document in documents],
    )
    return Card(title="Results", blocks=[table, *(_details(each) for each in documents)])


def _row(document: Document) -> list[str]:
    env = document.fields.fields("environment")
    commit = env.shown("commit", default="unknown")
    return [
        document.path.name if document.path.name != "bench.json" else str(document.path),
        env.shown("date", default=NOTHING),
        f"{commit}, with changes" if env.find("dirty") else commit,
        document.device,
        _clocks(env),
        env.shown("command", default=NOTHING),
    ]


def _clocks(env: Fields) -> str:
    told = {label: env.find("gpu", name) for name, label in _CLOCKS.items()}
    shown = [f"{label} {value}" for label, value in told.items() if value]
    if not shown and env.find("cpu_mhz"):
        shown = [f"CPU {quantity('', env.find('cpu_mhz'))} MHz"]
    return ", ".join(shown) or NOTHING


def _details(document: Document) -> Details:
    env = document.fields.fields("environment")
    facts = [(name, str(env.find(name))) for name in _MACHINE if env.find(name) is not None]
    facts += [("clocks and power", _clocks(env)), ("versions", _pairs(env.find("versions")))]
    facts += [("protocol", _pairs(document.fields.find("protocol")))]
    blocks: list[Block] = [Facts(facts=facts)]
    return Details(
        summary=f"{document.path}: machine, versions, protocol, JSON",
        blocks=blocks,
        raw=document.text,
    )


def _pairs(values: object) -> str:
    if not isinstance(values, dict) or not values:
        return NOTHING
    return ", ".join(f"{name} {value}" for name, value in values.items())
