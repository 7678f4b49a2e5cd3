"""What a plan rests on: each input, what kind of number it is, and where it is from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

PRESET = "preset"


@dataclass(frozen=True)
class Source:
    """Where a number is from.

    Args:
        kind: `given` by a flag, of the `preset`, `measured`, `predicted`, or `assumed`.
        words: the flag, the publication, the file and its hardware, or the reasoning.
    """

    kind: str
    words: str


@dataclass
class Sources:
    """All inputs of a plan, and what it does not know.

    Attributes:
        inputs: `name`, `value`, `kind` and `words` of each.
        notes: sentences.
    """

    inputs: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, value: float | str, source: Source) -> None:
        """State an input."""
        self.inputs.append({"name": name, "value": value, **asdict(source)})

    def note(self, sentence: str) -> None:
        """State what is left out or not known."""
        self.notes.append(sentence)
