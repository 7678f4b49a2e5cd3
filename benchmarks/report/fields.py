"""Results as JSON objects whose look-ups say what is missing, and where."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from shards.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, 10th and 90th percentile; all three alike for a figure without repeats."""

    median: float
    p10: float
    p90: float


_MAX_DEPTH = 50  # far from Python's own limit, which depends on who calls


class Fields:
    """A JSON object that somebody else wrote.

    Args:
        data: the object.
        where: its file, for messages.
        names: that lead to this object within the file.

    Raises:
        UserError: it is no object. All look-ups raise it for what is absent or of another kind.
    """

    def __init__(self, data: Any, where: str, names: tuple[str, ...] = ()) -> None:
        self._where, self._names = where, names
        if not isinstance(data, dict):
            raise self._error((), data, "a JSON object")
        self.data: dict[str, Any] = data

    def find(self, *path: str) -> Any:
        """What is there; None where nothing is."""
        value: Any = self.data
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def fields(self, *path: str) -> Fields:
        """An object within."""
        return Fields(self.find(*path), self._where, (*self._names, *path))

    def children(self, *path: str) -> dict[str, Fields]:
        """The objects within an object, by name."""
        parent = self.fields(*path)
        return {name: parent.fields(name) for name in parent.data}

    def rows(self, *path: str) -> list[Fields]:
        """The objects in a list."""
        rows = self.find(*path)
        if not isinstance(rows, list):
            raise self._error(path, rows, "a list")
        return [
            Fields(row, self._where, (*self._names, *path, str(index)))
            for index, row in enumerate(rows)
        ]

    def number(self, *path: str) -> float:
        """A finite number."""
        value = self.find(*path)
        if not is_number(value):
            raise self._error(path, value, "a finite number")
        return float(value)

    def count(self, *path: str) -> int:
        """A whole number."""
        value = self.number(*path)
        if value != int(value):
            raise self._error(path, value, "a whole number")
        return int(value)

    def numbers(self, *path: str) -> list[float]:
        """A list of finite numbers, with at least one."""
        values = self.find(*path)
        if not isinstance(values, list) or not values or not all(map(is_number, values)):
            raise self._error(path, values, "a list of numbers")
        return [float(value) for value in values]

    def spread(self, *path: str) -> Spread:
        """Median, p10 and p90."""
        found = self.fields(*path)
        return Spread(**{name: found.number(name) for name in ("median", "p10", "p90")})

    def texts(self, *path: str) -> list[str]:
        """A list of words or numbers as texts; empty where there is none."""
        values = self.find(*path)
        if values is not None and not isinstance(values, list):
            raise self._error(path, values, "a list")
        return [str(value) for value in values or []]

    def text(self, *path: str, default: str = "") -> str:
        """A word or a number as text.

        Args:
            path: of names.
            default: for what is absent; without one it must be there.
        """
        value = self.find(*path)
        if value is None and default:
            return default
        if value is None or isinstance(value, dict | list):
            raise self._error(path, value, "a word or a number")
        return str(value)

    def shown(self, *path: str, default: str) -> str:
        """Whatever is there as text, for people alone: nothing is expected of it."""
        value = self.find(*path)
        return default if value is None else str(value)

    def _error(self, path: tuple[str, ...], found: Any, wanted: str) -> UserError:
        name = ".".join([*self._names, *path]) or "the document"
        return UserError(self._where, f"{name} is {_kind(found)}", wanted=wanted)


def is_number(value: Any) -> bool:
    """Whether this is a finite number; true and false are none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # JSON's integers have any length
        return False


def check_values(value: Any, where: str, depth: int = 0) -> None:
    """Refuse what is JSON, and yet nothing that a page can be made of.

    Args:
        value: of a document.
        where: its file, for messages.
        depth: that it lies at.

    Raises:
        UserError: an integer that is too large for a float, half a pair of surrogates, or values
            within values without end.
    """
    if depth > _MAX_DEPTH:
        raise UserError(where, f"is nested more than {_MAX_DEPTH} deep")
    try:
        if isinstance(value, int):
            float(value)
        elif isinstance(value, str):
            value.encode()
    except OverflowError:
        raise UserError(where, "has an integer that is too large for a float") from None
    except UnicodeEncodeError:
        raise UserError(where, "has a text that is no Unicode (a lone surrogate)") from None
    if isinstance(value, dict | list):
        for each in value:
            check_values(each, where, depth + 1)
    if isinstance(value, dict):
        for each in value.values():
            check_values(each, where, depth + 1)


def _kind(value: Any) -> str:
    """For messages: of any length and content, so not the value itself."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return "not there" if value is None else names.get(type(value), repr(value))
