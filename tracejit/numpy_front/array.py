"""The Array: what a step over numpy arrays sees in place of an ndarray, or a scalar, of numpy's.

Operators, functions and methods come to the tables of `ufuncs.py`, `functions.py` and
`reductions.py`. What has no rule is refused at the user's line.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import numpy as np
import torch

from tracejit.capture.trace.scalars import ANSWERING
from tracejit.numpy_front import functions, indexing, reductions, windows  # noqa: F401  rules
from tracejit.numpy_front.core import (
    BORN,
    ArrayData,
    Root,
    array,
    cast,
    made,
    refuse,
    unknown,
    view,
)
from tracejit.numpy_front.core import write as write_to
from tracejit.numpy_front.functions import FUNCTIONS, matmul
from tracejit.numpy_front.ufuncs import elementwise, ufunc_call

_ATTRIBUTES = {"nbytes", "strides", "flags", "base", "data", "ctypes", "flat", "imag"}


class Array(ArrayData):
    """An ndarray, or a scalar of numpy's, of a step that is being traced."""

    __slots__ = ()

    def __init__(
        self, t: torch.Tensor, root: Root | None = None, *, scalar: bool = False, sure: bool = True
    ):
        super().__init__(t, root, scalar=scalar, sure=sure)
        BORN.arrays.append(weakref.ref(self))

    @property
    def __class__(self) -> type:
        """What isinstance asks for."""
        return self.dtype.type if self.scalar else np.ndarray

    # ---- what it is

    ndim = property(lambda self: self.t.ndim)
    size = property(lambda self: self.t.numel())
    itemsize = property(lambda self: self.dtype.itemsize)

    def __len__(self) -> int:
        if not self.t.ndim:
            raise TypeError("len() of unsized object")
        return self.t.shape[0]

    @property
    def T(self) -> Array:
        """As numpy's."""
        return functions.transpose(self)

    @property
    def mT(self) -> Array:
        """As numpy's."""
        return functions.swapaxes(self, -1, -2)

    @property
    def real(self) -> Array:
        """Itself: there are no complex numbers here."""
        return self

    def __getattr__(self, name: str) -> object:
        if name in _ATTRIBUTES or (hasattr(np.ndarray, name) and not name.startswith("__array")):
            raise unknown(f"ndarray.{name}", self)
        raise AttributeError(f"'numpy.ndarray' object has no attribute {name!r}")

    # ---- its values

    def __bool__(self) -> bool:
        if self.t.numel() != 1:
            raise ValueError(
                "The truth value of an array with more than one element is ambiguous. "
                "Use a.any() or a.all()"
            )
        return bool(self.t)

    def item(self, *args: int) -> float:
        """A Python number."""
        if args:
            raise unknown("ndarray.item of a place", self)
        if self.t.numel() != 1:
            raise ValueError("can only convert an array of size 1 to a Python scalar")
        return self.t.item()

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        if self.dtype.kind not in "iu" or self.t.ndim:
            raise TypeError("only integer scalar arrays can be converted to a scalar index")
        return int(self.t)

    def tolist(self) -> object:
        """Python's numbers, in lists."""
        return self.t.tolist()

    def _values(self) -> np.ndarray:
        """For texts."""
        values = np.array(self.t.tolist(), self.dtype).reshape(self.shape)
        return values[()] if self.scalar else values

    def __str__(self) -> str:
        return str(self._values())

    def __repr__(self) -> str:
        return repr(self._values())

    def __format__(self, spec: str) -> str:
        return (
            format(self.item(), spec) if spec and not self.t.ndim else format(self._values(), spec)
        )

    def __array__(self, *args: object, **kwargs: object) -> np.ndarray:
        raise refuse("making an array of its values", "use np.array(x) in the step itself", self)

    def __iter__(self) -> Iterator[Array]:
        return (self[i] for i in range(len(self)))

    def __contains__(self, x: object) -> bool:
        return bool(elementwise(np.equal, self, x).t.any())

    def __hash__(self) -> int:
        if self.scalar:
            raise unknown("the hash of a scalar", self)
        raise TypeError("unhashable type: 'numpy.ndarray'")

    # ---- its parts

    def __getitem__(self, key: object) -> Array:
        return indexing.get(self, key)

    def __setitem__(self, key: object, value: object) -> None:
        indexing.put(self, key, value)

    # ---- functions of numpy's

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: object, **kwargs: object
    ) -> object:
        if ufunc is np.matmul and method == "__call__":
            if kwargs.keys() - {"out"}:
                raise unknown("np.matmul with these arguments", *inputs)
            out = kwargs.get("out")
            return _into(matmul(*inputs), out[0] if out else None)
        reduce = _REDUCE.get(ufunc) if method == "reduce" else None
        if reduce is not None and not kwargs.keys() - {"axis", "keepdims", "dtype"}:
            kwargs.setdefault("axis", 0)
            return reduce(*inputs, **kwargs)
        if method == "at" and ufunc in (np.add, np.subtract) and len(inputs) == 3:
            return indexing.add_at(*inputs, 1 if ufunc is np.add else -1)
        return ufunc_call(ufunc, method, inputs, kwargs)

    def __array_function__(
        self, function: Callable, types: object, args: tuple, kwargs: dict
    ) -> object:
        found = FUNCTIONS.get(function)
        if found is None:
            module = (function.__module__ or "numpy").replace("numpy", "np", 1)
            raise unknown(f"{module}.{function.__name__}", *args)
        return found(*args, **kwargs)

    # ---- methods

    def astype(self, dtype: object, *, copy: bool = True) -> Array:
        """As numpy's."""
        if np.dtype(dtype) == self.dtype and not copy:
            return self
        t = cast(self.t, np.dtype(dtype))
        return Array(t.clone() if t is self.t else t, scalar=self.scalar, sure=self.contiguous)

    def reshape(self, *shape: object, order: str = "C") -> Array:
        """As numpy's."""
        return functions.reshape(self, shape[0] if len(shape) == 1 else shape, order)

    def transpose(self, *axes: object) -> Array:
        """As numpy's."""
        if len(axes) == 1 and (axes[0] is None or isinstance(axes[0], (tuple, list))):
            axes = axes[0]
        return functions.transpose(self, axes or None)

    def fill(self, value: object) -> None:
        """As numpy's."""
        self[...] = value

    def sort(self, axis: int = -1) -> None:
        """In place."""
        write_to(self, functions.sort(self, axis).t)

    def view(self) -> Array:
        """A view of all of it."""
        return view(self, self.t.view_as(self.t))

    dot = functions.dot
    copy = functions.copy_method
    flatten = functions.flatten
    ravel = functions.ravel
    squeeze = functions.squeeze
    swapaxes = functions.swapaxes
    diagonal = functions.diagonal
    clip = functions.clip
    take = functions.take
    repeat = functions.repeat
    argsort = functions.argsort
    sum = reductions.sum
    prod = reductions.prod
    mean = reductions.mean
    var = reductions.var
    std = reductions.std
    max = reductions.max
    min = reductions.min
    any = reductions.any
    all = reductions.all
    argmax = reductions.argmax
    argmin = reductions.argmin
    cumsum = reductions.cumsum
    cumprod = reductions.cumprod
    round = reductions.round
    trace = reductions.trace


