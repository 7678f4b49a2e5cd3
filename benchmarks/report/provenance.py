"""Where every figure comes from: command, commit, machine, versions, and the raw document."""

from __future__ import annotations

from benchmarks.report.blocks import NOTHING, Block, Card, Details, Facts, Table, Text
from benchmarks.report.fields import Fields, is_number
from benchmarks.report.number_format import quantity, three_digits
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
_BUSY = (
    "(!): more ran or waited to run than there are CPUs, in the minute before the result was "
    "written. The benchmark's own threads count as well; what else ran slowed it down."
)


def provenance_card(documents: list[Document]) -> Card:
    """A row for every result, and all of it on demand."""
    table = Table(
        title="Every result on this page",
        header=["result", "date", "commit", "device", "load", "clocks and power", "command"],
        rows=[_row(document) for document in documents],
    )
    blocks: list[Block] = [table]
    if any("(!)" in cell for row in table.rows for cell in row):
        blocks.append(Text(text=_BUSY))
    return Card(title="Results", blocks=[*blocks, *(_details(each) for each in documents)])


def _row(document: Document) -> list[str]:
    env = document.fields.fields("environment")
    commit = env.shown("commit", default="unknown")
    return [
        document.path.name if document.path.name != "bench.json" else str(document.path),
        env.shown("date", default=NOTHING),
        f"{commit}, with changes" if env.find("dirty") else commit,
        document.device,
        _load(env),
        _clocks(env),
        env.shown("command", default=NOTHING),
    ]


def _load(env: Fields) -> str:
    """Of the minute before the result was written: the benchmark's own work is in it."""
    load, num_cpus = env.find("load_average"), env.find("num_cpus")
    if not is_number(load):
        return NOTHING
    is_busy = is_number(num_cpus) and load > num_cpus
    return three_digits(load) + (f" (!) on {num_cpus} CPUs" if is_busy else "")


def _clocks(env: Fields) -> str:
    told = {label: env.find("gpu", name) for name, label in _CLOCKS.items()}
    shown = [f"{label} {value}" for label, value in told.items() if value]
    if not shown and env.find("cpu_mhz"):
        shown = [f"CPU {quantity('', env.find('cpu_mhz'))} MHz"]
    return ", ".join(shown) or NOTHING


def _details(document: Document) -> Details:
    env = document.fields.fields("environment")
    facts = [(name, str(env.find(name))) for name in _MACHINE if env.find(name) is not None]
    facts += [("load average", _load(env))]
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
