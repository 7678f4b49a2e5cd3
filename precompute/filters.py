"""Which samples are wanted: an expression over the source's metadata, evaluated without `eval`.

`punsafe < 0.1 and similarity > 0.28 and min(width, height) >= 256` has three conditions; a sample
is dropped at the first that it fails, and that condition is the reason in the ledger. A field that
a sample lacks, or that is null, fails the condition as well, with a reason of its own.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from shards.errors import UserError

LookUp = Callable[[str], Any]

REASON = "filter: "  # how a filter's reasons begin in the ledger
_EXAMPLE = "for example 'punsafe < 0.1 and min(width, height) >= 256'"
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda item, items: item in items,
    ast.NotIn: lambda item, items: item not in items,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "len": len,
    "lower": lambda text: str.lower(text),
    "max": max,
    "min": min,
}


class _MissingFieldError(Exception):
    """A sample lacks a field that a condition needs."""


class Filter:
    """A parsed filter.

    Args:
        expression: comparisons of fields, numbers and texts, joined by `and`, `or`, `not`; with
            `+ - * /`, `in`, and the functions abs, len, lower, max, min. Empty keeps all.

    Raises:
        UserError: it is not that.
    """

    def __init__(self, expression: str) -> None:
        self.expression = " ".join(expression.split())
        self._conditions: list[tuple[str, ast.expr]] = []
        if not self.expression:
            return
        try:
            tree = ast.parse(self.expression, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = getattr(error, "msg", None) or "not an expression"
            raise UserError("--filter", f"{self.expression!r}: {reason}", wanted=_EXAMPLE) from None
        both = isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And)
        for node in tree.values if both else [tree]:  # type: ignore[attr-defined]
            self._check(node)
            self._conditions.append((ast.unparse(node), node))

    def reason_against(self, look_up: LookUp) -> str:
        """Why a sample is not wanted, as a status for the ledger; empty when it is wanted.

        Args:
            look_up: gives a field by name, None where the sample lacks it; asked for no more than
                the conditions need.
        """
        for text, node in self._conditions:
            try:
                if not _evaluate(node, look_up):
                    return f"{REASON}{text}"
            except _MissingFieldError as missing:
                return f"{REASON}no {missing}"
            except (TypeError, ValueError, ZeroDivisionError, OverflowError):
                return f"{REASON}not comparable in {text}"
        return ""

    def _check(self, tree: ast.expr) -> None:
        """Refuse what is not part of the language, before any sample is read."""
        for node in ast.walk(tree):
            if not _is_known(node):
                raise UserError(
                    "--filter",
                    f"{ast.unparse(node) if isinstance(node, ast.expr) else type(node).__name__} "
                    f"in {self.expression!r}",
                    wanted="fields, numbers, texts, comparisons, and, or, not, in, + - * / and "
                    f"{', '.join(_FUNCTIONS)}",
                    remedy=_EXAMPLE,
                )


def _is_known(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float, str, bool))
    if isinstance(node, ast.Call):
        named = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
        return named and bool(node.args) and not node.keywords
    kinds = (ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.Compare, ast.BinOp)
    others = (ast.Name, ast.Load, ast.List, ast.Tuple)
    return isinstance(node, (*kinds, *others, *_COMPARISONS, *_ARITHMETIC))


def _evaluate(node: ast.expr, look_up: LookUp) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            value = look_up(node.id)
            if value is None:
                raise _MissingFieldError(node.id)
            return value
        case ast.List() | ast.Tuple():
            return [_evaluate(item, look_up) for item in node.elts]
        case ast.BoolOp(op=ast.And()):
            return all(_evaluate(value, look_up) for value in node.values)
        case ast.BoolOp():
            return any(_evaluate(value, look_up) for value in node.values)
        case ast.UnaryOp(op=ast.Not()):
            return not _evaluate(node.operand, look_up)
        case ast.UnaryOp():
            return -_evaluate(node.operand, look_up)
        case ast.BinOp():
            left, right = _evaluate(node.left, look_up), _evaluate(node.right, look_up)
            return _ARITHMETIC[type(node.op)](left, right)
        case ast.Call():
            assert isinstance(node.func, ast.Name)
            return _FUNCTIONS[node.func.id](*(_evaluate(item, look_up) for item in node.args))
        case ast.Compare():
            return _compare(node, look_up)
    raise AssertionError(f"{ast.dump(node)} was checked")


def _compare(node: ast.Compare, look_up: LookUp) -> bool:
    """`0.2 < x <= 0.5` as Python has it."""
    left = _evaluate(node.left, look_up)
    for op, comparator in zip(node.ops, node.comparators, strict=True):
        right = _evaluate(comparator, look_up)
        if not _COMPARISONS[type(op)](left, right):
            return False
        left = right
    return True
