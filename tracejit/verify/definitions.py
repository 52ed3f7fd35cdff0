"""A user's class as text that defines it once more, with all that it names.

In: a class, such as a custom autograd function. Out: a text for each name, in an order in which
they can be run: imports, numbers, functions and classes of the user's, without comments and
annotations.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType

import torch

_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.memory_format)
_FOUND = frozenset({"torch", "numpy", *sys.stdlib_module_names})  # can be imported anywhere


class CannotDefine(Exception):
    """Something that has no text of its own."""


def definitions(x: type | FunctionType) -> dict[str, str]:
    """The text of a class or function, and before it of what it names. Raises CannotDefine."""
    found: dict[str, str] = {}
    _define(x.__name__, x, found, [])
    return found


def _define(name: str, x: object, found: dict[str, str], under_way: list[object]) -> None:
    if x in under_way:  # a function that calls itself
        return
    text = _imported(name, x)
    if text is None and isinstance(x, (type, FunctionType)) and x.__name__ == name:
        tree, names = _source(x)
        for other in sorted(names.keys() - {name}):
            _define(other, names[other], found, [*under_way, x])
        text = ast.unparse(tree)
    if text is None:
        raise CannotDefine(f"{name} is an object of type {type(x).__name__}")
    if found.setdefault(name, text) != text:
        raise CannotDefine(f"{name} is the name of two things")


def _imported(name: str, x: object) -> str | None:
    """The line that makes a plain value, or imports a module or something of a library; None where
    it is none of these."""
    if type(x) in _PLAIN or isinstance(x, _PLAIN[-2:]):
        return f"{name} = {x!r}"
    if isinstance(x, ModuleType):
        known = x.__name__.partition(".")[0] in _FOUND
        return f"import {x.__name__} as {name}" if known else None
    module, qualified = getattr(x, "__module__", None), getattr(x, "__qualname__", None)
    if not isinstance(module, str) or module.partition(".")[0] not in _FOUND or not qualified:
        return None
    same = getattr(sys.modules.get(module), qualified, None) is x
    return f"from {module} import {qualified} as {name}" if same else None


def _source(x: type | FunctionType) -> tuple[ast.Module, dict[str, object]]:
    """The parsed source of a class or function, and the variables of its module that it names."""
    own = [x] if isinstance(x, FunctionType) else list(_functions(x))
    if any(set(code.co_freevars) - {"__class__"} for f in own for code in _codes(f.__code__)):
        raise CannotDefine(f"{x.__name__} uses variables of the function around it")
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(x)))
    except (OSError, TypeError, SyntaxError):
        raise CannotDefine(f"the source of {x.__name__} is not there") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
    space = own[0].__globals__ if own else vars(sys.modules[x.__module__])
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return tree, {name: space[name] for name in names if name in space}


def _functions(cls: type) -> Iterator[FunctionType]:
    for x in vars(cls).values():
        x = inspect.unwrap(getattr(x, "__func__", x))
        if isinstance(x, FunctionType) and x.__module__ == cls.__module__:
            yield x


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for x in code.co_consts:
        if isinstance(x, CodeType):
            yield from _codes(x)
