"""Arithmetic of complex tensors, and what writes to them.

In: tensors of which one at least is complex, and numbers. They are computed as pairs of real
numbers (`complexes.py`), with torch's own formulas for derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tracejit.capture.functions import movement
from tracejit.capture.functions.advanced import is_advanced
from tracejit.capture.functions.common import cast, expand, literal, operand
from tracejit.capture.functions.complexes import (
    common_shape,
    dot,
    length_of,
    made,
    narrow,
    of_complex,
    pair,
    part,
    product,
    sign_of,
    times_i,
    wide,
)
from tracejit.capture.trace.overlaps import check_copy, check_operands
from tracejit.capture.trace.scalars import is_runtime, plain
from tracejit.capture.trace.table import spellings
from tracejit.capture.trace.tensor import (
    COMPLEX_TO_IR,
    TO_TORCH,
    Ints,
    TracedTensor,
    elementwise_strides,
)
from tracejit.capture.trace.trace import Trace
from tracejit.capture.trace.views import conjugates
from tracejit.ir.graph import Builder, Value
from tracejit.ir.types import PARTS, DType

Tensor = torch.Tensor


def _zeros(b: Builder, like: Value) -> Value:
    return b.full(0.0, shape=like.type.shape, dtype=like.type.dtype, device=like.type.device)


def quotient(b: Builder, x: Value, y: Value) -> Value:
    """Smith 1962, Algorithm 116: Complex division; the larger part of the divisor is divided by."""
    p, q, c, d = part(b, x, 0), part(b, x, 1), part(b, y, 0), part(b, y, 1)
    by_real = b.ge(b.abs(c), b.abs(d))
    large, small = b.where(by_real, c, d), b.where(by_real, d, c)
    ratio = b.div(small, large)
    scale = b.div(1.0, b.add(large, b.mul(small, ratio)))
    first, second = b.where(by_real, p, q), b.where(by_real, q, p)
    re = b.add(first, b.mul(second, ratio))
    im = b.sub(second, b.mul(first, ratio))
    im = b.where(by_real, im, b.neg(im))
    nothing = b.and_(b.eq(c, 0.0), b.eq(d, 0.0))
    by_zero = b.div(x, b.abs(c))
    return b.where(nothing, by_zero, b.mul(pair(b, re, im), scale))


def _promoted(t: Trace, xs: Sequence[object]) -> DType:
    """The dtype of the parts of what is computed of operands."""
    stand_ins = []
    for x in xs:
        if isinstance(x, Tensor):
            h = t.lift(x)
            x = torch.empty((1,) * bool(h.shape), dtype=TO_TORCH[h.dtype], device="meta")
        stand_ins.append(x if isinstance(x, complex) else _plain(x))
    found = COMPLEX_TO_IR.get(torch.result_type(*stand_ins, *stand_ins[:1] * (len(xs) < 2)))
    if found is None:
        raise t.unsupported("complex32 is not supported")
    return PARTS[found]


def _plain(x: object) -> object:
    """A number of the same kind as a runtime scalar."""
    return 0.5 if is_runtime(x) and isinstance(x, float) else plain(x)


def _given(t: Trace, xs: Sequence[object], dtype: DType, shape: Ints) -> list[Value]:
    """Operands as pairs of a dtype and shape: real ones with zeros for imaginary parts."""
    b, device = t.b, next(t.lift(x).device for x in xs if isinstance(x, Tensor))
    whole, out = (*shape, 2), []

    def full(number: object) -> Value:
        return b.full(literal(number, dtype), shape=whole, dtype=dtype, device=device)

    for x in xs:
        if not isinstance(x, Tensor):
            number = x if isinstance(x, complex) else operand(t, x).number
            parts = (number.real, number.imag) if isinstance(x, complex) else (number, 0.0)
            out.append(pair(b, *map(full, parts)))
            continue
        h = t.lift(x)
        value = read = cast(t, t.read(h), dtype)
        if not h.is_complex:
            read = wide(b, expand(t, value, shape))
            read = pair(b, read, _zeros(b, read))
            if value in t.origin:
                t.origin[read] = t.origin[value]
        out.append(expand(t, read, whole))
    return out


def _pointwise(t: Trace, xs: Sequence[object], emit: Callable[..., Value]) -> TracedTensor:
    """A complex tensor, element by element: emit(*operands as pairs)."""
    handles = [t.lift(x) for x in xs if isinstance(x, Tensor)]
    if not handles:
        raise t.unsupported("It has a rule for tensors")
    shape, dtype = common_shape(t, handles), _promoted(t, xs)
    strides = elementwise_strides(shape, [(h.shape, h.strides) for h in handles])
    return made(t, emit(*_given(t, xs, dtype, shape)), strides)


def mul(t: Trace, input: object, other: object) -> TracedTensor:
    def emit(x: Value, y: Value) -> Value:
        with t.untaped():
            out = product(t.b, x, y)

        def vjp(b: Builder, cts: tuple, need: tuple) -> tuple:
            (g,) = cts
            return (
                product(b, g, conjugates(b, y)) if need[0] else None,
                product(b, g, conjugates(b, x)) if need[1] else None,
            )

        return t.derive("mul", (x, y), out, vjp)

    return _pointwise(t, (input, other), emit)


def div(t: Trace, input: object, other: object) -> TracedTensor:
    def emit(x: Value, y: Value) -> Value:
        with t.untaped():
            out = quotient(t.b, x, y)

        def vjp(b: Builder, cts: tuple, need: tuple) -> tuple:
            (g,) = cts
            to_x = quotient(b, g, conjugates(b, y)) if need[0] else None
            if not need[1]:
                return to_x, None
            slope = conjugates(b, quotient(b, quotient(b, x, y), y))
            return to_x, b.neg(product(b, g, slope))

        return t.derive("div", (x, y), out, vjp)

    return _pointwise(t, (input, other), emit)


def add(t: Trace, input: object, other: object, *, alpha: object = 1) -> TracedTensor:
    other = other if type(alpha) is int and alpha == 1 else mul(t, other, alpha)
    return _pointwise(t, (input, other), t.b.add)


def sub(t: Trace, input: object, other: object, *, alpha: object = 1) -> TracedTensor:
    other = other if type(alpha) is int and alpha == 1 else mul(t, other, alpha)
    return _pointwise(t, (input, other), t.b.sub)


def _in_place(out_of_place: Callable) -> Callable:
    def rule(t: Trace, self: Tensor, *args: object, **options: object) -> Tensor:
        into = t.lift(self)
        if not into.is_complex:
            raise t.shape_error("result type Complex can't be cast to the desired output type")
        check_operands(t, into, *args, *options.values())
        source: Tensor = self
        if t.grad_on and t.tape.tracked:  # the derivative may read what was there before
            source = made(t, t.b.alias(t.read(into)), into.strides)
        got = t.lift(out_of_place(t, source, *args, **options))
        if got.shape != into.shape or got.dtype is not into.dtype:
            raise t.shape_error(
                f"output with shape {list(into.shape)} and {TO_TORCH[into.dtype]} does not take "
                f"{list(got.shape)} and {TO_TORCH[got.dtype]}"
            )
        t.write(into, t.read(got))
        return self

    return rule


for _names, _run in (
    ("mul multiply __mul__", mul),
    ("add __add__", add),
    ("sub subtract __sub__", sub),
    ("div divide true_divide __truediv__", div),
):
    for _name in _names.split():
        of_complex(*spellings(_name))(_run)
        _written = f"__i{_name[2:]}" if _name.startswith("__") else f"{_name}_"
        of_complex(*spellings(_written))(_in_place(_run))
of_complex(*spellings("__rmul__"))(lambda t, input, other: mul(t, other, input))
of_complex(*spellings("__radd__"))(lambda t, input, other: add(t, other, input))
of_complex(*spellings("__rsub__"), torch.rsub)(lambda t, input, other: sub(t, other, input))
of_complex(*spellings("__rtruediv__"))(lambda t, input, other: div(t, other, input))


@of_complex(*spellings("neg"), *spellings("negative"), *spellings("__neg__"))
def neg(t: Trace, input: Tensor) -> TracedTensor:
    return _pointwise(t, (input,), t.b.neg)


@of_complex(*spellings("square"))
def square(t: Trace, input: Tensor) -> TracedTensor:
    return mul(t, input, input)


@of_complex(*spellings("reciprocal"))
def reciprocal(t: Trace, input: Tensor) -> TracedTensor:
    return div(t, 1.0, input)


@of_complex(*spellings("exp"))
def exp(t: Trace, input: Tensor) -> TracedTensor:
    b = t.b

    def emit(z: Value) -> Value:
        with t.untaped():
            length, angle = b.exp(part(b, z, 0)), part(b, z, 1)
            real = b.eq(angle, 0.0)  # then ∞·0 is none
            up = b.where(real, angle, b.mul(length, b.sin(angle)))
            out = pair(b, b.where(real, length, b.mul(length, b.cos(angle))), up)
        return t.derive(
            "exp", (z,), out, lambda b, cts, need: (product(b, cts[0], conjugates(b, out)),)
        )

    return _pointwise(t, (input,), emit)


def _to_real(t: Trace, z: Tensor, emit: Callable[[Value], Value]) -> TracedTensor:
    h = t.lift(z)
    return t.fresh(emit(t.read(h)), elementwise_strides(h.shape, [(h.shape, h.strides)]))


@of_complex(*spellings("abs"), *spellings("absolute"), *spellings("__abs__"))
def abs_(t: Trace, input: Tensor) -> TracedTensor:
    def emit(z: Value) -> Value:
        with t.untaped():
            out = length_of(t, z)
        return t.derive(
            "abs", (z,), out, lambda b, cts, need: (b.mul(wide(b, cts[0]), sign_of(t, z)),)
        )

    return _to_real(t, input, emit)


@of_complex(*spellings("angle"))
def angle(t: Trace, input: Tensor) -> TracedTensor:
    def emit(z: Value) -> Value:
        with t.untaped():
            b = t.b
            out = b.atan2(*(narrow(b, part(b, z, k)) for k in (1, 0)))

        def vjp(b: Builder, cts: tuple, need: tuple) -> tuple:
            square = wide(b, dot(b, z, z))
            slope = b.where(b.eq(square, 0.0), 0.0, b.div(times_i(b, z), square))
            return (b.mul(wide(b, cts[0]), slope),)

        return t.derive("angle", (z,), out, vjp)

    return _to_real(t, input, emit)


# ---- what is written to


@of_complex(Tensor.copy_)
def copy_(t: Trace, self: Tensor, src: object, non_blocking: bool = False) -> Tensor:
    into = t.lift(self)
    if not into.is_complex:
        raise t.unsupported("Complex numbers in a real tensor have no rule; use .real")
    if isinstance(src, Tensor):
        check_copy(t, into, t.lift(src))
    (value,) = _given(t, (src, self), PARTS[into.dtype], into.shape)[:1]
    new = t.b.alias(value)
    if t.grad_on and t.requires_grad(into):
        new = t.unread(new, t.read(into))
    t.write(into, new)
    return self


@of_complex(Tensor.fill_)
def fill_(t: Trace, self: Tensor, value: object) -> Tensor:
    return copy_(t, self, value)


@of_complex(Tensor.zero_, torch.zero_)
def zero_(t: Trace, self: Tensor) -> Tensor:
    return copy_(t, self, 0.0)


@of_complex(Tensor.__setitem__)
def setitem(t: Trace, input: Tensor, index: object, value: object) -> None:
    if is_advanced(index):
        raise t.unsupported("It has a rule for complex tensors by ints, slices, None and Ellipsis")
    copy_(t, movement.getitem(t, input, index), value)
