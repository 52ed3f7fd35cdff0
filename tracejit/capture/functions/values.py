"""Values of tensors that Python asks for: `.item()`, `if t:`, `t.tolist()`, `print(t)`.

A number that is arithmetic on the host is known (`trace/numbers.py`); any other is computed when it
is asked for (`trace/cuts.py`).
"""

from __future__ import annotations

from functools import partial
from types import FrameType

import numpy as np
import torch
from torch.optim import _adafactor

from tracejit.capture.functions.common import by_rule, truth
from tracejit.capture.functions.factories import converted
from tracejit.capture.trace import cuts, location, numbers
from tracejit.capture.trace.scalars import pinned
from tracejit.capture.trace.table import BY_CALLER, function_name, rule
from tracejit.capture.trace.tensor import Handle
from tracejit.capture.trace.trace import Trace
from tracejit.errors import ValueDependentError
from tracejit.ir.types import f64

Tensor = torch.Tensor

_FEW = 16  # numbers of a list that are runtime scalars, one by one


@rule(Tensor.item)
def item(t: Trace, self: Tensor, or_tensor: bool = False) -> object:
    handle = _single(t, self)
    number = numbers.item(t, handle)
    if number is None and or_tensor:
        return converted(t, self, f64)
    return cuts.number_of(t, handle) if number is None else number


def _single(t: Trace, self: Tensor) -> Handle:
    """The handle of a tensor of one element."""
    handle = t.lift(self)
    if handle.numel != 1:
        raise t.shape_error(f"a Tensor with {handle.numel} elements cannot be converted to Scalar")
    return handle


def _asked_by(caller: FrameType) -> dict[str, object]:
    """Adafactor's `max` takes tensors during a trace."""
    return {"or_tensor": True} if caller.f_globals is vars(_adafactor) else {}


BY_CALLER[Tensor.item] = _asked_by


@rule(torch.sym_float)
def sym_float(t: Trace, a: object) -> object:
    """A number as a float; runtime scalars stay what they are."""
    return a * 1.0


@rule(Tensor.__bool__, Tensor.is_nonzero, torch.is_nonzero)
def bool_(t: Trace, input: Tensor) -> bool:
    handle = t.lift(input)
    if handle.numel != 1:
        few = "no values" if handle.numel == 0 else "more than one value"
        raise t.shape_error(f"Boolean value of Tensor with {few} is ambiguous")
    known = numbers.truth(t, handle)
    if known is not None:
        return known
    with t.untaped():
        return cuts.number_of(t, t.lift(t.fresh(truth(t, t.read(handle)))))


@rule(Tensor.__int__, Tensor.__index__)
def int_(t: Trace, self: Tensor) -> int:
    if t.calling is Tensor.__index__ and t.lift(self).dtype.is_float:
        raise TypeError("only integer tensors of a single element can be converted to an index")
    return int(item(t, self))


@rule(Tensor.__float__)
def float_(t: Trace, self: Tensor) -> float:
    handle = _single(t, self)
    number = numbers.item(t, handle)
    return cuts.plain_number_of(t, handle) if number is None else float(pinned(number))


@rule(torch.equal, Tensor.equal)
def equal(t: Trace, input: Tensor, other: Tensor) -> bool:
    a, b = t.lift(input), t.lift(other)
    if a.shape != b.shape:
        return False
    return _all(t, by_rule(t, torch.eq, input, other))


def _all(t: Trace, condition: Tensor) -> bool:
    return bool_(t, by_rule(t, torch.all, condition))


@rule(torch.allclose, Tensor.allclose)
def allclose(
    t: Trace,
    input: Tensor,
    other: Tensor,
    rtol: float = 1e-05,
    atol: float = 1e-08,
    equal_nan: bool = False,
) -> bool:
    return _all(t, by_rule(t, torch.isclose, input, other, rtol, atol, equal_nan))


@rule(Tensor.tolist)
def tolist(t: Trace, self: Tensor) -> object:
    handle = t.lift(self)
    if not handle.shape:
        return item(t, self)
    if handle.dtype.is_float and handle.numel <= _FEW:
        with t.untaped():
            rows = [by_rule(t, Tensor.select, self, 0, i) for i in range(handle.shape[0])]
            return [tolist(t, row) for row in rows]
    return cuts.values_of(t, handle, "a tensor as a list", Tensor.tolist)


@rule(Tensor.numpy, Tensor.__array__)
def numpy(t: Trace, self: Tensor, dtype: object = None, *, force: bool = False) -> np.ndarray:
    handle = t.lift(self)
    if t.requires_grad(handle) and not force:
        raise t.autograd_error(
            "Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead."
        )
    return cuts.values_of(t, handle, "a tensor as an array", partial(_array, dtype))


def _array(dtype: object, x: Tensor) -> np.ndarray:
    """An array that cannot be written to: in eager that would change the tensor."""
    array = x.numpy() if dtype is None else x.numpy().astype(dtype)
    array.flags.writeable = False
    return array


@rule(Tensor.__repr__)
def repr_(t: Trace, self: Tensor, *, tensor_contents: object = None) -> str:
    handle = t.lift(self)
    return cuts.values_of(t, handle, "a tensor as text", repr)


@rule(Tensor.__format__)
def format_(t: Trace, self: Tensor, format_spec: str) -> str:
    handle = t.lift(self)
    if handle.shape:
        return object.__format__(self, format_spec)
    number = numbers.item(t, handle)
    if number is not None:
        return format(number, format_spec)
    return cuts.values_of(t, handle, "a tensor as text", partial(_formatted, format_spec))


def _formatted(spec: str, x: Tensor) -> str:
    return format(x.item(), spec)


@rule(Tensor.__contains__)
def contains(t: Trace, self: Tensor, element: object) -> bool:
    if not isinstance(element, (torch.Tensor, int, float, bool)):
        raise t.shape_error(
            "Tensor.__contains__ only supports Tensor or scalar, but you passed in a "
            f"{type(element)}."
        )
    return bool_(t, by_rule(t, torch.any, by_rule(t, torch.eq, self, element)))


@rule(Tensor.__complex__, Tensor.__dlpack__, Tensor.data_ptr)
def value_needed(t: Trace, self: Tensor, *args: object, **kwargs: object) -> object:
    raise t.refuse(
        ValueDependentError(
            where=location.full(),
            function=function_name(t.calling),
            shape=list(t.lift(self).shape),
            remedy="Return the tensor and use it outside the step",
        )
    )
