"""Literals and attributes of the text forms: a Python value to text, a parsed expression back."""

from __future__ import annotations

import ast
import math

from tracejit.errors import InvalidGraph
from tracejit.ir.types import DTYPES, DType

_NAMES = {"nan": math.nan, "inf": math.inf} | DTYPES


def print_literal(value: object) -> str:
    """A literal or attribute as text that `parse_literal` reads back."""
    if isinstance(value, DType):
        return value.name
    if isinstance(value, tuple):
        inner = ", ".join(map(print_literal, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return repr(value)


def parse_literal(tree: ast.expr) -> object:
    """Inverse of print_literal on a parsed expression."""
    if isinstance(tree, ast.Name) and tree.id in _NAMES:
        return _NAMES[tree.id]
    if isinstance(tree, ast.Tuple):
        return tuple(map(parse_literal, tree.elts))
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -parse_literal(tree.operand)
    if isinstance(tree, ast.Constant):
        return tree.value
    raise InvalidGraph(reason=f"not a literal: {ast.unparse(tree)}")
