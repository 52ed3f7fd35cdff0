"""Random numbers of `randomness="fast"`: told from a counter and a key, where they are read.

In: a key, one 64-bit integer that a site draws from torch's generator in each call. Out: nodes that
tell the numbers from the position of each element: masks, uniform, normal and exponential ones.
"""

from __future__ import annotations

import math

from tracejit.capture.functions.common import cast, expand, literal
from tracejit.capture.trace.scalars import is_runtime
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value
from tracejit.ir.types import Type, b1, f16, f32, f64, i64

Number = int | float
COUNTED = ("bernoulli_", "uniform_", "normal_", "exponential_")
_BITS = 31  # of each number of `philox`
_MANTISSA = {f32: 24, f16: 11}  # else 8, of bf16
_SECOND = 1 << 40  # where a second number for each element begins


def is_counted(fill: str, type: Type) -> bool:
    """Whether a method's numbers are told from counters."""
    return fill in COUNTED and (type.dtype.is_float or (fill == "bernoulli_" and type.dtype is b1))


def counted(t: Trace, fill: str, type: Type, key: Value, numbers: tuple[Number, ...]) -> Value:
    """The numbers that a method of tensors would draw, of a type; `key` is i64[1]."""
    with t.untaped():
        if fill == "bernoulli_":
            return _below(t, type, key, *numbers)
        if fill == "uniform_":
            low, high = numbers
            return _affine(t, _uniform(t, type, key), high - low, low)
        b, wide = t.b, Type(f64 if type.dtype is f64 else f32, type.shape, type.device)
        rest = b.sub(1.0, _uniform(t, wide, key))  # in (0, 1]
        if fill == "exponential_":
            (rate,) = numbers
            made = b.div(b.neg(b.log(rest)), literal(rate, wide.dtype))
        else:  # Box and Muller
            mean, deviation = numbers
            length = b.sqrt(b.mul(b.log(rest), -2.0))
            turn = b.cos(b.mul(_uniform(t, wide, key, _SECOND), 2 * math.pi))
            made = _affine(t, b.mul(length, turn), deviation, mean)
        return cast(t, made, type.dtype)


def _bits(t: Trace, type: Type, key: Value, first: int = 0) -> Value:
    """31 random bits for each element, as i64."""
    flat = (type.numel,)
    counter = t.b.iota(axis=0, shape=flat, dtype=i64, device=type.device)
    if first:
        counter = t.b.add(counter, first)
    bits = t.b.philox(counter, expand(t, key, flat))
    return bits if flat == type.shape else t.b.reshape(bits, shape=type.shape)


def _uniform(t: Trace, type: Type, key: Value, first: int = 0) -> Value:
    """Numbers in [0, 1), of as many bits as the dtype holds."""
    b, bits = t.b, _bits(t, type, key, first)
    if type.dtype is f64:
        more = cast(t, _bits(t, type, key, first + 2 * _SECOND), f64)
        fine = b.mul(b.floor(b.mul(more, 2.0**-9)), 2.0**-53)
        return b.add(b.mul(cast(t, bits, f64), 2.0**-_BITS), fine)
    held = _MANTISSA.get(type.dtype, 8)
    number = cast(t, b.shr(bits, _BITS - held), f32)
    return cast(t, b.mul(number, 2.0**-held), type.dtype)


def _below(t: Trace, type: Type, key: Value, chance: Number) -> Value:
    """Ones with a chance, else zeros."""
    if not 0 <= chance <= 1:
        raise t.shape_error(f"bernoulli_ expects p to be in [0, 1], but got p={chance}")
    if is_runtime(chance):
        wide = Type(f32, type.shape, type.device)
        return cast(t, t.b.lt(_uniform(t, wide, key), chance.value), type.dtype)
    return cast(t, t.b.lt(_bits(t, type, key), math.ceil(chance * 2.0**_BITS)), type.dtype)


def _affine(t: Trace, x: Value, factor: Number, shift: Number) -> Value:
    """x·factor + shift; what changes nothing is left out."""
    dtype = x.type.dtype
    if is_runtime(factor) or factor != 1:
        x = t.b.mul(x, literal(factor, dtype))
    if is_runtime(shift) or shift != 0:
        x = t.b.add(x, literal(shift, dtype))
    return x
