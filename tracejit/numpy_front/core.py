"""What all rules of the front end share: the Array's data, dtypes, operands, writes, refusals.

An Array stands for an ndarray, or a scalar of numpy, while a step is traced. It holds a tensor that
the tracer follows, and knows what numpy would know besides: whether it is a scalar, whether it may
be written to, and whether its layout in memory is surely the one that numpy would have.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch

from tracejit.capture.python.numerics import TracedFloat64
from tracejit.capture.trace import location
from tracejit.capture.trace.active import current
from tracejit.capture.trace.scalars import TracedInt
from tracejit.errors import UnsupportedOperation

TO_TORCH = {
    np.dtype(name): getattr(torch, name)
    for name in (
        *("bool", "uint8", "int8", "int16", "int32", "int64"),
        *("float16", "float32", "float64"),
    )
}
TO_NUMPY = {of: to for to, of in TO_TORCH.items()}
CONSTANT = 4096  # elements of an array that the step makes by itself
_REWRITE = "Write it in other functions of numpy, or call it outside the step"


class _On(threading.local):
    """Where the tensors of the trace that is going on in this thread are."""

    device: str | None = None


ON = _On()


class _Born(threading.local):
    """Weak references to the Arrays of the trace that is going on in this thread."""

    def __init__(self) -> None:
        self.arrays: list[weakref.ref] = []


BORN = _Born()


class Root:
    """The memory of an Array and of its views.

    locked:  why it must not be written to. copied: it was copied where numpy makes a view.
    of:      that of the array of which numpy would have a view here. outside: it is the user's.
    """

    __slots__ = ("locked", "copied", "of", "outside")

    def __init__(self, locked: str = "", of: Root | None = None, *, outside: bool = False):
        self.locked, self.copied, self.of, self.outside = locked, False, of, outside


class ArrayData:
    """The data of an Array; `Array` adds what users call.

    t: its tensor. scalar: numpy has a scalar here, which has no memory. sure: its strides are those
    that numpy's array has.
    """

    __slots__ = ("t", "root", "scalar", "sure", "__weakref__")
    made: type[ArrayData]  # Array itself, for the rules, which come before it

    def __init__(
        self, t: torch.Tensor, root: Root | None = None, *, scalar: bool = False, sure: bool = True
    ):
        self.t, self.root, self.scalar, self.sure = t, root or Root(), scalar, sure

    @property
    def dtype(self) -> np.dtype:
        """numpy's dtype."""
        return TO_NUMPY[self.t.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """As numpy's."""
        return tuple(self.t.shape)

    @property
    def contiguous(self) -> bool:
        """Whether numpy's array surely lies row by row."""
        return self.sure and self.t.is_contiguous()


def made(t: torch.Tensor, *, sure: bool = True) -> ArrayData:
    """A result in memory of its own: a scalar, if it has no axes."""
    return ArrayData.made(t, scalar=t.ndim == 0, sure=sure)


def view(of: ArrayData, t: torch.Tensor) -> ArrayData:
    """A view of an Array."""
    return ArrayData.made(t, of.root, sure=of.sure)


def copy_for_view(of: ArrayData, t: torch.Tensor, why: str) -> ArrayData:
    """A copy where numpy may have a view: so neither may be written to from now on."""
    of.root.copied = True
    return ArrayData.made(t, Root(why, of.root), sure=False)


def refuse(function: str, reason: str, *operands: object) -> UnsupportedOperation:
    """The error for what has no rule, at the user's line."""
    shapes = ", ".join(map(_described, operands)) or "no arrays"
    error = UnsupportedOperation(
        where=location.full(),
        function=function,
        shapes=shapes,
        remedy=f"{reason[:1].upper()}{reason[1:]}.",
    )
    trace = current()
    return error if trace is None else trace.refuse(error)


def unknown(function: str, *operands: object) -> UnsupportedOperation:
    """The error for a function that has no rule."""
    return refuse(function, _REWRITE, *operands)


def _described(x: object) -> str:
    if isinstance(x, (ArrayData, np.ndarray)):
        return f"{x.dtype} of shape {x.shape}"
    return type(x).__name__


def torch_dtype(dtype: object) -> torch.dtype:
    """torch's dtype for one of numpy's, or a name for it."""
    found = TO_TORCH.get(np.dtype(dtype))
    if found is None:
        raise refuse(
            f"the dtype {np.dtype(dtype)}",
            "use bool, an integer of at most 64 bits "
            "that is signed or uint8, or a float of 16 to 64 bits",
        )
    return found


def cast(t: torch.Tensor, dtype: np.dtype) -> torch.Tensor:
    """A tensor in a dtype of numpy's."""
    wanted = torch_dtype(dtype)
    return t if t.dtype == wanted else t.to(wanted)


def weak(x: object) -> type | None:
    """int or float for a Python number, which takes the dtype of what it meets; runtime scalars
    too, but for those that stand for numpy's. None for anything else."""
    kind = type(x)
    if kind is bool or kind is TracedFloat64 or issubclass(kind, np.generic):
        return None
    if kind is TracedInt or issubclass(kind, int):
        return int
    return float if issubclass(kind, float) else None


def is_weak(x: object) -> bool:
    """Whether x is a Python number."""
    return weak(x) is not None


def array(x: object) -> ArrayData:
    """An operand as an Array. A Python number is of numpy's default dtype."""
    if isinstance(x, ArrayData):
        return x
    if is_weak(x):
        dtype = np.dtype(np.int64 if weak(x) is int else np.float64)
        return ArrayData.made(number(x, dtype), scalar=True)
    if type(x) is TracedFloat64:  # np.float64 of a runtime scalar
        return ArrayData.made(number(x, np.dtype(np.float64)), scalar=True)
    if type(x) is bool or isinstance(x, np.generic):
        dtype = np.dtype(type(x))
        return ArrayData.made(number(bool(x) if type(x) is bool else x.item(), dtype), scalar=True)
    if type(x) is np.ndarray:
        return constant(x)
    if type(x) in (list, tuple):
        return stacked(x)
    raise refuse(f"an operand of type {type(x).__name__}", _REWRITE)


def number(x: float, dtype: np.dtype) -> torch.Tensor:
    """A tensor without axes that holds a number."""
    if dtype.kind in "iu" and not np.iinfo(dtype).min <= x <= np.iinfo(dtype).max:
        raise refuse(f"the integer {x} with {dtype}", "it is out of range for that dtype")
    return torch.full((), x, dtype=torch_dtype(dtype), device=ON.device)


def constant(x: np.ndarray) -> ArrayData:
    """An array that the step's own Python has made of numbers."""
    if x.size > CONSTANT:
        raise refuse(
            "an array that is no argument and no variable of the step",
            "pass it as an argument, or make it with np.zeros, np.ones, np.full or np.eye",
            x,
        )
    dtype = torch_dtype(x.dtype)
    if not x.size:
        return ArrayData.made(torch.zeros(x.shape, dtype=dtype, device=ON.device))
    return ArrayData.made(torch.tensor(x.tolist(), dtype=dtype, device=ON.device))


def stacked(items: Sequence) -> ArrayData:
    """What np.array makes of a list."""
    if not _has_arrays(items):
        return constant(np.array(items))
    parts = [array(x) for x in items]
    dtype = common(*items)
    if len({p.shape for p in parts}) > 1:
        raise ValueError("setting an array element with a sequence: parts differ in shape")
    return ArrayData.made(torch.stack([cast(p.t, dtype) for p in parts]))


def _has_arrays(items: object) -> bool:
    if type(items) in (list, tuple):
        return any(map(_has_arrays, items))
    return isinstance(items, ArrayData)


def common(*operands: object) -> np.dtype:
    """The dtype that numpy would give several operands together."""
    kinds = []
    for x in operands:
        if isinstance(x, (ArrayData, np.ndarray, np.generic, TracedFloat64)):
            kinds.append(x.dtype)
        elif is_weak(x):
            kinds.append(0 if weak(x) is int else 0.0)
        elif type(x) is bool:
            kinds.append(np.dtype(bool))
        else:
            kinds.append(array(x).dtype)
    return np.result_type(*kinds)


def write(to: ArrayData, value: torch.Tensor, key: object = ...) -> None:
    """Put a tensor, of whatever dtype, into an Array or a part of it.

    Raises ValueError where numpy does, and refuses where a copy stands for a view of numpy's.
    """
    if to.root.locked == "read-only":
        raise ValueError("assignment destination is read-only")
    if to.root.locked or to.root.copied:
        why = to.root.locked or "a part of it was reversed or reshaped, which copies here"
        raise refuse("a write", f"{why}; write to a copy of it: x.copy()", to)
    if to.scalar:
        raise TypeError(f"'numpy.{to.dtype}' object does not support item assignment")
    value = value.to(to.t.dtype)
    if key is ...:
        to.t.copy_(value)
    else:
        to.t[key] = value


def store(to: ArrayData, result: ArrayData) -> ArrayData:
    """What `out=` does with a result."""
    if not isinstance(to, ArrayData):
        raise refuse("out=", "the result goes into an array that is no argument of the step", to)
    if not np.can_cast(result.dtype, to.dtype, "same_kind"):
        raise TypeError(f"Cannot cast ufunc output from {result.dtype} to {to.dtype}")
    if np.broadcast_shapes(result.shape, to.shape) != to.shape:
        raise ValueError(f"non-broadcastable output operand with shape {to.shape}")
    write(to, result.t)
    return to


def axes_of(x: ArrayData, axis: object) -> tuple[int, ...]:
    """An axis argument as axes, in order; None is all."""
    if axis is None:
        return tuple(range(x.t.ndim))
    given = axis if isinstance(axis, tuple) else (axis,)
    return tuple(sorted(np.lib.array_utils.normalize_axis_tuple(given, x.t.ndim)))
