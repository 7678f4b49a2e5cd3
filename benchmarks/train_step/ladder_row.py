"""A row of the ladder: what a rung is, what was found, what became of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from benchmarks.result import gpu_state, spread
from benchmarks.train_step.case import GPU_FIELDS, Case
from benchmarks.train_step.runner import Runner
from shards.column import Json
from train.interval import Row

Verdict = Literal["base", "kept", "slower", "not told apart", "faster", "measured", "not measured"]


@dataclass
class RungRow:
    """One rung.

    Args:
        name: of the rung.
        case: what it runs.
        switch: see `Rung`.

    Attributes:
        verdict: `faster` is that of an ablation, on which none stands.
        reason: why it was not measured.
        is_failure: it ran, but not as it should.
        blocks: rows of metrics of each timed block.
        before: the rung that it is compared with, and that one's blocks beside its own.
        is_interleaved: the blocks of both took turns; else one ran after the other.
        checks: what `benchmarks.train_step.checks` found.
        facts: of the runner: kernels, plan, memory, setup, clocks.
    """

    name: str
    case: Case
    switch: str = ""
    verdict: Verdict = "not measured"
    reason: str = ""
    is_failure: bool = False
    blocks: list[Row] = field(default_factory=list)
    before: str = ""
    before_blocks: list[Row] = field(default_factory=list)
    is_interleaved: bool = True
    checks: Json = field(default_factory=dict)
    facts: Json = field(default_factory=dict)

    @property
    def is_measured(self) -> bool:
        """Whether its figures count."""
        return bool(self.blocks) and not self.reason

    @property
    def images_per_sec(self) -> list[float]:
        """Of its blocks."""
        return _speeds(self.blocks)

    @property
    def ratios(self) -> list[float]:
        """How many times as fast as the rung before, block by block."""
        before = _speeds(self.before_blocks)
        return [a / b for a, b in zip(self.images_per_sec, before, strict=True)] if before else []

    @property
    def speed(self) -> float:
        """Median images per second."""
        return spread(self.images_per_sec)["median"]

    def note(self, runner: Runner) -> None:
        """Take over what a runner says of itself, right after its blocks."""
        arm = runner.arm
        self.facts = {
            "device": arm.device.type,
            "ran": arm.attention,
            "plan": arm.plan,
            "setup_sec": runner.setup_sec,
            "peak_mem_gib": runner.peak_mem_gib,
            "block_steps": runner.block_steps,
            "flops_per_image": arm.flops_per_image,
            "matmul_flops_per_sec": arm.matmul_flops_per_sec,
            "gpu": gpu_state(*GPU_FIELDS),
        }

    def to_json(self, plain_speed: float | None = None) -> Json:
        """All of it, with medians and spreads.

        Args:
            plain_speed: images per second of the plain loop at its best.
        """
        document: Json = {
            "rung": self.name,
            **asdict(self.case),
            "verdict": self.verdict,
            "not_measured": self.reason or None,
            "failed": self.is_failure,
            "checks": self.checks,
            **self.facts,
        }
        if not self.is_measured:
            return document
        per_flop = self.facts["flops_per_image"] / self.facts["matmul_flops_per_sec"]
        document |= {
            "images_per_sec": spread(self.images_per_sec),
            "mfu": spread([speed * per_flop for speed in self.images_per_sec]),
            "data_wait_frac": spread([block["perf/data_wait_frac"] for block in self.blocks]),
            "blocks": self.blocks,
        }
        if plain_speed:
            document["over_plain"] = spread([s / plain_speed for s in self.images_per_sec])
        if self.ratios:
            document |= {
                "before": self.before,
                "before_blocks": self.before_blocks,
                "interleaved": self.is_interleaved,
                "ratio": spread(self.ratios),
                "ratios": self.ratios,
            }
        return document


def judge(row: RungRow, *, is_ablation: bool) -> Verdict:
    """Whether a rung pays: it does if nine in ten of its blocks were faster than those before."""
    if not row.ratios:
        return "base"
    ratio = spread(row.ratios)
    if ratio["p10"] > 1:
        return "faster" if is_ablation else "kept"
    return "slower" if ratio["p90"] < 1 else "not told apart"


def _speeds(blocks: list[Row]) -> list[float]:
    return [block["perf/images_per_sec"] for block in blocks]