METHODS = (
    *("dot", "copy", "flatten", "ravel", "squeeze", "swapaxes", "diagonal", "clip", "take"),
    *("repeat", "argsort", "sum", "prod", "mean", "var", "std", "max", "min", "any", "all"),
    *("argmax", "argmin", "cumsum", "cumprod", "round", "trace", "astype", "reshape"),
    *("transpose", "fill", "sort", "item", "tolist", "view"),
)

_REDUCE = {
    np.add: reductions.sum,
    np.multiply: reductions.prod,
    np.maximum: reductions.max,
    np.minimum: reductions.min,
    np.logical_and: reductions.all,
    np.logical_or: reductions.any,
}

OPERATORS = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "truediv": np.divide,
    "floordiv": np.floor_divide,
    "mod": np.remainder,
    "pow": np.power,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "matmul": np.matmul,
}
_RELATIONS = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
_UNARY = {
    "neg": np.negative,
    "pos": np.positive,
    "abs": np.absolute,
    "invert": np.invert,
}


def _into(found: ArrayData, out: ArrayData | None) -> ArrayData:
    if out is None:
        return found
    if found.shape != out.shape:
        raise ValueError(f"matmul: the output has shape {out.shape} and not {found.shape}")
    write_to(out, found.t)
    return out


def _call(ufunc: np.ufunc, *operands: object) -> ArrayData:
    return matmul(*operands) if ufunc is np.matmul else elementwise(ufunc, *operands)


def _operator(ufunc: np.ufunc) -> tuple[Callable, Callable, Callable]:
    def forward(self: Array, other: object) -> object:
        return _call(ufunc, self, other)

    def reflected(self: Array, other: object) -> object:
        return _call(ufunc, other, self)

    def in_place(self: Array, other: object) -> object:
        if self.scalar:  # a new scalar
            return NotImplemented
        if ufunc is np.matmul:
            return _into(matmul(self, other), self)
        return elementwise(ufunc, self, other, out=self)

    return forward, reflected, in_place


for _name, _ufunc in OPERATORS.items():
    _forward, _reflected, _in_place = _operator(_ufunc)
    setattr(Array, f"__{_name}__", _forward)
    setattr(Array, f"__r{_name}__", _reflected)
    setattr(Array, f"__i{_name}__", _in_place)
for _name, _ufunc in _RELATIONS.items():
    setattr(Array, f"__{_name}__", _operator(_ufunc)[0])
for _name, _ufunc in _UNARY.items():
    setattr(Array, f"__{_name}__", lambda self, ufunc=_ufunc: elementwise(ufunc, self))

ArrayData.made = Array
ANSWERING.add(Array)

__all__ = ["METHODS", "OPERATORS", "Array", "array", "made"]
