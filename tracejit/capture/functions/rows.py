"""Element-wise torch functions from their rows: in a `Row`, out the function and all its forms.

A new one is one row in a family module: `elementwise(Row("sinc", value, (slope,)), __name__)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from tracejit.capture.functions.common import (
    Number,
    as_float,
    as_it_is,
    is_tensor,
    literal,
    pointwise,
    register,
)
from tracejit.capture.functions.derived import derived, no_derivative, require_float, widened
from tracejit.capture.trace.table import Formula, Row, no_numbers
from tracejit.capture.trace.tensor import TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Arg, Value


def primitive(name: str) -> Formula:
    """The formula that is one primitive."""
    return lambda t, *inputs: getattr(t.b, name)(*inputs)


def undefined(name: str, argument: str) -> Formula:
    """The slope of an input that torch cannot differentiate."""
    return lambda t, *_: no_derivative(t, name, argument)()


def emitted(t: Trace, row: Row, inputs: Sequence[Arg], numbers: Sequence[Number] = ()) -> Value:
    """The row's function of values of one shape and dtype, with its derivative."""
    if row.dtypes == "floats":
        require_float(t, row.name, inputs[0])
    if not row.slopes:
        return row.value(t, *inputs, *numbers)
    dtype = inputs[0].type.dtype
    dtype = widened(dtype) if row.wide else dtype
    given = [literal(n, dtype) for n in numbers]
    return derived(
        t,
        row.name,
        inputs,
        lambda *xs: row.value(t, *xs, *given),
        [_bound(t, slope, given) for slope in row.slopes],
        flat=row.flat,
        wide=row.wide,
    )


def _as_values(t: Trace, row: Row, xs: Sequence[Arg]) -> Sequence[Arg]:
    """The inputs, numbers as tensors where formulas of the row differentiate by each."""
    if not row.slopes:
        return xs
    like = next(x for x in xs if is_tensor(x)).type
    full = partial(t.b.full, shape=like.shape, dtype=like.dtype, device=like.device)
    return [x if is_tensor(x) else full(x) for x in xs]


def _bound(t: Trace, slope: Formula, numbers: list[Arg]) -> Formula:
    return lambda g, y, *xs: slope(t, g, y, *xs, *numbers)


def function_of(row: Row, module: str) -> Callable[..., TracedTensor]:
    """A rule: promote, broadcast, emit, wrap. It takes what torch's function takes.

    `module`: whose `__name__` the function bears, for tracebacks and its family.
    """
    to = as_float if row.dtypes == "to_float" else as_it_is
    row_major = row.row_major

    if row.arity == 1 and row.numbers is no_numbers:

        def function(t: Trace, input: Tensor) -> TracedTensor:
            return pointwise(
                t, lambda x: emitted(t, row, (x,)), (input,), to=to, row_major=row_major
            )

    elif row.arity == 2 and row.numbers is no_numbers:

        def function(t: Trace, input: object, other: object) -> TracedTensor:
            emit = lambda *xs: emitted(t, row, _as_values(t, row, xs))  # noqa: E731
            return pointwise(t, emit, (input, other), to=to, row_major=row_major)

    else:

        def function(t: Trace, input: Tensor, *args: object, **kwargs: object) -> TracedTensor:
            inputs = (input, *args[: row.arity - 1])
            numbers = row.numbers(*args[row.arity - 1 :], **kwargs)
            emit = lambda *xs: emitted(t, row, xs, numbers)  # noqa: E731
            return pointwise(t, emit, inputs, to=to, row_major=row_major)

    function.__name__ = function.__qualname__ = row.name
    function.__module__ = module
    return function


def elementwise(row: Row, module: str, *, inplace: bool = True) -> Callable[..., TracedTensor]:
    """Register a row for all spellings of its names, as methods, in place, with flags; its rule."""
    function = function_of(row, module)
    register(row.names.split(), function, row=row, inplace=inplace)
    return function
