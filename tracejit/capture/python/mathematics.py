"""The functions of the math module while a step is traced.

C code reads the double of a runtime scalar without asking it. So while a trace runs each function
of `math` is a wrapper. With a runtime scalar among its arguments it records host arithmetic or
decisions, or pins the value; with plain values it calls the function itself.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable
from types import BuiltinFunctionType

from tracejit.capture.trace.scalars import is_runtime, pinned, plain
from tracejit.ir.ops.host import MATH

ORIGINALS: dict[str, Callable] = {
    name: x for name, x in vars(math).items() if callable(x) and not name.startswith("_")
}
_FUNCTIONS = frozenset(ORIGINALS.values())
_OF_ITEMS = frozenset({"fsum", "prod", "dist"})  # of one or more iterables


def _as_arithmetic(name: str, args: tuple) -> object:
    """A function of floats, as a host operation."""
    number = ORIGINALS[name](*map(plain, args))
    scalars = next(x.scalars for x in args if is_runtime(x))
    operands = [x.value if is_runtime(x) else float(plain(x)) for x in args]
    op = "host_math_pow" if name == "pow" else f"host_{name}"
    return scalars.traced(number, scalars.arithmetic(op, *operands))


def _log(x: object, *base: object) -> object:
    if not base:
        return _as_arithmetic("log", (x,))
    above, below = WRAPPERS["log"](x), WRAPPERS["log"](*base)  # as C does
    return above / below


def _isclose(a, b, *, rel_tol=1e-09, abs_tol=0.0) -> bool:
    if rel_tol < 0.0 or abs_tol < 0.0:
        raise ValueError("tolerances must be non-negative")
    if a == b:
        return True
    if _isinf(a) or _isinf(b):
        return False
    apart = abs(b - a)
    return apart <= abs(rel_tol * b) or apart <= abs(rel_tol * a) or apart <= abs_tol


def _isinf(x: object) -> bool:
    return abs(x) == math.inf


def _prod(items: Iterable, /, *, start: object = 1) -> object:
    return functools.reduce(operator.mul, items, start)


_IN_PYTHON = {
    "log": _log,
    "isnan": lambda x: x != x,
    "isinf": _isinf,
    "isfinite": lambda x: abs(x) < math.inf,
    "isclose": _isclose,
    "prod": _prod,
}


def _holds_runtime(x: object) -> bool:
    return is_runtime(x) or (type(x) is tuple and any(map(is_runtime, x)))


def _pinned(x: object) -> object:
    return tuple(map(pinned, x)) if type(x) is tuple else pinned(x)


def _wrapper(name: str, original: Callable) -> Callable:
    fits = {"pow": 2, "fmod": 2, "copysign": 2, "atan2": 2, "hypot": 2}.get(name, 1)
    special, of_items = _IN_PYTHON.get(name), name in _OF_ITEMS

    @functools.wraps(original)
    def wrapper(*args: object, **kwargs: object) -> object:
        if of_items:  # an iterator gives its items once
            args = tuple([x if type(x) is tuple else tuple(x) for x in args])
        if not any(map(_holds_runtime, (*args, *kwargs.values()))):
            return original(*args, **kwargs)
        if special is not None:
            return special(*args, **kwargs)
        if name in MATH and len(args) == fits and not kwargs and all(map(_is_number, args)):
            return _as_arithmetic(name, args)
        return original(*map(_pinned, args), **{k: _pinned(x) for k, x in kwargs.items()})

    return wrapper


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float))


WRAPPERS: dict[str, Callable] = {name: _wrapper(name, x) for name, x in ORIGINALS.items()}
_namespace = vars(math)


def is_function(x: object) -> bool:
    """Whether x is a function of the math module itself, which reads runtime scalars unasked."""
    return isinstance(x, BuiltinFunctionType) and x in _FUNCTIONS


def install() -> None:
    """Put the wrappers in place."""
    _namespace.update(WRAPPERS)


def remove() -> None:
    """Put the functions themselves back."""
    _namespace.update(ORIGINALS)
