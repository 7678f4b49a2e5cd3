"""What a page is made of; the template knows how each looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias

from benchmarks.report.fields import Spread

BarKind = Literal["ours", "other", "roof", "predicted"]
NOTHING = "–"


@dataclass(frozen=True, kw_only=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One figure that counts."""

    figure: str
    label: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Figures side by side."""

    kind: ClassVar[str] = "tiles"
    tiles: Sequence[Tile]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar.

    Args:
        label: what it is.
        value: its length, and its whisker where p10 and p90 differ.
        text: the value for people.
        note: a line below the label.
        kind: `roof` is what others are held against; `predicted` was not measured.
    """

    label: str
    value: Spread
    text: str
    note: str = ""
    kind: BarKind = "ours"


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Bars from zero on one scale.

    Args:
        title: what is measured, and its unit.
        bars: from top to bottom.
        mark: a value to compare with, drawn through all bars.
        mark_text: what that is.
    """

    kind: ClassVar[str] = "bars"
    title: str
    bars: Sequence[Bar]
    mark: float | None = None
    mark_text: str = ""

    def percent(self, value: float) -> str:
        """Where a value lies on the scale, as CSS."""
        largest = max([self.mark or 0.0, *(bar.value.p90 for bar in self.bars)]) or 1.0
        return f"{min(100.0, max(0.0, 100 * value / largest)):.2f}%"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A share of a stack."""

    name: str
    sec: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Parts one after the other, and what was measured for them together.

    Args:
        label: what it is.
        parts: from left to right.
        text: the sum and the whole for people.
        whole_sec: the whole as measured, drawn as a mark.
    """

    label: str
    parts: Sequence[Part]
    text: str
    whole_sec: float | None = None


@dataclass(frozen=True, kw_only=True)
class Stacks:
    """Stacks on one scale.

    Args:
        title: what is measured.
        names: of all parts; a part's number is its place here.
        stacks: from top to bottom.
    """

    kind: ClassVar[str] = "stacks"
    title: str
    names: Sequence[str]
    stacks: Sequence[Stack]

    def percent(self, value_sec: float) -> str:
        """Where a time lies on the scale, as CSS."""
        sums = (sum(part.sec for part in stack.parts) for stack in self.stacks)
        longest = max([*sums, *(stack.whole_sec or 0.0 for stack in self.stacks)]) or 1.0
        return f"{min(100.0, max(0.0, 100 * value_sec / longest)):.2f}%"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose first column names its rows.

    Args:
        title: its caption.
        header: a name for each column.
        rows: of texts.
    """

    kind: ClassVar[str] = "table"
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers, and stand on the right."""
        return [
            column > 0 and all(row[column][:1] in f"0123456789.-${NOTHING}" for row in self.rows)
            for column in range(len(self.header))
        ]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Names and what they stand for."""

    kind: ClassVar[str] = "facts"
    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Lines over an axis.

    Args:
        title: above it.
        svg: the drawing: markup of our own making.
        alt: what it shows, in words.
    """

    kind: ClassVar[str] = "curve"
    title: str
    svg: str
    alt: str


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image, whole in its address.

    Args:
        title: above it.
        source: data URI.
        alt: what it shows, in words.
        width: pixels.
        height: pixels.
    """

    kind: ClassVar[str] = "picture"
    title: str
    source: str
    alt: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Curves or pictures side by side where there is room."""

    kind: ClassVar[str] = "gallery"
    items: Sequence[Curve | Picture]


@dataclass(frozen=True, kw_only=True)
class Details:
    """Text or blocks that are shown on demand."""

    kind: ClassVar[str] = "details"
    summary: str
    blocks: Sequence[Block] = ()
    raw: str = ""


Block: TypeAlias = Text | Tiles | Bars | Stacks | Table | Facts | Gallery | Details


@dataclass(frozen=True, kw_only=True)
class Card:
    """What there is to say of one result or run."""

    title: str
    blocks: Sequence[Block]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Cards of one kind.

    Args:
        anchor: its address within the page.
        title: its heading.
        says: what it shows, and what it does not.
        cards: one for each result or run.
    """

    anchor: str
    title: str
    says: str
    cards: Sequence[Card] = field(default_factory=list)
