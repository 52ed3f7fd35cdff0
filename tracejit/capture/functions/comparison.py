"""Comparison, logic and bits, element by element."""

from __future__ import annotations

import torch

from tracejit.capture.functions.arithmetic import swapped
from tracejit.capture.functions.common import (
    by_rule,
    literal,
    operand,
    pointwise,
    register,
    result_dtype,
    truth,
)
from tracejit.capture.functions.rows import elementwise, primitive
from tracejit.capture.trace.table import Row, rule
from tracejit.capture.trace.tensor import TO_TORCH, TracedTensor
from tracejit.capture.trace.trace import Trace

Tensor = torch.Tensor

ROWS = (
    Row("eq __eq__", primitive("eq"), arity=2),
    Row("ne not_equal __ne__", primitive("ne"), arity=2),
    Row("lt less __lt__", primitive("lt"), arity=2),
    Row("le less_equal __le__", primitive("le"), arity=2),
    Row("gt greater __gt__", primitive("gt"), arity=2),
    Row("ge greater_equal __ge__", primitive("ge"), arity=2),
    Row("logical_and", lambda t, x, y: t.b.and_(truth(t, x), truth(t, y)), arity=2),
    Row("logical_or", lambda t, x, y: t.b.or_(truth(t, x), truth(t, y)), arity=2),
    Row("logical_xor", lambda t, x, y: t.b.xor(truth(t, x), truth(t, y)), arity=2),
    Row("logical_not", lambda t, x: t.b.eq(x, literal(0, x.type.dtype))),
)
for _row in ROWS:
    elementwise(_row, __name__)


def _bitwise(name: str):
    def bitwise(t: Trace, input: object, other: object) -> TracedTensor:
        dtype = result_dtype((operand(t, input), operand(t, other)))
        if dtype.is_float:
            raise t.not_implemented(f"bitwise_{name}_cpu", dtype)
        return pointwise(t, getattr(t.b, name), (input, other))

    return bitwise


def bitwise_not(t: Trace, input: Tensor) -> TracedTensor:
    if operand(t, input).handle.dtype.is_float:
        raise t.unsupported("It is only implemented on integer and bool tensors")
    return pointwise(t, t.b.not_, (input,))


for _names, _implementation in (
    (("bitwise_and", "__and__", "__rand__"), _bitwise("and")),
    (("bitwise_or", "__or__", "__ror__"), _bitwise("or")),
    (("bitwise_xor", "__xor__", "__rxor__"), _bitwise("xor")),
    (("bitwise_left_shift", "__lshift__"), _bitwise("shl")),
    (("bitwise_right_shift", "__rshift__"), _bitwise("shr")),
    (("__rlshift__",), swapped(_bitwise("shl"))),
    (("__rrshift__",), swapped(_bitwise("shr"))),
    (("bitwise_not", "__invert__"), bitwise_not),
):
    register(_names, _implementation)


@rule(torch.isclose, Tensor.isclose)
def isclose(
    t: Trace,
    input: Tensor,
    other: Tensor,
    rtol: float = 1e-05,
    atol: float = 1e-08,
    equal_nan: bool = False,
) -> Tensor:
    one, two = TO_TORCH[t.lift(input).dtype], TO_TORCH[t.lift(other).dtype]
    if one is not two:
        raise t.shape_error(f"{one} did not match {two}")
    close = by_rule(t, torch.eq, input, other)
    if equal_nan:
        both = by_rule(t, torch.ne, input, input), by_rule(t, torch.ne, other, other)
        close = by_rule(t, torch.logical_or, close, by_rule(t, torch.logical_and, *both))
    if rtol == 0 and atol == 0:
        return close
    if not (t.lift(input).dtype.is_float and t.lift(other).dtype.is_float):
        dtype = torch.get_default_dtype()
        input, other = (by_rule(t, Tensor.to, x, dtype) for x in (input, other))
    allowed = by_rule(t, torch.add, by_rule(t, torch.abs, by_rule(t, torch.mul, other, rtol)), atol)
    error = by_rule(t, torch.abs, by_rule(t, torch.sub, input, other))
    finite = by_rule(t, torch.ne, error, float("inf"))
    near = by_rule(t, torch.logical_and, by_rule(t, torch.le, error, allowed), finite)
    return by_rule(t, torch.logical_or, close, near)
