"""The functions of numpy on runtime scalars.

numpy asks a float for its number by `__float__`, which pins it, wherever it makes an array of it.
Its element-wise functions ask first for `__array_ufunc__`: those of float64 become host arithmetic
with numpy's own function, comparisons become decisions, all else gets pinned numbers. The result is
a runtime scalar that behaves as numpy's float64 does.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

from tracejit.capture.trace.scalars import TracedFloat, is_runtime, pinned, plain
from tracejit.ir.ops.host import NUMPY

_DECISIONS = {
    "less": operator.lt,
    "less_equal": operator.le,
    "greater": operator.gt,
    "greater_equal": operator.ge,
    "equal": operator.eq,
    "not_equal": operator.ne,
    "isnan": lambda x: x != x,
    "isinf": lambda x: abs(x) == np.inf,
    "isfinite": lambda x: abs(x) < np.inf,
}
_EXACT = 2**53  # integers up to here are floats


class TracedFloat64(TracedFloat):
    """A runtime scalar that numpy has computed: an `np.float64` for whoever asks."""

    __slots__ = ()
    __class__ = property(lambda self: np.float64)
    dtype = property(lambda self: np.dtype(np.float64))
    shape, ndim, size = (), 0, 1

    def item(self) -> TracedFloat:
        """The Python float."""
        live = self.live
        return TracedFloat.make(plain(self), live, self.value) if live else plain(self)

    def __getattr__(self, name: str) -> object:
        return getattr(np.float64(self.pin()), name)


def _operator(name: str, of_numpy: Callable, *, reflected: bool) -> Callable:
    of_float = getattr(TracedFloat, name)

    def method(self: TracedFloat64, other: object) -> object:
        if not _is_number(other):
            return of_float(self, other)
        return of_numpy(other, self) if reflected else of_numpy(self, other)

    return method


for _name, _ufunc in (
    *(("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("truediv", np.divide)),
    *(("floordiv", np.floor_divide), ("mod", np.remainder), ("pow", np.power)),
):
    setattr(TracedFloat64, f"__{_name}__", _operator(f"__{_name}__", _ufunc, reflected=False))
    setattr(TracedFloat64, f"__r{_name}__", _operator(f"__r{_name}__", _ufunc, reflected=True))
TracedFloat64.__neg__ = lambda self: np.negative(self)
TracedFloat64.__abs__ = lambda self: np.absolute(self)


def _is_number(x: object) -> bool:
    kind = type(x)
    if kind is int:
        return -_EXACT <= x <= _EXACT
    return kind is float or kind is np.float64 or issubclass(kind, TracedFloat)


def _of_ufunc(
    self: TracedFloat, ufunc: np.ufunc, method: str, *inputs: object, **kwargs: object
) -> object:
    """An element-wise function of numpy, with a runtime scalar among its arguments."""
    name = ufunc.__name__
    live = next((x.scalars for x in inputs if is_runtime(x)), None)
    if method == "__call__" and live and not kwargs and all(map(_is_number, inputs)):
        if getattr(np, name, None) is ufunc and name in NUMPY:
            number = NUMPY[name](*map(plain, inputs))
            operands = [x.value if is_runtime(x) else float(plain(x)) for x in inputs]
            value = live.arithmetic(f"host_np_{name}", *operands)
            return TracedFloat64.make(number, live, value)
        if name in _DECISIONS:
            floats = [x if is_runtime(x) else float(plain(x)) for x in inputs]
            return np.bool_(_DECISIONS[name](*floats))
    return getattr(ufunc, method)(*_pinned(inputs), **_pinned(kwargs))


def _of_function(
    self: TracedFloat, function: Callable, types: object, args: tuple, kwargs: dict
) -> object:
    """Any other function of numpy that takes a runtime scalar."""
    if function is np.clip and len(args) == 3 and not kwargs:
        x, low, high = args
        if low is not None and high is not None and all(map(_is_number, args)):
            return np.minimum(np.maximum(x, low), high)
    return function(*_pinned(args), **_pinned(kwargs))


def _pinned(x: object) -> object:
    """What numpy is given instead: the numbers of all runtime scalars in it."""
    if type(x) in (list, tuple):
        return type(x)(map(_pinned, x))
    if type(x) is dict:
        return {k: _pinned(item) for k, item in x.items()}
    return pinned(x)


TracedFloat.__array_ufunc__ = _of_ufunc
TracedFloat.__array_function__ = _of_function
TracedFloat.__complex__ = lambda self: complex(self.pin())  # else C reads the number unasked
