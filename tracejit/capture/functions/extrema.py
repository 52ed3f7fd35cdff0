"""Where the extremum is: argmax, argmin, max and min along a dim; the first of ties, NaN first."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tracejit.capture.functions.common import normal_axis, register
from tracejit.capture.functions.derived import spread
from tracejit.capture.functions.patterns import position
from tracejit.capture.functions.reduction import attains, keep, whole
from tracejit.capture.functions.selection import maximum, minimum
from tracejit.capture.trace import location
from tracejit.capture.trace.tensor import Handle, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.errors import AxisError
from tracejit.ir.graph import Builder, Value
from tracejit.ir.types import b1, i64

Tensor = torch.Tensor


def _extremum(t: Trace, x: Value, axis: int, name: str) -> tuple[Value, Value]:
    """The extremum along an axis, and the first place that attains it; NaN is the extremum."""
    top = getattr(t.b, f"reduce_{name}")(x, axes=(axis,))
    hit = attains(t, x, spread(t, top, x.type.shape, (axis,)))
    place = position(t, axis, x.type.shape, x.type.device)
    first = t.b.reduce_min(t.b.where(hit, place, x.type.shape[axis]), axes=(axis,))
    t.ranges[first] = 0, x.type.shape[axis] - 1
    return top, first


def _arg(name: str):
    def rule(
        t: Trace, input: Tensor, dim: int | None = None, keepdim: bool = False
    ) -> TracedTensor:
        h = t.lift(input)
        if h.dtype is b1:
            raise t.not_implemented(f"arg{name}_cpu", b1)
        axis = 0 if dim is None else normal_axis(t, dim, len(h.shape))
        require_elements(t, h, None if dim is None else axis, f"arg{name}()")
        with t.untaped():
            x = t.read(h)
            flat = dim is None or not h.shape
            if flat:
                x = t.b.reshape(x, shape=(h.numel,))
            _, first = _extremum(t, x, axis, name)
        if flat:
            kept = (1,) * len(h.shape) if keepdim else ()
            return t.fresh(t.b.reshape(first, shape=kept))
        return t.fresh(keep(t, first, h.shape, (axis,), keepdim))

    return rule


def require_elements(t: Trace, h: Handle, axis: int | None, name: str) -> None:
    """Refuse a reduction without a value: of no elements."""
    if axis is None and not h.numel:
        raise AxisError(
            where=location.full(),
            reason=f"{name}: Expected reduction dim to be specified for input.numel() == 0.",
        )
    if axis is not None and h.shape and not h.shape[axis]:
        raise AxisError(
            where=location.full(),
            reason=f"{name}: Expected reduction dim {axis} to have non-zero size.",
        )


def _with_index(t: Trace, input: Tensor, dim: int, keepdim: bool, name: str) -> object:
    """max and min along a dim: the gradient goes to the element that the index names."""
    h = t.lift(input)
    axis = normal_axis(t, dim, len(h.shape))
    require_elements(t, h, axis, f"{name}()")
    x = t.read(h)
    made = getattr(torch.return_types, name)
    if not h.shape:
        zero = t.b.full(0, shape=(), dtype=i64, device=h.device)
        return made((t.fresh(t.saves(t.b.alias(x))), t.fresh(zero)))  # torch saves the index
    with t.untaped():
        top, first = _extremum(t, x, axis, name)

    def vjp(b: Builder, cts: tuple, need: tuple) -> tuple:
        at, g = (spread(t, v, h.shape, (axis,)) for v in (first, cts[0]))
        hit = b.eq(at, position(t, axis, h.shape, h.device))
        return (b.where(hit, g, 0.0),)

    values = t.derive(name, (x,), top, vjp)
    return made(tuple(t.fresh(keep(t, v, h.shape, (axis,), keepdim)) for v in (values, first)))


def _extremum_function(name: str, elementwise: Callable):
    """max and min: of everything, of two tensors, and along a dim."""
    of_all = whole(name)

    def either(t: Trace, input: Tensor, *args: object, **kwargs: object) -> object:
        given = dict(zip(("dim", "keepdim"), args, strict=False)) | kwargs
        if not given:
            return of_all(t, input)
        other = given.get("other", given.get("dim"))
        if isinstance(other, Tensor) and len(given) == 1:
            return elementwise(t, input, other)
        unknown = sorted(set(given) - {"dim", "keepdim"})
        if unknown or "dim" not in given:
            raise t.unsupported(f"The options {unknown or sorted(given)} have no rule")
        return _with_index(t, input, given["dim"], bool(given.get("keepdim", False)), name)

    return either


for _name, _elementwise in (("max", maximum), ("min", minimum)):
    register((_name,), _extremum_function(_name, _elementwise), inplace=False)
    register((f"arg{_name}",), _arg(_name), inplace=False)
