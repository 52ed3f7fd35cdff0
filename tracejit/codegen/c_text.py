"""C as text: literals, types of values and memory, blocks, and the language made of them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from tracejit.codegen.c_prelude import C_TYPES
from tracejit.codegen.c_table import TEMPLATES
from tracejit.codegen.language import Language, Line, strip
from tracejit.ir.types import DType, b1, bf16, f16, f64


def value_type(dtype: DType) -> str:
    """The C type that values of a dtype are computed in."""
    return C_TYPES[dtype.name]


def memory_type(dtype: DType) -> str:
    """The C type of elements in memory. Bytes: loops over bools are slow."""
    return "uint16_t" if dtype.narrow else "uint8_t" if dtype is b1 else C_TYPES[dtype.name]


def literal(value: object, dtype: DType) -> str:
    """A number as a C constant of a dtype's value type."""
    if dtype.kind == "b":
        return "true" if value else "false"
    if dtype.kind in "iu":
        number = int(value)
        if number == -(1 << 63):
            return "INT64_MIN"
        return f"INT64_C({number})" if abs(number) >= 1 << 31 else str(number)
    with np.errstate(over="ignore"):
        number = float(value) if dtype is f64 else float(np.float32(value))
    if math.isnan(number):
        return "NAN" if dtype is not f64 else "(double)NAN"
    if math.isinf(number):
        return "INFINITY" if number > 0 else "-INFINITY"
    if dtype is f64:
        return repr(number)
    text = str(np.float32(value))
    return text + ("f" if "." in text or "e" in text else ".0f")


def constant(value: object, dtype: DType, typed: bool) -> str:
    """A number as an operand; its text always tells the type."""
    text = literal(value, dtype)
    return f"({text})" if text.startswith("-") else text


def loaded(text: str, dtype: DType) -> str:
    """An element of memory as a value."""
    if dtype is b1:
        return f"{text} != 0"
    return f"tj_load_{dtype.name}({text})" if dtype.narrow else text


def stored(text: str, dtype: DType) -> str:
    """A value of `dtype` as an element of memory."""
    return f"tj_store_{dtype.name}({text})" if dtype.narrow else text


def rounded(text: str, dtype: DType) -> str:
    """A result in the value type, rounded to what the dtype holds."""
    return f"tj_round_{dtype.name}({strip(text)})" if dtype in (bf16, f16) else text


C = Language(
    name="C",
    templates=TEMPLATES,
    type_of=value_type,
    literal=constant,
    rounded=rounded,
    true="true",
    margin="  ",
    remark="//",
    remark_column=64,
)


def block(head: str, body: Iterable[Line]) -> list[Line]:
    """`head { body }`, indented."""
    return [Line(f"{head} {{"), *C.indent(body), Line("}")]


def product(sizes: Iterable[int]) -> int:
    """The product of sizes."""
    return math.prod(sizes)
