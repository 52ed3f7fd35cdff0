"""numpy's element-wise functions: each is a function of tensors of one dtype.

numpy itself says which dtypes a call computes in (`ufunc.resolve_dtypes`): the operands are cast to
these, and a Python number takes the dtype that it is given there.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import numpy as np
import torch

from tracejit.numpy_front.core import (
    ArrayData,
    array,
    cast,
    is_weak,
    made,
    number,
    refuse,
    store,
    unknown,
    weak,
)


def _sign(x: torch.Tensor) -> torch.Tensor:
    signs = torch.sign(x)
    return torch.where(torch.isnan(x), x, signs) if x.is_floating_point() else signs


def _whole(x: torch.Tensor) -> bool:
    return not x.is_floating_point()


def _unless_whole(function: Callable) -> Callable:
    """floor, ceil, …: integers stay what they are."""
    return lambda x: x.clone() if _whole(x) else function(x)


def _integer_powers(x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    if _whole(x):
        raise refuse("np.power", "of integers it takes an exponent that is a number from 0 up")
    return torch.pow(x, n)


def _divides(name: str, function: Callable) -> Callable:
    def divide(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if _whole(x):
            raise refuse(f"np.{name}", "of integers it takes a divisor that is a number but 0")
        return function(x, y)

    return divide


def _false(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x, dtype=torch.bool)


def _logical_number(x: torch.Tensor) -> torch.Tensor:
    return x != 0


UFUNCS: dict[np.ufunc, Callable] = {
    np.add: operator.add,
    np.subtract: operator.sub,
    np.multiply: operator.mul,
    np.divide: operator.truediv,
    np.floor_divide: _divides("floor_divide", torch.floor_divide),
    np.remainder: _divides("remainder", torch.remainder),
    np.fmod: _divides("fmod", torch.fmod),
    np.power: _integer_powers,
    np.float_power: torch.pow,
    np.negative: operator.neg,
    np.positive: torch.clone,
    np.absolute: lambda x: x.clone() if x.dtype == torch.bool else torch.abs(x),
    np.fabs: torch.abs,
    np.sign: _sign,
    np.exp: torch.exp,
    np.exp2: torch.exp2,
    np.expm1: torch.expm1,
    np.log: torch.log,
    np.log2: torch.log2,
    np.log10: torch.log10,
    np.log1p: torch.log1p,
    np.logaddexp: torch.logaddexp,
    np.sqrt: torch.sqrt,
    np.square: lambda x: x * x,
    np.reciprocal: lambda x: _divides("reciprocal", operator.truediv)(torch.ones_like(x), x),
    np.sin: torch.sin,
    np.cos: torch.cos,
    np.tan: torch.tan,
    np.arcsin: torch.asin,
    np.arccos: torch.acos,
    np.arctan: torch.atan,
    np.arctan2: torch.atan2,
    np.hypot: torch.hypot,
    np.sinh: torch.sinh,
    np.cosh: torch.cosh,
    np.tanh: torch.tanh,
    np.arcsinh: torch.asinh,
    np.arccosh: torch.acosh,
    np.arctanh: torch.atanh,
    np.degrees: lambda x: x * (180 / math.pi),
    np.rad2deg: lambda x: x * (180 / math.pi),
    np.radians: lambda x: x * (math.pi / 180),
    np.deg2rad: lambda x: x * (math.pi / 180),
    np.floor: _unless_whole(torch.floor),
    np.ceil: _unless_whole(torch.ceil),
    np.trunc: _unless_whole(torch.trunc),
    np.rint: _unless_whole(torch.round),
    np.maximum: torch.maximum,
    np.minimum: torch.minimum,
    np.fmax: lambda x, y: torch.maximum(x, y) if _whole(x) else torch.fmax(x, y),
    np.fmin: lambda x, y: torch.minimum(x, y) if _whole(x) else torch.fmin(x, y),
    np.copysign: torch.copysign,
    np.greater: operator.gt,
    np.greater_equal: operator.ge,
    np.less: operator.lt,
    np.less_equal: operator.le,
    np.equal: operator.eq,
    np.not_equal: operator.ne,
    np.logical_and: lambda x, y: torch.logical_and(_logical_number(x), _logical_number(y)),
    np.logical_or: lambda x, y: torch.logical_or(_logical_number(x), _logical_number(y)),
    np.logical_xor: lambda x, y: torch.logical_xor(_logical_number(x), _logical_number(y)),
    np.logical_not: lambda x: x == 0,
    np.bitwise_and: operator.and_,
    np.bitwise_or: operator.or_,
    np.bitwise_xor: operator.xor,
    np.invert: operator.invert,
    np.isnan: lambda x: _false(x) if _whole(x) else torch.isnan(x),
    np.isinf: lambda x: _false(x) if _whole(x) else torch.isinf(x),
    np.isfinite: lambda x: ~_false(x) if _whole(x) else torch.isfinite(x),
    np.signbit: lambda x: x < 0 if _whole(x) else torch.signbit(x),
}
_BOOLEAN = {np.add: torch.logical_or, np.multiply: torch.logical_and}
_DIVISIONS = {np.floor_divide: torch.floor_divide, np.remainder: torch.remainder}


def _powers_by_number(x: ArrayData, n: float, dtype: np.dtype) -> torch.Tensor:
    """x ** n for a Python number."""
    if dtype.kind in "iu" and n < 0:
        raise ValueError("Integers to negative integer powers are not allowed.")
    base = cast(x.t, dtype)
    return base * base if type(n) in (int, float) and n == 2 else torch.pow(base, n)


def elementwise(ufunc: np.ufunc, *inputs: object, out: object = None, dtype: object = None):
    """A call of an element-wise function."""
    rule = UFUNCS.get(ufunc)
    if rule is None:
        raise unknown(f"np.{ufunc.__name__}", *inputs)
    operands = [x if is_weak(x) else array(x) for x in inputs]
    kinds = [weak(x) or x.dtype for x in operands]
    if all(map(is_weak, operands)):
        kinds = [np.dtype(kind) for kind in kinds]
    options = {}
    if dtype is not None:
        options["signature"] = (*(None,) * len(operands), np.dtype(dtype))
    *loop, result = ufunc.resolve_dtypes((*kinds, None), **options)
    arrays = [x for x in operands if not is_weak(x)]
    np.broadcast_shapes(*(x.shape for x in arrays))
    last = operands[-1]
    if ufunc is np.power and is_weak(last) and arrays:
        t = _powers_by_number(operands[0], last, loop[0])
    elif ufunc in _DIVISIONS and loop[0].kind in "iu" and _is_divisor(last):
        number(last, loop[1])  # which has to fit
        t = _DIVISIONS[ufunc](cast(operands[0].t, loop[0]), last)
    else:
        tensors = [
            number(x, to) if is_weak(x) else cast(x.t, to)
            for x, to in zip(operands, loop, strict=True)
        ]
        rule = _BOOLEAN.get(ufunc, rule) if loop[0].kind == "b" else rule
        t = rule(*tensors)
    found = made(cast(t, result), sure=all(x.contiguous for x in arrays))
    if out is None:
        return found
    return store(out[0] if type(out) is tuple else out, found)


def _is_divisor(x: object) -> bool:
    return type(x) is int and x != 0


def ufunc_call(ufunc: np.ufunc, method: str, inputs: tuple, kwargs: dict) -> object:
    """What `__array_ufunc__` is asked for, but for np.matmul."""
    name = f"np.{ufunc.__name__}" + ("" if method == "__call__" else f".{method}")
    rest = kwargs.keys() - {"out", "dtype"}
    if kwargs.get("casting") in ("same_kind", "unsafe"):
        rest -= {"casting"}
    if rest:
        raise refuse(f"{name} with {', '.join(sorted(rest))}", "leave these arguments out", *inputs)
    if method == "__call__":
        return elementwise(ufunc, *inputs, **{k: v for k, v in kwargs.items() if k != "casting"})
    if method == "outer" and len(inputs) == 2:
        x, y = map(array, inputs)
        left = ArrayData.made(x.t.reshape(*x.shape, *(1,) * y.t.ndim))
        return elementwise(ufunc, left, y, **kwargs)
    raise unknown(name, *inputs)
