"""What rules of whole neural-network functions share: wide arithmetic, one derivative per input."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tracejit.capture.functions.common import cast, expand
from tracejit.capture.trace import location
from tracejit.capture.trace.rejections import check_saved
from tracejit.capture.trace.table import function_name
from tracejit.capture.trace.tensor import TO_TORCH, Ints
from tracejit.capture.trace.trace import Trace
from tracejit.errors import ArgumentError
from tracejit.ir.graph import Builder, Value
from tracejit.ir.types import DType, f32

Forward = Callable[..., Value]  # (*inputs) -> result
Cotangent = Callable[..., Value | None]  # (cotangent of the result, result, *inputs) -> cotangent


def widened(dtype: DType) -> DType:
    """float32 for bf16 and f16, where torch computes; other dtypes as they are."""
    return f32 if dtype.narrow else dtype


def widen(t: Trace, x: Value) -> Value:
    """A value in the dtype that it is computed in."""
    return cast(t, x, widened(x.type.dtype))


def derived(
    t: Trace,
    name: str,
    inputs: Sequence[Value],
    forward: Forward,
    backward: Sequence[Cotangent] = (),
    *,
    flat: bool = False,
    wide: bool = True,
) -> Value:
    """One torch function of values, rounded once to the first input's dtype.

    `backward` holds the derivative formula of each input, torch's own; without any, the primitives'
    rules serve. Formulas compute wide as well, and their results are rounded to the inputs' dtypes.
    `flat`: the formulas do not vary with the inputs, which second derivatives then say with zeros.
    Not `wide`: bf16 and f16 are rounded at each primitive.
    """
    dtype, inputs = inputs[0].type.dtype, tuple(inputs)
    narrow = wide and any(x.type.dtype.narrow for x in inputs)

    def taken(values: tuple[Value, ...]) -> Sequence[Value]:
        return [widen(t, x) for x in values] if narrow else values

    def compute() -> Value:
        return cast(t, forward(*taken(inputs)), dtype)

    if not backward:
        return compute()
    with t.untaped():
        out = compute()

    def vjp(b, cts, need):
        first = len(b.nodes)
        with t.unchecked():
            g, y, *xs = taken((cts[0], out, *inputs))
        casts = {node.out: node for node in b.nodes[first:]}
        first += len(casts)
        found: list[Value | None] = []
        for x, formula, wanted in zip(inputs, backward, need, strict=True):
            slope = formula(g, y, *xs) if wanted else None
            slope = None if slope is None else cast(t, slope, x.type.dtype)
            found.append(t.unread(slope, x) if flat and slope is not None else slope)
        if t.formula is not None:  # of the saved values, those count that a formula read
            used = {v for node in b.nodes[first:] for v in node.inputs}
            for value in casts.keys() & used:
                check_saved(t, casts[value])
        return found

    return t.derive(name, inputs, out, vjp)


def require_float(t: Trace, name: str, *xs: Value, checked: bool = False) -> None:
    """Refuse dtypes that torch has no kernel for, or that the function itself has `checked`."""
    for x in xs:
        if not x.type.dtype.is_float and checked:
            raise t.shape_error(f"{name}: expected floats, not {TO_TORCH[x.type.dtype]}")
        if not x.type.dtype.is_float:
            raise t.not_implemented(name, x.type.dtype)


def argument_error(t: Trace, reason: str) -> ArgumentError:
    """The error for argument values that the torch call in progress rejects."""
    where, function = location.full(), function_name(t.calling)
    return ArgumentError(where=where, function=function, reason=reason)


def underived(
    t: Trace, name: str, inputs: Sequence[Value], found: Value, reason: str | None = None
) -> Value:
    """What was found in some inputs by a function whose derivative eager does not know."""
    with t.untaped():
        out = t.b.alias(found)

    def vjp(b: Builder, cts: Sequence[Value], need: Sequence[bool]) -> Sequence[Value]:
        raise t.autograd_error(reason) if reason else t.no_derivative(f"'{name}'")

    return t.derive(name, tuple(inputs), out, vjp)


def no_derivative(t: Trace, name: str, argument: str) -> Cotangent:
    """The formula of an input that torch cannot differentiate."""

    def refuse(*_: Value) -> Value:
        raise t.no_derivative(f"'{argument}' of {name}")

    return refuse


def spread(t: Trace, x: Value, shape: Ints, axes: Ints) -> Value:
    """Broadcast a reduced value back over the axes of `shape` that were reduced away."""
    kept = tuple(1 if i in axes else n for i, n in enumerate(shape))
    return expand(t, t.b.reshape(x, shape=kept), shape)
